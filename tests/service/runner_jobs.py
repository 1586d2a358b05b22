"""Jobs for runners, and what comes of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from sparsectrl_lcm.service.runner import Event, Job, JobFailed, Made, RunnerLost, local_runner

from .waiting import SECONDS


def job(folder: Path, prompt: str = "a boat", name: str = "job", **more: Any) -> Job:
    keyframes = more.pop("keyframes", ())
    return Job(name, {"prompt": prompt, "seed": 7, **more}, keyframes, folder / f"{name}.mp4")


def ignore(_: Event) -> None:
    pass


async def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@contextmanager
def held_starts() -> Iterator[None]:
    """Lets no runner start a process within the block, so that what a lost one leaves can be seen."""
    held, started = True, local_runner.RunnerProcess.started

    @asynccontextmanager
    async def later(work: Path | None) -> AsyncIterator[Any]:
        await until(lambda: not held)
        async with started(work) as process:
            yield process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_runner.RunnerProcess, "started", later)
        try:
            yield
        finally:
            held = False


async def failure_of(running: Awaitable[Made]) -> Any:
    with pytest.raises((JobFailed, RunnerLost)) as caught:
        await running
    return caught.value


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
