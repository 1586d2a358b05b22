"""What `generate` prints about a clip, and the error if it cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import OutputError

if TYPE_CHECKING:
    from ..runtime import Clip, VideoPipeline


def summary(clip: "Clip", path: Path, pipeline: "VideoPipeline", reason: str | None = None) -> str:
    """The file, size, seed and backend of a clip, and the seconds of its stages; two lines.

    Args:
        clip: the clip.
        path: its file.
        pipeline: what made it.
        reason: why `auto` chose the backend; None if the user chose it.
    """
    count, height, width, _ = clip.frames.shape
    made_by = " ".join(filter(None, (pipeline.backend, pipeline.precision, reason and f"(auto: {reason})")))
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in clip.timings.items())
    return (
        f"{path}: {count} frame{'s' * (count > 1)} of {width}x{height}, seed {clip.seed}, {made_by}\nseconds: {stages}"
    )


@contextmanager
def seed_told(clip: "Clip") -> Iterator[None]:
    """Adds the seed to an OutputError, so that the clip can be made again."""
    try:
        yield
    except OutputError as error:
        made = f"the clip was made with seed {clip.seed}"
        raise OutputError(error.field, error.reason, "; ".join(filter(None, (error.remedy, made)))) from error
