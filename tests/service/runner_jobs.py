"""Jobs for runners, and what comes of them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from sparsectrl_lcm.service.runner import Event, Job, JobFailed, Made, RunnerLost

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


async def failure_of(running: Awaitable[Made]) -> Any:
    with pytest.raises((JobFailed, RunnerLost)) as caught:
        await running
    return caught.value


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
