"""`sparsectrl-lcm doctor`."""

import typer


def doctor() -> None:
    """Show which backends can run here, and what others need."""
    from rich.table import Table

    from ..runtime.backends import BACKENDS, availability
    from ..runtime.errors import BackendError, message
    from ..runtime.gpu.device import probe
    from .tables import print_table

    try:
        device = probe()
        typer.echo(f"GPU: {device}, {device.memory / 2**30:.0f} GiB, driver {device.driver}")
    except BackendError as error:
        without_gpu = " and ".join(name for name, record in BACKENDS.items() if not record.on_gpu)
        typer.echo(f"GPU: {message('', error.reason, error.remedy)} ({without_gpu} need none)")
    found = [availability(backend) for backend in BACKENDS]
    table = Table("backend", "version", "can run here")
    for item in found:
        table.add_row(item.backend, item.version or "-", "no" if item.reason else "yes")
    print_table(table)
    for item in found:
        if item.reason:
            typer.echo(f"{item.backend}: {item.reason}")
    for item in found:
        for note in BACKENDS[item.backend].implementation.notes(item):
            typer.echo(f"{item.backend}: {note}")
    usable = [item.backend for item in found if not item.reason]
    if usable:
        rule = f"--backend auto takes {usable[0]}"
        if len(usable) > 1:
            rule = (
                f"--backend auto takes the first of {', '.join(usable)} that has engines for the bundle, or needs none"
            )
        if compiling := [name for name in usable if BACKENDS[name].compiles]:
            rule += f"; generate leaves out {' and '.join(compiling)} if compiling takes longer than it saves"
        typer.echo(rule)
