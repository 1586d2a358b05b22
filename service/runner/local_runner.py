"""One runner: keeps a process with the model running and gives it a job whenever the pipeline is free."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...runtime.errors import SparseCtrlLcmError
from .interface import Job, JobFailed, Made, OnEvent, RunnerLost
from .process_handle import RunnerProcess
from .runner_turns import Turn, Turns

log = logging.getLogger(__package__)

FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
"""First and longest wait, in seconds, after a process that died before it was ready; the wait doubles."""


class LocalRunner:
    """Makes clips in a process that it starts again after a crash or a hang: one, while the one before is encoded.

    If a process with two jobs dies, either may be the cause: both are made again, each alone in the process.

    Its methods and properties are those of `Runner`, of which `RunnerPool` makes one.

    If wrong options keep the first process from loading, it starts no other.
    All methods belong to one event loop. On Linux the process ends with the thread that runs this loop.

    Args:
        pipeline: `module:callable` that creates the pipeline in the process; gets the next nine options as keywords.
        bundle, backend, precision, threads: as `VideoPipeline.load` takes them.
        device: what it computes on, as `take_device` takes it.
        place, runners: number of this runner and how many share the machine; see `share_cores`.
        warm: width and height to warm up for.
        weights: other bundles by the names that jobs give.
        image_pixels: pixels of the largest keyframe.
        step_seconds: longest silence during a job; after that the process counts as hung.
        start_seconds: longest time to load.
        work: existing folder for the temporary files of the process; None means the system's.
        nice: niceness of the process, 0 to 19; the server has 0.
    """

    def __init__(
        self,
        *,
        pipeline: str = "sparsectrl_lcm.service.runner.pipeline_loading:load",
        bundle: Path | str | None = None,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        place: int = 0,
        runners: int = 1,
        warm: tuple[int, int] | None = None,
        weights: Mapping[str, Path | str] | None = None,
        image_pixels: int = 50_000_000,
        step_seconds: float = 600.0,
        start_seconds: float = 900.0,
        work: Path | None = None,
        nice: int = 5,
    ) -> None:
        path = None if bundle is None else str(bundle)
        loading = {"bundle": path, "backend": backend, "precision": precision, "threads": threads}
        share = {"device": device, "place": place, "runners": runners, "warm": warm}
        options = {**loading, **share, "weights": {name: str(folder) for name, folder in (weights or {}).items()}}
        self._setup = {"pipeline": pipeline, "options": options, "image_pixels": image_pixels, "nice": nice}
        self._step_seconds = step_seconds
        self._start_seconds = start_seconds
        self._work = work
        self._about: dict[str, Any] = {}
        self._problem: str | None = None
        self._refused = asyncio.Event()
        self._refusal: SparseCtrlLcmError | None = None
        self._process: RunnerProcess | None = None  # None unless it is ready
        self._turns = Turns()
        self._supervisor: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        return self._process is not None

    @property
    def about(self) -> dict[str, Any]:
        """See `Runner.about`: what the process reported when it was last ready."""
        return self._about

    @property
    def problem(self) -> str | None:
        """See `Runner.problem`."""
        return self._problem

    async def refused(self) -> SparseCtrlLcmError:
        """See `Runner.refused`. Never returns once a model has loaded: options that worked may work again."""
        await self._refused.wait()
        assert self._refusal is not None
        return self._refusal

    async def start(self) -> None:
        """Begins to load the model, and returns at once."""
        self._stopped = False
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="runner")

    async def stop(self) -> None:
        """Kills the process and ends all jobs with `RunnerLost("stopped")`."""
        self._stopped = True
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait({supervisor})
        self._turns.end_waiting(_stopped())

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip; see `Runner.run`."""
        if self._stopped:
            raise _stopped()
        turn = self._turns.add(job, on_event)
        try:
            return await turn.result
        except asyncio.CancelledError:
            self._cancel(turn)
            raise
        finally:
            self._turns.leave(turn)

    def cancel(self, job_id: str) -> None:
        """Ends a job with `JobFailed("cancelled")`; see `Runner.cancel`."""
        for turn in self._turns.of_job(job_id):
            self._cancel(turn)

    def _cancel(self, turn: Turn) -> None:
        turn.cancelled = True
        number = self._turns.number_of(turn)
        if number is not None and self._process is not None:
            self._process.send({"do": "cancel", "job": number})
        else:
            turn.end(JobFailed("cancelled", "cancelled while it waited"))

    async def _supervise(self) -> None:
        """Keeps a process running, until it is certain that none can load."""
        wait = FIRST_WAIT
        while True:
            try:
                async with RunnerProcess.started(self._work) as process:
                    await self._load(process)
                    wait = 0.0
                    await self._serve(process)
            except (RunnerLost, OSError) as error:
                self._problem = str(error)
                if isinstance(error, RunnerLost) and error.refusal is not None and not self._about:
                    self._stopped, self._refusal = True, error.refusal
                    return self._refused.set()
                log.error("%s; it starts again in %g s", error, wait)
            except Exception as error:
                self._problem = repr(error)
                log.exception("The runner's messages are not understood; it starts again")
            finally:
                self._process = None
            await asyncio.sleep(wait)
            wait = min(max(2 * wait, FIRST_WAIT), LONGEST_WAIT)

    async def _load(self, process: RunnerProcess) -> None:
        process.send({"do": "load", **self._setup})
        try:
            self._about = (await process.receive(self._start_seconds))["about"]
        except RunnerLost as lost:  # the next attempts may fail too, so nobody has to wait for them
            self._problem = str(lost)
            self._turns.end_waiting(lost)
            raise
        self._process, self._problem = process, None
        log.info("the runner is ready", extra=self._about)

    async def _serve(self, process: RunnerProcess) -> None:
        """Gives the process the turns in order, until it ends."""
        turns, listener = self._turns, asyncio.create_task(self._listen(process))
        listener.add_done_callback(lambda _: turns.changed.set())
        try:
            while not listener.done():
                turns.changed.clear()
                if not process.ended and (begun := turns.begin_next()) is not None:
                    process.send(_order(*begun))
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._end_of_silence):
                        await turns.changed.wait()
                if (end := self._end_of_silence) is not None and end <= asyncio.get_running_loop().time():
                    raise process.hung(self._step_seconds)
            await listener
        except RunnerLost as lost:
            self._process = None
            turns.lose_begun(lost)
            raise
        finally:
            listener.cancel()
            turns.end_begun(_stopped())

    @property
    def _end_of_silence(self) -> float | None:
        """When the process counts as hung unless it says something of the job that has been silent longest."""
        since = self._turns.silent_since
        return None if since is None else since + self._step_seconds

    async def _listen(self, process: RunnerProcess) -> None:
        """Passes on what the process says, until it ends."""
        while True:
            self._turns.hear(await process.receive(None))


def _order(number: int, job: Job) -> dict[str, Any]:
    """Returns the message that gives the process a job."""
    keyframes = [(index, str(path)) for index, path in job.keyframes]
    files = {"keyframes": keyframes, "output": str(job.output), "fps": job.fps}
    return {"do": "make", "job": number, "options": job.options, "previews": job.previews, **files}


def _stopped() -> RunnerLost:
    return RunnerLost("stopped", "the runner was stopped")
