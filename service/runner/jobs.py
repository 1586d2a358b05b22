"""What a runner takes and gives; the seam behind which other machines could do the work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FailureKind = Literal["invalid", "failed", "out_of_memory", "cancelled"]
LossKind = Literal["crashed", "hung", "refused", "stopped"]


@dataclass(frozen=True, slots=True)
class Job:
    """A clip to make. All paths are local files.

    Attributes:
        id: names the job for `Runner.cancel`.
        options: keywords of `VideoPipeline.generate`, but for keyframes and callbacks.
        keyframes: frame index and image file of each.
        output: the mp4 to write.
    """

    id: str
    options: dict[str, Any]
    keyframes: tuple[tuple[int, Path], ...]
    output: Path


@dataclass(frozen=True, slots=True)
class Made:
    """A clip that lies at `Job.output`.

    Attributes:
        seed: the seed used.
        seconds: from reading the keyframes to the finished file.
        timings: seconds per stage, as `Clip.timings`.
    """

    seed: int
    seconds: float
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `steps` of `stage` are done, `fraction` of the whole; see `runtime.Progress`."""

    stage: str
    step: int
    steps: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Preview:
    """Frame `index` as a JPEG whose longest side is at most 256 pixels."""

    index: int
    jpeg: bytes = field(repr=False)


OnEvent = Callable[[Step | Preview], None]
"""Called on the event loop, in order; what it raises is logged."""


class JobFailed(Exception):
    """The job has ended without a clip; the runner goes on.

    Attributes:
        kind: invalid (the job's own fault), failed, out_of_memory or cancelled.
        field: the option that is to blame, where it is known.
        keyframe: the position in `Job.keyframes` of the image that is to blame, if any.
    """

    def __init__(
        self, kind: FailureKind, message: str, *, field: str | None = None, keyframe: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.field = field
        self.keyframe = keyframe


class RunnerLost(Exception):
    """The process is gone, and the job with it; the runner starts another process unless it was stopped.

    Attributes:
        kind: crashed, hung, stopped, or refused: it cannot load, for a reason that the next process would meet again.
        message: how it ended, in one line.
        lines: what it printed last, for logs.
    """

    def __init__(self, kind: LossKind, message: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.lines = lines


class Runner(Protocol):
    """Makes clips, one at a time."""

    async def start(self) -> None:
        """Begins to load the model, and returns at once."""

    async def stop(self) -> None:
        """Ends everything at once; jobs end with `RunnerLost("stopped")`."""

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""

    @property
    def problem(self) -> str | None:
        """Why there is no model, in one line; None while there is one and until the first attempt has failed."""

    @property
    def about(self) -> dict[str, Any]:
        """backend, precision, width, height, frames, fps, bundle and pid; empty until it was ready once."""

    async def refused(self) -> str:
        """Waits until it is known that there will be no model, since the options are wrong; why, in one line."""

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip; later calls wait their turn. Cancelling the task cancels the job.

        Raises:
            JobFailed: there is no clip, and the job or chance is to blame.
            RunnerLost: the process has died, was killed, or could not load.
        """

    def cancel(self, job_id: str) -> None:
        """Ends a job with `JobFailed("cancelled")`: at its next step, or now if it waits. Unknown ids are ignored."""
