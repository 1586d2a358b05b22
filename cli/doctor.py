"""`sparsectrl-lcm doctor`."""

import typer


def doctor() -> None:
    """Show which backends can run on this machine, and what mends those that cannot."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..runtime.backends import BACKENDS, availability
    from ..runtime.errors import BackendError
    from ..runtime.gpu.device import probe

    try:
        device = probe()
        typer.echo(f"GPU: {device}, {device.memory / 2**30:.0f} GiB, driver {device.driver}")
    except BackendError as error:
        typer.echo(f"GPU: {str(error).removeprefix('backend: ')}")
    table = Table("backend", "version", "can run", "what is missing")
    best = None
    for backend in BACKENDS:
        found = availability(backend)
        if found.reason is None:
            best = best or backend
        mark = "yes" if found.reason is None else "no"
        table.add_row(backend, found.version or "-", mark, escape(found.reason or ""))
    Console().print(table)
    typer.echo(f"--backend auto takes {best} where its engines were built, else the next that can run")
