"""`sparsectrl-lcm doctor`."""

import typer

INT8_PRODUCTS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
"""Instruction sets of x86 with one of which int8 is faster than fp32."""


def doctor() -> None:
    """Show which backends can run on this machine, and what mends those that cannot."""
    from rich.console import Console
    from rich.table import Table

    from ..runtime.backends import BACKENDS, availability
    from ..runtime.errors import BackendError, message
    from ..runtime.gpu.device import probe

    try:
        device = probe()
        typer.echo(f"GPU: {device}, {device.memory / 2**30:.0f} GiB, driver {device.driver}")
    except BackendError as error:
        typer.echo(f"GPU: {message('', error.reason, error.remedy)} (openvino and onnxruntime need none)")
    found = [availability(backend) for backend in BACKENDS]
    table = Table("backend", "version", "can run here")
    for item in found:
        table.add_row(item.backend, item.version or "-", "no" if item.reason else "yes")
    Console().print(table)
    for item in found:
        if item.reason:
            typer.echo(f"{item.backend}: {item.reason}")
    if any(item.backend == "openvino" and not item.reason for item in found):
        typer.echo(f"openvino: {_openvino_precisions()}")
    if any(item.backend == "tensorrt-rtx" and item.version and item.reason for item in found):
        typer.echo("tensorrt-rtx: engines can be built here all the same")
    usable = [item.backend for item in found if not item.reason]
    if usable:
        typer.echo(
            f"--backend auto takes the first of {', '.join(usable)} that has engines for the bundle, or needs none"
        )


def _openvino_precisions() -> str:
    """What OpenVINO computes in on this processor, and what a build makes of it."""
    from ..runtime.cpu.openvino import best_precision, capabilities
    from ..runtime.machine import instruction_sets

    said = f"the processor computes in {', '.join(capabilities())}; build takes {best_precision()}"
    known = instruction_sets()
    slow = known and not known & INT8_PRODUCTS
    return f"{said}; int8 is no faster than fp32 without VNNI or AMX" if slow else said
