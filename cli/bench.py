"""`sparsectrl-lcm bench`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import BackendError, OutputError, reason_of
from .options import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from ..benchmarks.harness.measured_requests import RequestSize
    from ..benchmarks.harness.rounds import Contender, Result
    from ..runtime.format.bundle import Bundle

ROWS = (
    ("new prompt", "first", "total"),
    ("- text", "first", "text"),
    ("- keyframes", "first", "keyframes"),
    ("- control", "first", "control"),
    ("- denoise", "first", "denoise"),
    ("- decode", "first", "decode"),
    ("next seed", "second_seed", "total"),
)
LEGEND = """\
Seconds: medians of {rounds} (smallest .. largest), with graphs already open. For a new prompt nothing
was kept; the next seed repeats its prompt and keyframes. Memory: the peak of a backend's process on the host."""


def bench(
    bundle: Annotated[Path | None, typer.Argument(help="A folder from `export`; the demo bundle by default.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; by default all that can run here with what the bundle has."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    decoder: Annotated[str, typer.Option(help="full, or tiny if exported with --tiny-decoder.")] = "full",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU; one per core by default.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; the bundle's by default.")] = None,
    frames: Annotated[int | None, typer.Option(help="1 to 128; the bundle's by default.")] = None,
    steps: Annotated[int, typer.Option(help="LCM steps, 1 to 12.")] = 4,
    guidance: Annotated[float, typer.Option(help="Guidance scale, 0 to 30; above 1 takes twice the work.")] = 1.0,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; in each the backends take turns.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all samples to this file.")
    ] = None,
) -> None:
    """Measure requests on each backend.

    They have three scribbles as keyframes. Each backend runs in its own process.
    """
    from ..benchmarks.harness.rounds import Rounds
    from ..runtime.format.bundle import Bundle
    from ..runtime.machine import memory_bytes
    from .progress_bar import Bar
    from .tables import print_table

    if json_file is not None and not json_file.parent.is_dir():
        raise OutputError("json", f"the folder of {str(json_file)!r} does not exist")
    if json_file is not None and json_file.is_dir():
        raise OutputError("json", f"{str(json_file)!r} is a folder", "name a file in it")
    opened = Bundle.load(bundle)
    request = _request(opened, size, frames, steps, guidance, decoder)
    chosen = _contenders(opened, request, backend, precision, decoder, threads)
    budget = 0.8 * (memory_bytes() or float("inf")) / 1e9
    events, done = len(chosen) * (2 + 2 * repeat), 0
    with Bar() as bar:

        def show(name: str, what: str) -> None:
            nonlocal done
            bar.update(f"{name}: {what}", min(done / events, 1.0))
            done += 1

        with Rounds(chosen, request.as_dict(), budget, show) as rounds:
            for number in range(repeat):
                rounds.run(number)
        bar.update("done", 1.0)
    if json_file is not None:
        _write(json_file, opened, request, rounds.results)
    results = {name: result for name, result in rounds.results.items() if result.samples}
    if results:
        clip = f"{request.frames} frames of {request.width}x{request.height}, {steps} steps, guidance {guidance:g}"
        print_table(_table(clip, results))
        typer.echo(LEGEND.format(rounds=f"{repeat} round{'s' if repeat > 1 else ''}"))
    failed = {name: result.failed for name, result in rounds.results.items() if result.failed}
    for name, reason in failed.items():
        typer.echo(f"{name}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


def _request(
    bundle: "Bundle", size: str | None, frames: int | None, steps: int, guidance: float, decoder: str
) -> "RequestSize":
    """Returns the size of the requests.

    Raises:
        InvalidRequest: the bundle does not allow it.
    """
    from ..benchmarks.harness.measured_requests import RequestSize
    from ..runtime.request import ClipRequest
    from ..runtime.request_checks import check_request

    width, height = parse_size(size)
    request = ClipRequest(
        prompt="",
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        num_frames=frames,
        decoder=decoder,
    )
    checked = check_request(request, bundle.manifest)
    return RequestSize(checked.width, checked.height, checked.frames, steps, guidance)


def _contenders(
    bundle: "Bundle",
    request: "RequestSize",
    backends: list[str] | None,
    precision: str | None,
    decoder: str,
    threads: int | None,
) -> "list[Contender]":
    from ..benchmarks.harness.rounds import Contender
    from ..runtime.backends import BACKENDS, can_run, find_backend
    from ..runtime.format.clip_layout import ClipSize
    from ..runtime.load_options import LoadOptions

    for name in backends or ():
        find_backend(name)
    sizes = bundle.manifest.sizes
    frames = request.frames if request.frames <= sizes.max_frames else sizes.frames  # longer clips take windows
    clip = ClipSize(width=request.width, height=request.height, frames=frames)
    names = list(dict.fromkeys(backends or [name for name in BACKENDS if can_run(bundle, name, precision, clip)]))
    if not names:
        raise BackendError(
            "backend", "none can run here with what the bundle has", "see `sparsectrl-lcm doctor` and `inspect`"
        )
    LoadOptions(precision=precision, threads=threads)  # raises if a value is not allowed
    weights = sum(record.bytes for record in bundle.manifest.files.values()) / 1e9
    return [
        Contender(
            name=name,
            load={
                "bundle": str(bundle.folder),
                "backend": name,
                **({} if precision is None else {"precision": precision}),
                **({} if threads is None or "threads" not in BACKENDS[name].load_options else {"threads": threads}),
            },
            memory_gb=1.2 * weights + 0.5,
            request={"decoder": decoder},
        )
        for name in names
    ]


def _table(title: str, results: "dict[str, Result]") -> "Table":
    """Makes a table with a column for each backend."""
    from rich.table import Table

    from ..benchmarks.harness.rounds import summarize

    heads = [f"{name} {result.loaded['precision'] or ''}".strip() for name, result in results.items()]
    table = Table("", *heads, title=title)
    summaries = [summarize(result.samples) for result in results.values()]
    for label, kind, stage in ROWS:
        cells = [summary.get(kind, {}).get(stage) for summary in summaries]
        if any(cells):
            table.add_row(label, *(_spread(cell) if cell else "-" for cell in cells))
    peaks = [result.peak_bytes for result in results.values()]
    table.add_row("memory, GB", *("-" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks))
    return table


def _spread(seconds: dict[str, float]) -> str:
    """Formats a median with its spread."""
    digits = next((digits for digits, bound in enumerate((100, 10, 1)) if seconds["median"] >= bound), 3)
    median, low, high = (f"{seconds[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} .. {high})"


def _write(path: Path, bundle: "Bundle", request: "RequestSize", results: "dict[str, Result]") -> None:
    """Writes all measurements, with the machine, packages, bundle and request they hold for."""
    import json
    import shlex
    from dataclasses import asdict

    from ..benchmarks.harness.rounds import summarize
    from ..runtime.backends import BACKENDS
    from ..runtime.machine import report_head

    manifest = bundle.manifest
    packages = ["sparsectrl-lcm", "numpy", *(name for record in BACKENDS.values() for name in record.packages)]
    report: dict[str, Any] = {
        **report_head(shlex.join(["sparsectrl-lcm", *sys.argv[1:]]), packages),
        "bundle": {"created_by": manifest.created_by, "sources": manifest.sources},
        "request": request.as_dict(),
        "backends": {
            name: {**asdict(result), "summary": summarize(result.samples)} for name, result in results.items()
        },
    }
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError("json", f"{str(path)!r} cannot be written: {reason_of(error)}") from None
