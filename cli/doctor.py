"""`sparsectrl-lcm doctor`."""

import typer


def doctor() -> None:
    """Show which backends can run on this machine, and what mends those that cannot."""
    from rich.console import Console
    from rich.table import Table

    from ..runtime.backends import BACKENDS, availability
    from ..runtime.errors import BackendError
    from ..runtime.gpu.device import probe

    try:
        device = probe()
        typer.echo(f"GPU: {device}, {device.memory / 2**30:.0f} GiB, driver {device.driver}")
    except BackendError as error:
        typer.echo(f"GPU: {str(error).removeprefix('backend: ')} (openvino and onnxruntime need none)")
    found = [availability(backend) for backend in BACKENDS]
    table = Table("backend", "version", "can run here")
    for item in found:
        table.add_row(item.backend, item.version or "-", "no" if item.reason else "yes")
    Console().print(table)
    for item in found:
        if item.reason:
            typer.echo(f"{item.backend}: {item.reason}")
    if any(item.backend == "openvino" and not item.reason for item in found):
        from ..runtime.openvino import best_precision, capabilities

        typer.echo(f"openvino: the processor computes in {', '.join(capabilities())}; build takes {best_precision()}")
    if any(item.backend == "tensorrt-rtx" and item.version and item.reason for item in found):
        typer.echo("tensorrt-rtx: engines can be built here all the same")
    usable = [item.backend for item in found if not item.reason]
    if usable:
        typer.echo(
            f"--backend auto takes the first of {', '.join(usable)} that has engines for the bundle, or needs none"
        )
