"""`sparsectrl-lcm batch`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

SHOWN = 10
"""Errors that are printed; all are in the results."""


def batch(
    requests: Annotated[str, typer.Argument(metavar="REQUESTS.jsonl", help="A request on each line; - for stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the clips and results.jsonl.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder with results: make only what is missing or changed.")
    ] = False,
    format: Annotated[str, typer.Option(help="Of the clips: mp4, webm, gif, webp or png (contact sheet).")] = "mp4",
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write no prompt, seed and so on into the files.")
    ] = False,
    bundle: Annotated[
        str | None,
        typer.Option(help="A folder from `export`, with Ray also its URL; the demo bundle by default."),
    ] = None,
    backend: Annotated[str, typer.Option(help="As for `generate`.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BUNDLE", help="Other LoRAs or motion module, for lines that name them; repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="For openvino: CPU (default), GPU or NPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU; one per core by default.")] = None,
    pool: Annotated[str, typer.Option(help="local, or ray: pipelines on a Ray cluster.")] = "local",
    ray_address: Annotated[str, typer.Option(help="Ray's cluster: auto, or HOST:PORT of its head.")] = "auto",
    replicas: Annotated[int, typer.Option(help="Pipelines on Ray.", min=1)] = 1,
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs of a pipeline on Ray; 0: the CPU.", min=0)] = 1.0,
) -> None:
    """Make a clip for each request of a file.

    Exits with 1 if some failed.
    """
    from ..batch.clip_pool import ClipPool, LocalPool
    from ..batch.line_warnings import LineWarnings
    from ..batch.request_lines import Job, WrongLine, read_jobs
    from ..batch.results_file import open_results
    from ..batch.run import run_batch
    from ..runtime import InvalidRequest, VideoPipeline
    from ..runtime.output.writers import ENDINGS
    from ..service.runner.ray_cluster import check_pool_options, threads_of
    from .clips_bar import ClipsBar
    from .ctrl_c import interruptible
    from .options import parse_weights

    ending = f".{format.lower()}"
    if ending not in ENDINGS:
        allowed = ", ".join(name.removeprefix(".") for name in ENDINGS)
        raise InvalidRequest("format", f"{format!r} is not allowed", f"give {allowed}")
    of_ray = {"ray_address": ray_address, "replicas": replicas, "gpus_per_replica": gpus_per_replica}
    check_pool_options(pool, of_ray)
    options: dict[str, Any] = {"backend": backend, "precision": precision, "device": device, "threads": threads}
    options["weights"] = parse_weights(weights or ())
    in_file = requests != "-" and Path(requests).is_file()  # a pipe can be read only once
    pictures = Path(requests).parent if in_file else Path()

    def jobs(lines: BinaryIO) -> Iterator[Job | WrongLine]:
        return read_jobs(lines, pictures, output, ending, metadata=not no_metadata)

    with interruptible(), _lines(requests) as lines, open_results(output, resume=resume) as results:
        clips: ClipPool
        if pool == "ray":
            from ..batch.ray_pipelines import RayPipelines

            options["threads"] = threads_of(gpus_per_replica, threads)
            clips = RayPipelines(ray_address, replicas, gpus_per_replica, bundle, options)
        else:
            with _weights_told():
                pipeline = VideoPipeline.load(bundle, **options)
            clips = LocalPool(pipeline)
        total = None
        if in_file:
            with _lines(requests) as again:
                total = sum(isinstance(job, Job) for job in jobs(again))
        warnings = LineWarnings(lambda sentence: typer.echo(sentence, err=True))
        with ClipsBar(total) as bar:
            tally = run_batch(jobs(lines), results, clips, bar.on_fraction, bar.on_end, bar.on_kept, warnings.add)
    for sentence in warnings.others():
        typer.echo(sentence, err=True)
    for sentence in tally.failed[:SHOWN]:
        typer.echo(sentence, err=True)
    if len(tally.failed) > SHOWN:
        more = len(tally.failed) - SHOWN
        typer.echo(f"and {more} more error{'s' if more > 1 else ''}, in {output / 'results.jsonl'}", err=True)
    typer.echo(f"{output}: {tally.made} made, {tally.kept} kept, {len(tally.failed)} failed")
    if tally.failed:
        raise typer.Exit(1)


@contextmanager
def _weights_told() -> Iterator[None]:
    """Says what to do instead if the pipeline cannot get the weights of another bundle."""
    from ..runtime import BackendError

    try:
        yield
    except BackendError as error:
        if error.field != "weights":
            raise
        remedy = "make its clips in a run of its own, with --bundle, or use a GPU and engines from build --refit"
        raise BackendError("weights", error.reason, remedy) from None


@contextmanager
def _lines(requests: str) -> Iterator[BinaryIO]:
    if requests == "-":
        yield sys.stdin.buffer
        return
    from ..runtime import InvalidRequest
    from ..runtime.errors import reason_of

    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(requests).open("rb"))
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            remedy = "name a file with a request on each line, or - for standard input"
            raise InvalidRequest("requests", f"{requests!r} cannot be read: {reason_of(error)}", remedy) from None
        yield file
