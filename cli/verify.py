"""`sparsectrl-lcm verify`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import BackendError
from .options import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from ..engine.verify.layers import Jump
    from ..engine.verify.report import Report

COLUMNS = ("graph", "by", "runs", "bounds", "output", "largest", "99%", "cosine", "levels", "PSNR", "")


def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A folder from `export`; the demo bundle by default.")] = None,
    backend: Annotated[str | None, typer.Option(help="As for `generate`; with --load, the one that was saved.")] = None,
    precision: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the clips; one that engines were built for by default.")
    ] = None,
    graph: Annotated[
        list[str] | None, typer.Option(help="Only this graph, or `clip` for whole clips; repeatable.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="In graphs that fail, find the first tensor whose error jumps.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write all inputs and outputs to a new folder.")
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take the inputs of a saved run, and its outputs unless --backend differs."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a backend's engines against the portable graphs.

    Exits with 1 if something is out of bounds, was not compared, or was not replayed as a CUDA graph.
    """
    if not find_spec("polygraphy"):
        raise BackendError("verify", "Polygraphy is not installed", "run: pip install 'sparsectrl-lcm[verify]'")
    from ..engine.verify.verify import VerifyOptions
    from ..engine.verify.verify import verify as compare
    from ..runtime.format.bundle import Bundle
    from .progress_bar import Bar

    width, height = parse_size(size)
    options = VerifyOptions(
        backend=None if backend == "auto" else backend,
        precision=precision,
        width=width,
        height=height,
        graphs=tuple(graph or ()),
        layers=layers,
        save=save,
        load=load,
    )
    with Bar() as bar:
        report = compare(Bundle.load(bundle), options, bar.update)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(report.as_dict(), indent=1))
    else:
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    from .tables import print_table

    print_table(_table(report))
    for note in report.run.notes:
        typer.echo(note)
    for name, jump in report.jumps.items():
        typer.echo(f"{name}: {_found(jump)}")
    compared = {row.graph for row in report.rows}
    if absent := [name for name in report.missing if name not in compared]:
        typer.echo(f"not compared, since the run was interrupted: {', '.join(absent)}")
    if partial := [name for name in report.missing if name in compared]:
        typer.echo(f"not compared with all runners, since the run was interrupted: {', '.join(partial)}")
    typer.echo(_verdict(report))


def _verdict(report: "Report") -> str:
    if report.failed_graphs:
        return f"failed: {', '.join(report.failed_graphs)}"
    if not report.rows:
        return "failed: nothing was compared"
    return "all within bounds" if report.passed else "failed: the comparison is not complete"


def _table(report: "Report") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    run = report.run
    title = f"{run.backend} {run.version} {run.precision} on {run.device}, clips of {report.size}, against ONNX Runtime"
    table = Table(*COLUMNS, title=escape(title))
    for row in report.rows:
        found = row.outputs[row.output]
        measures = (f"{found.largest:.1e}", f"{found.quantile:.1e}", f"{found.cosine:.6f}")
        frames = ("-", "-") if found.levels is None else (f"{found.levels:.2f}", f"{found.psnr:.0f} dB")
        exceeded = row.exceeded.get(row.output)
        verdict = f"out of bounds: {', '.join(exceeded)}" if exceeded else "ok" if row.passed else "failed"
        table.add_row(row.graph, row.runner, str(row.runs), row.precision, row.output, *measures, *frames, verdict)
    return table


def _found(jump: "Jump | None") -> str:
    if jump is None:
        return "no tensor is out of bounds once tensors between the nodes are outputs, so a fusion is at fault"
    takes = f", which takes {', '.join(jump.takes)}" if jump.takes else ""
    return (
        f"the error jumps from {jump.before:.1e} to {jump.error:.1e} at {jump.tensor!r}, "
        f"the result of {jump.operator} {jump.node!r}{takes}"
    )
