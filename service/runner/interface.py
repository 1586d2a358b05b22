"""The interface of a runner: jobs, events and results. An implementation may use other machines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ...runtime.errors import BackendError, BundleError, InvalidRequest, SparseCtrlLcmError, message

FailureKind = Literal["invalid", "failed", "out_of_memory", "disk_full", "cancelled"]
LossKind = Literal["crashed", "hung", "refused", "stopped"]
REFUSALS: dict[str, type[SparseCtrlLcmError]] = {
    kind.__name__: kind for kind in (InvalidRequest, BackendError, BundleError)
}
"""Errors that keep every process from loading, by the names that the process sends."""


@dataclass(frozen=True, slots=True)
class Job:
    """A clip to make. All paths are local files.

    Attributes:
        id: identifies the job for `Runner.cancel`.
        options: keywords of `VideoPipeline.generate`, except keyframes and callbacks.
        keyframes: frame index and image file of each.
        output: the file to write, in the format of its ending.
        conditioning: equal for jobs that share what `VideoPipeline` keeps for the next seed: text and residuals.
        previews: whether to send previews: after each step, and of each part of the frames when it is decoded.
        fps: frames per second of the file.
        place: URL of an object store and name of the object that the clip is to become. A runner on another machine may
            write it there itself instead of to `output`. None if the store is not the same on every machine.
        retry: whether the runner may make the clip again if its process dies and another clip may be the cause.
    """

    id: str
    options: dict[str, Any]
    keyframes: tuple[tuple[int, Path], ...]
    output: Path
    conditioning: str = ""
    previews: bool = False
    fps: float = 8.0
    place: tuple[str, str] | None = None
    retry: bool = True

    @property
    def weights(self) -> str | None:
        """Name of the weights that it needs; None means those of the bundle."""
        return self.options.get("weights")


@dataclass(frozen=True, slots=True)
class Made:
    """A clip, which is at `Job.output`, or at `Job.place`.

    Attributes:
        seed: the seed used.
        seconds: time from reading the keyframes to the finished file.
        timings: seconds per stage, as `Clip.timings`.
        frames: how many it has.
        runner: name of the runner that made it.
        stored: bytes of the clip if it is at `Job.place`.
    """

    seed: int
    seconds: float
    timings: dict[str, float]
    frames: int
    runner: str = ""
    stored: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Progress: `step` of `steps` of `stage` are done, and `fraction` of the whole; see `runtime.Progress`."""

    stage: str
    step: int
    steps: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Preview:
    """Frame `index` as a JPEG whose longest side is at most 256 pixels."""

    index: int
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Encoding:
    """All frames are made: the runner can take the next job while it encodes this clip. Not every runner does."""


Event = Step | Preview | Encoding
OnEvent = Callable[[Event], None]
"""Called on the event loop, in order. Its exceptions are logged."""


class JobFailed(Exception):
    """A job has ended without a clip. The runner goes on.

    Attributes:
        kind: invalid (an error in the job itself), failed, out_of_memory, disk_full or cancelled.
        message: why, in one line, without the option's name.
        field: the option at fault, if known.
        keyframe: if an image is at fault, its position in `Job.keyframes`.
    """

    def __init__(
        self, kind: FailureKind, reason: str, *, field: str | None = None, keyframe: int | None = None
    ) -> None:
        super().__init__(message(field or "", reason))
        self.kind = kind
        self.message = reason
        self.field = field
        self.keyframe = keyframe


class RunnerLost(Exception):
    """A job has ended with its process, or found none. The runner starts another process unless it was stopped.

    Attributes:
        kind: crashed, hung, refused if neither this process nor another can load the model, or stopped: the runner was
            stopped or had no process for the job, so nothing is wrong with the job or a process.
        message: how the process ended, in one line.
        lines: the last lines that it printed, for logs.
        refusal: if refused, the error that keeps every process from loading.
        runner: name of the runner; empty if it is not known.
    """

    def __init__(
        self,
        kind: LossKind,
        message: str,
        lines: tuple[str, ...] = (),
        refusal: SparseCtrlLcmError | None = None,
        runner: str = "",
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.lines = lines
        self.refusal = refusal
        self.runner = runner

    def of(self, runner: str) -> "RunnerLost":
        """Returns the same with the name of its runner."""
        return RunnerLost(self.kind, self.message, self.lines, self.refusal, runner)


RunnerState = Literal["loading", "ready", "busy", "failed"]


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One of the runners, for operators.

    Attributes:
        name: its device or number.
        state: loading, ready, busy (with a job), or failed: it starts again, or its `problem` says why it cannot.
        problem: why no model is loaded, in one line.
    """

    name: str
    state: RunnerState
    problem: str | None = None


class Runner(Protocol):
    """Makes clips: as many at once as it has models loaded."""

    async def start(self) -> None:
        """Begins to load the models and returns at once."""

    async def stop(self) -> None:
        """Ends everything at once. Jobs end with `RunnerLost("stopped")`."""

    @property
    def capacity(self) -> int:
        """How many jobs may run at once, besides those that are encoded. 0 while no model is loaded."""

    @property
    def problem(self) -> str | None:
        """Why no model is loaded, in one line. None while one is loaded, and until a first attempt has failed."""

    @property
    def about(self) -> dict[str, Any]:
        """backend, precision, width, height, frames, fps, bundle and pid. Empty until a model has loaded once."""

    @property
    def runners(self) -> list[RunnerStatus]:
        """The state of each runner."""

    async def refused(self) -> SparseCtrlLcmError:
        """Returns the error in the options once it is certain that it keeps every process from loading a model."""

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip. Calls beyond the capacity wait their turn. Cancelling the task cancels the job.

        Raises:
            JobFailed: the job failed, but its process goes on.
            RunnerLost: its process died, was killed, or could not load.
        """

    def cancel(self, job_id: str) -> None:
        """Ends a job with `JobFailed("cancelled")`: at once if it waits, else at its next step. Ignores unknown ids."""
