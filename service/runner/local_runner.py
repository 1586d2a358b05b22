"""One runner: keeps a process with the model running and gives it a job whenever the pipeline is free."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import SparseCtrlLcmError
from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, RunnerLost
from .messages import event_of, notify
from .process_handle import RunnerProcess

log = logging.getLogger(__package__)

FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
"""First and longest wait, in seconds, after a process that died before it was ready; the wait doubles."""


@dataclass(slots=True, eq=False)
class _Turn:
    """A call of `run`. Its listener is not called after the result is set.

    Attributes:
        heard_at: when the process said something of the job or got it, in the loop's time.
        alone: whether the process may have no other job meanwhile.
        cancelled: whether the job was cancelled.
    """

    job: Job
    on_event: OnEvent
    result: asyncio.Future[Made]
    heard_at: float = 0.0
    alone: bool = False
    cancelled: bool = False

    def notify(self, event: Event) -> None:
        if not self.result.done():
            notify(self.job, event, self.on_event)

    def end(self, result: Made | Exception) -> None:
        if self.result.done():
            return
        if isinstance(result, Made):
            self.result.set_result(result)
        else:
            self.result.set_exception(result)


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
        self._waiting: deque[_Turn] = deque()
        self._begun: dict[int, _Turn] = {}  # by number: the one that has the pipeline, and one that is encoded
        self._running: _Turn | None = None  # has the pipeline
        self._number = 0
        self._wake = asyncio.Event()  # a turn has come or ended, the pipeline is free, or the process has ended
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
        for turn in self._waiting:
            turn.end(_stopped())

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip; see `Runner.run`."""
        if self._stopped:
            raise _stopped()
        turn = _Turn(job, on_event, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        self._wake.set()
        try:
            return await turn.result
        except asyncio.CancelledError:
            self._cancel(turn)
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)

    def cancel(self, job_id: str) -> None:
        """Ends a job with `JobFailed("cancelled")`; see `Runner.cancel`."""
        for turn in (*self._begun.values(), *self._waiting):
            if turn.job.id == job_id:
                self._cancel(turn)

    def _cancel(self, turn: _Turn) -> None:
        turn.cancelled = True
        number = next((number for number, begun in self._begun.items() if begun is turn), None)
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
            for turn in self._waiting:
                turn.end(lost)
            raise
        self._process, self._problem = process, None
        log.info("The runner is ready: %s", self._about)

    async def _serve(self, process: RunnerProcess) -> None:
        """Runs the turns in order in a process, until the process ends."""
        listener = asyncio.create_task(self._listen(process))
        listener.add_done_callback(lambda _: self._wake.set())
        try:
            while not listener.done():
                self._wake.clear()
                self._begin_next(process)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._end_of_silence):
                        await self._wake.wait()
                if (end := self._end_of_silence) is not None and end <= _now():
                    raise process.hung(self._step_seconds)
            await listener
        except RunnerLost as lost:
            self._process = None
            self._lose_jobs(lost)
            raise
        finally:
            listener.cancel()
            for turn in self._begun.values():
                turn.end(_stopped())
            self._begun, self._running = {}, None

    @property
    def _end_of_silence(self) -> float | None:
        """When the process counts as hung unless it says something of the job that has been silent longest."""
        return min((turn.heard_at + self._step_seconds for turn in self._begun.values()), default=None)

    def _lose_jobs(self, lost: RunnerLost) -> None:
        """Ends the job that the process died of. If it had two, puts both first in the queue, to be made alone."""
        turns, self._begun = list(self._begun.values()), {}
        for turn in reversed(turns):
            if len(turns) == 1 or not turn.job.retry:
                turn.end(lost)
            elif turn.cancelled:
                turn.end(JobFailed("cancelled", "cancelled when its process died"))
            else:
                turn.alone = True
                self._waiting.appendleft(turn)

    def _begin_next(self, process: RunnerProcess) -> None:
        """Gives the process the next turn, if its pipeline is free. It finishes it even if the caller has left."""
        while self._waiting and self._running is None and not process.ended:
            turn = self._waiting[0]
            if any(turn.alone or begun.alone for begun in self._begun.values()):
                return
            self._waiting.popleft()
            if turn.result.done():
                continue
            job = turn.job
            self._number += 1
            self._begun[self._number] = self._running = turn
            turn.heard_at = _now()
            keyframes = [(index, str(path)) for index, path in job.keyframes]
            files = {"keyframes": keyframes, "output": str(job.output), "fps": job.fps}
            order = {"options": job.options, "previews": job.previews, **files}
            process.send({"do": "make", "job": self._number, **order})

    async def _listen(self, process: RunnerProcess) -> None:
        """Passes on what the process says, until it ends."""
        while True:
            message = await process.receive(None)
            number, event = message.pop("job"), event_of(message)
            turn = self._begun[number]
            turn.heard_at = _now()
            if isinstance(event, Made | JobFailed):
                del self._begun[number]
                turn.end(event)
            elif event is not None:
                turn.notify(event)
            if isinstance(event, Encoding | Made | JobFailed):
                if turn is self._running:
                    self._running = None
                self._wake.set()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _stopped() -> RunnerLost:
    return RunnerLost("stopped", "the runner was stopped")
