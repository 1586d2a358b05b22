"""A pipeline that sleeps instead of computing, for measurements of what the service adds: `sleeping_pipeline:load`."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sparsectrl_lcm.runtime.output.clip import Clip

SIDE, FRAMES = 64, 16
SECONDS = 0.2
TIMES = "SLEEPING_TIMES"
"""Variable with a folder: each process writes beginning and end of its sleeps to a file there."""


class SleepingPipeline:
    """Takes `SECONDS` for a clip without motion, or as many seconds as the prompt says: `sleep 3`."""

    backend, precision = "sleep", None

    def __init__(self) -> None:
        sizes = SimpleNamespace(width=SIDE, height=SIDE, frames=FRAMES)
        self.bundle = SimpleNamespace(folder=Path("none"), manifest=SimpleNamespace(sizes=sizes))

    def generate(self, prompt: str, seed: int | None = None, on_frames: Any = None, **_: Any) -> Clip:
        """Returns a grey clip."""
        word, _, seconds = prompt.partition(" ")
        start = time.monotonic()
        time.sleep(float(seconds) if word == "sleep" else SECONDS)
        if folder := os.environ.get(TIMES):
            with Path(folder, str(os.getpid())).open("a") as file:
                file.write(f"{start} {time.monotonic()}\n")
        frames = np.full((FRAMES, SIDE, SIDE, 3), 128, np.uint8)
        if on_frames:
            on_frames(0, frames)
        return Clip(frames=frames, seed=seed or 0, timings={"total": SECONDS})


def load(**_: Any) -> SleepingPipeline:
    """Called by each runner's process."""
    return SleepingPipeline()
