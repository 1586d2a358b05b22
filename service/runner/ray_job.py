"""A job on a Ray cluster: follows what the replica says that has taken it."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .interface import Job, JobFailed, LossKind, Made, OnEvent, RunnerLost
from .messages import event_of, notify

END_SECONDS = 5.0
"""Longest wait for the end of a stream whose last message has come."""


class RayJob:
    """A job and the messages of its replica.

    Args:
        job, on_event: as `Runner.run` takes them.
        stream: what `ClipReplica.make` yields.

    Attributes:
        cancelled: whether the job was cancelled.
        runner: name of the replica, as `RayPool.runners` has it; empty until the replica has said it.
    """

    def __init__(self, job: Job, on_event: OnEvent, stream: Any) -> None:
        self.stream = stream
        self.cancelled = False
        self.runner = ""
        self._node = ""
        self._job = job
        self._on_event = on_event

    async def follow(self, longest_wait: float, silence: float) -> Made:
        """Passes events on until the clip is made.

        Args:
            longest_wait: for a replica.
            silence: longest silence of the replica.

        Raises:
            JobFailed, RunnerLost: as `Runner.run`.
            Exception: Ray's, of many classes.
        """
        try:
            async with asyncio.timeout(longest_wait):
                messages = await anext(self.stream)
        except TimeoutError:  # not the fault of the job, which waits again
            raise RunnerLost("stopped", f"no replica took the job for {longest_wait:g} s") from None
        self.runner, self._node = messages[0]["runner"], messages[0]["node"]
        while (made := await self._hear(messages)) is None:
            try:
                async with asyncio.timeout(silence):
                    messages = await anext(self.stream)
            except TimeoutError:
                raise self.lost("hung", f"said nothing for {silence:g} s") from None
        return made

    async def _hear(self, messages: list[dict[str, Any]]) -> Made | None:
        for message in messages:
            if (clip := message.pop("clip", None)) is not None:
                await asyncio.to_thread(self._job.output.write_bytes, clip)
            event = event_of(message)
            if isinstance(event, Made | JobFailed):
                await self._exhaust()
            if isinstance(event, Made):
                return replace(event, runner=self.runner)
            if isinstance(event, JobFailed):
                raise event
            if event is not None:
                notify(self._job, event, self._on_event)
        return None

    async def _exhaust(self) -> None:
        """Waits until the replica has left the job: only then does Ray Serve give it another one."""
        with suppress(Exception):
            async with asyncio.timeout(END_SECONDS):
                async for _ in self.stream:
                    pass

    def lost(self, kind: LossKind, how: str) -> RunnerLost:
        """Returns the error if the replica is lost."""
        return RunnerLost(kind, f"the replica {f'on {self._node} ' if self._node else ''}{how}", runner=self.runner)
