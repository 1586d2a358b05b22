"""Clips of one prompt with several seeds, and a contact sheet of all."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..runtime.errors import InvalidRequest
from ..runtime.field_checks import integer
from ..runtime.loop.noise import MAX_SEED
from ..runtime.output.contact_sheet import clip_row, stacked
from ..runtime.output.metadata import as_text
from ..runtime.output.writers import complete_file, save_sheet
from ..runtime.request import random_seed
from .clip_reports import seed_told, summary
from .progress_bar import Bar

if TYPE_CHECKING:
    from ..runtime import ClipRequest, VideoPipeline

MAX_SEEDS = 100
"""Most clips of one `generate`."""


def seed_requests(request: "ClipRequest", count: int) -> list["ClipRequest"]:
    """The request with `count` seeds: its own, or a random one if it has none, and the numbers that follow.

    Raises:
        InvalidRequest: `count` is not 1 to `MAX_SEEDS`, or a seed that follows is too large.
    """
    first = random_seed() if request.seed is None else request.seed
    last = first + integer("seeds", count, 1, MAX_SEEDS) - 1
    if first <= MAX_SEED < last:
        reason = f"{count} seeds from {first} on end at {last}"
        raise InvalidRequest("seeds", reason, f"the last may be {MAX_SEED}")
    return [replace(request, seed=seed) for seed in range(first, last + 1)]


def seed_outputs(output: Path, requests: Sequence["ClipRequest"]) -> list[Path]:
    """A file or folder for each seed, and the contact sheet: `clip.mp4` gives `clip-seed42.mp4` and `clip-seeds.png`.

    Raises:
        InvalidRequest: `output` has no name.
    """
    if not output.name:
        raise InvalidRequest("output", f"{str(output)!r} has no name for the clips", "give one, such as clip.mp4")
    clips = [output.with_name(f"{output.stem}-seed{request.seed}{output.suffix}") for request in requests]
    return [*clips, output.with_name(f"{output.stem}-seeds.png")]


def generate_seeds(
    pipeline: "VideoPipeline",
    requests: Sequence["ClipRequest"],
    output: Path,
    fps: float,
    reason: str | None,
    *,
    metadata: bool,
) -> None:
    """Makes a clip for each request, and a contact sheet with a row for each; `seed_outputs` names the files.

    `reason` is as for `summary`.

    Raises:
        InvalidRequest, OutputError, BackendError: of the first clip that fails; those before it are saved and reported.
    """
    *outputs, sheet = seed_outputs(output, requests)
    summaries, rows = [], []
    try:
        with Bar() as bar, closing(pipeline.generate_many(requests, bar.of_many(len(requests)))) as results:
            for path, result in zip(outputs, results, strict=True):
                clip = result.get()
                with seed_told(clip):
                    clip.save(path, fps, metadata=metadata)
                summaries.append(summary(clip, path, pipeline, reason))
                rows.append(clip_row(clip))
    finally:  # after the bar has ended
        for text in summaries:
            typer.echo(text)
    of_all = {**clip.metadata, "seed": [request.seed for request in requests]} if metadata else {}
    with complete_file(sheet) as part:
        save_sheet(stacked(rows), part, as_text(of_all))
    typer.echo(f"{sheet}: up to eight frames of each")
