"""A runner on this machine: keeps one process alive that has the model, and hands it one job after the other."""

import asyncio
import base64
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .child import Child
from .jobs import Job, JobFailed, Made, OnEvent, Preview, RunnerLost, Step

log = logging.getLogger(__package__)

FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
"""Seconds between processes that die before they are ready; the wait doubles."""


@dataclass(slots=True, eq=False)
class _Turn:
    """A call of `run`; without a listener once its result is there."""

    job: Job
    on_event: OnEvent
    result: asyncio.Future[Made]

    def tell(self, event: Step | Preview) -> None:
        if not self.result.done():
            try:
                self.on_event(event)
            except Exception:
                log.exception("The listener of job %s failed", self.job.id)

    def end(self, result: Made | Exception) -> None:
        if self.result.done():
            return
        if isinstance(result, Made):
            self.result.set_result(result)
        else:
            self.result.set_exception(result)


class LocalRunner:
    """A `Runner` whose process is restarted when it crashes or hangs, unless the first ones say that no other can load.

    All methods belong to one event loop. Linux ends the process with the thread that this loop runs in.

    Args:
        pipeline: `module:callable` that makes the pipeline in the process, with the next four as keywords.
        bundle, backend, precision, threads: as `VideoPipeline.load` takes them.
        image_pixels: of the largest keyframe.
        step_seconds: longest silence during a job before the process counts as hung.
        start_seconds: longest time to load.
        work: existing folder for the temporary files of the process; None is the system's.
        nice: how much the process yields to the server, 0 to 19.
    """

    def __init__(
        self,
        *,
        pipeline: str = "sparsectrl_lcm.runtime:VideoPipeline.load",
        bundle: Path | None = None,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        image_pixels: int = 50_000_000,
        step_seconds: float = 600.0,
        start_seconds: float = 900.0,
        work: Path | None = None,
        nice: int = 5,
    ) -> None:
        path = None if bundle is None else str(bundle)
        options = {"bundle": path, "backend": backend, "precision": precision, "threads": threads}
        self._setup = {"pipeline": pipeline, "options": options, "image_pixels": image_pixels, "nice": nice}
        self._step_seconds = step_seconds
        self._start_seconds = start_seconds
        self._work = work
        self._about: dict[str, Any] = {}
        self._problem: str | None = None
        self._refused = asyncio.Event()
        self._child: Child | None = None  # while it is ready
        self._running: _Turn | None = None
        self._waiting: deque[_Turn] = deque()
        self._wake = asyncio.Event()  # a turn has come, or the process has ended
        self._supervisor: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        return self._child is not None

    @property
    def about(self) -> dict[str, Any]:
        """What the process said of itself when it was ready last."""
        return self._about

    @property
    def problem(self) -> str | None:
        """Why there is no model, in one line; None while there is one and until the first attempt has failed."""
        return self._problem

    async def refused(self) -> str:
        """See `Runner.refused`; only before a model was there, since options that worked once may do so again."""
        await self._refused.wait()
        return (self._problem or "").removeprefix("the runner could not load: ")

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
        for turn in (self._running, *self._waiting):
            if turn is not None and turn.job.id == job_id:
                self._cancel(turn)

    def _cancel(self, turn: _Turn) -> None:
        if turn is self._running and self._child is not None:
            self._child.send({"do": "cancel"})
        else:
            turn.end(JobFailed("cancelled", "cancelled while it waited"))

    async def _supervise(self) -> None:
        """Keeps a process alive, until it is known that none can load."""
        wait = FIRST_WAIT
        while True:
            try:
                async with Child.started(self._work) as child:
                    await self._load(child)
                    wait = 0.0
                    await self._serve(child)
            except (RunnerLost, OSError) as error:
                self._problem = str(error)
                if isinstance(error, RunnerLost) and error.kind == "refused" and not self._about:
                    self._stopped = True
                    return self._refused.set()
                log.error("%s; it starts again in %g s", error, wait)
            except Exception as error:
                self._problem = repr(error)
                log.exception("The runner's messages are not understood; it starts again")
            finally:
                self._child = None
            await asyncio.sleep(wait)
            wait = min(max(2 * wait, FIRST_WAIT), LONGEST_WAIT)

    async def _load(self, child: Child) -> None:
        child.send({"do": "load", **self._setup})
        try:
            self._about = (await child.receive(self._start_seconds))["about"]
        except RunnerLost as lost:  # perhaps for ever, so nobody is kept waiting
            self._problem = str(lost)
            for turn in self._waiting:
                turn.end(lost)
            raise
        self._child, self._problem = child, None
        log.info("The runner is ready: %s", self._about)

    async def _serve(self, child: Child) -> None:
        """Hands a process the turns, in order, until it ends."""
        gone = asyncio.create_task(child.wait())
        gone.add_done_callback(lambda _: self._wake.set())
        try:
            while not gone.done():
                if not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                elif not (turn := self._waiting.popleft()).result.done():
                    await self._take(child, turn)
            raise await child.lost()
        finally:
            gone.cancel()

    async def _take(self, child: Child, turn: _Turn) -> None:
        """One turn; the process has finished with it even where the caller has not waited."""
        job = turn.job
        keyframes = [(index, str(path)) for index, path in job.keyframes]
        self._running = turn
        try:
            child.send({"do": "make", "options": job.options, "keyframes": keyframes, "output": str(job.output)})
            result = None
            while result is None:
                result = _event(turn, await child.receive(self._step_seconds))
            turn.end(result)
        except RunnerLost as lost:
            self._child = None
            turn.end(lost)
            raise
        finally:
            self._running = None
            turn.end(_stopped())


def _event(turn: _Turn, message: dict[str, Any]) -> Made | JobFailed | None:
    """Tells the caller what a process says of his job; the result, where it has ended."""
    match message:
        case {"say": "step", **values}:
            turn.tell(Step(**values))
        case {"say": "preview", "index": index, "jpeg": jpeg}:
            turn.tell(Preview(index, base64.b64decode(jpeg)))
        case {"say": "made", **values}:
            return Made(**values)
        case {"say": "failed", "kind": kind, "message": text, **blame}:
            return JobFailed(kind, text, **blame)
    return None


def _stopped() -> RunnerLost:
    return RunnerLost("stopped", "the runner was stopped")
