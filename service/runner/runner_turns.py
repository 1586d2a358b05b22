"""The jobs of one runner: those that wait, the one that has the pipeline, and the one that is encoded meanwhile."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, RunnerLost
from .messages import event_of, notify


@dataclass(slots=True, eq=False)
class Turn:
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
        """Tells the caller of an event."""
        if not self.result.done():
            notify(self.job, event, self.on_event)

    def end(self, result: Made | Exception) -> None:
        """Sets the result, unless the turn has ended."""
        if self.result.done():
            return
        if isinstance(result, Made):
            self.result.set_result(result)
        else:
            self.result.set_exception(result)


class Turns:
    """The turns of a runner, in order. A process has one that needs the pipeline and one that is encoded, at most.

    Attributes:
        changed: set when a turn has come or ended, or the pipeline is free.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._waiting: deque[Turn] = deque()
        self._begun: dict[int, Turn] = {}  # what the process has, by number
        self._at_pipeline: Turn | None = None
        self._number = 0

    def add(self, job: Job, on_event: OnEvent) -> Turn:
        """Adds a turn at the end."""
        turn = Turn(job, on_event, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        self.changed.set()
        return turn

    def leave(self, turn: Turn) -> None:
        """Removes a turn that its caller no longer waits for, unless the process has it and finishes it."""
        with suppress(ValueError):
            self._waiting.remove(turn)

    def of_job(self, job_id: str) -> list[Turn]:
        """Returns the turns of a job."""
        return [turn for turn in (*self._begun.values(), *self._waiting) if turn.job.id == job_id]

    def number_of(self, turn: Turn) -> int | None:
        """Returns the number under which the process has a turn; None if it waits."""
        return next((number for number, begun in self._begun.items() if begun is turn), None)

    @property
    def silent_since(self) -> float | None:
        """When the process last spoke of the job that has been silent longest; None if it has none."""
        return min((turn.heard_at for turn in self._begun.values()), default=None)

    def begin_next(self) -> tuple[int, Job] | None:
        """Takes the next turn for the process, if the pipeline is free. Returns its number and job."""
        while self._waiting and self._at_pipeline is None:
            turn = self._waiting[0]
            if any(turn.alone or begun.alone for begun in self._begun.values()):
                return None
            self._waiting.popleft()
            if not turn.result.done():
                self._number += 1
                self._begun[self._number] = self._at_pipeline = turn
                turn.heard_at = _now()
                return self._number, turn.job
        return None

    def hear(self, message: dict[str, Any]) -> None:
        """Passes on what the process says of a turn."""
        number, event = message.pop("job"), event_of(message)
        turn = self._begun[number]
        turn.heard_at = _now()
        if isinstance(event, Made | JobFailed):
            del self._begun[number]
            turn.end(event)
        elif event is not None:
            turn.notify(event)
        if isinstance(event, Encoding | Made | JobFailed):
            if turn is self._at_pipeline:
                self._at_pipeline = None
            self.changed.set()

    def lose_begun(self, lost: RunnerLost) -> None:
        """Ends the turn of a process that died. If it had two, puts both first in the queue, to be made alone."""
        turns, self._begun = list(self._begun.values()), {}
        for turn in reversed(turns):
            if len(turns) == 1 or not turn.job.retry:
                turn.end(lost)
            elif turn.cancelled:
                turn.end(JobFailed("cancelled", "cancelled when its process died"))
            else:
                turn.alone = True
                self._waiting.appendleft(turn)

    def end_begun(self, error: Exception) -> None:
        """Ends the turns that the process has; the pipeline is free for those of another one."""
        for turn in self._begun.values():
            turn.end(error)
        self._begun, self._at_pipeline = {}, None

    def end_waiting(self, error: Exception) -> None:
        """Ends the turns that wait."""
        for turn in self._waiting:
            turn.end(error)


def _now() -> float:
    return asyncio.get_running_loop().time()
