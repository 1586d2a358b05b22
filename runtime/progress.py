"""The progress of a request, and the seconds of its stages."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Cancelled


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a request: `step` of `steps` of `stage` are done, and `fraction` of the whole.

    A stage (load, text, keyframes, control, denoise, decode) begins with step 0. A stage whose result was kept from an
    earlier request is left out. So is `control` if SparseCtrl runs step by step within `denoise`.
    """

    stage: str
    step: int
    steps: int
    fraction: float


OnProgress = Callable[[Progress], Any]
"""Called at the start of each stage and after each unit of its work; returning False cancels the request."""

OnFrames = Callable[[int, NDArray[np.uint8]], Any]
"""Called with the index of the first frame and frames [n, H, W, 3], in order, as they are decoded."""

OnPreview = Callable[[int, int, NDArray[np.uint8]], Any]
"""Called after each step with the step, from 1, the index of a frame, and uint8 [h, w, 3]: this frame as predicted."""


class Stages:
    """The stages of one request: reports, cancellation and seconds per stage.

    Args:
        steps: units of work of each stage, in order.
        on_progress: the caller's callback.
    """

    def __init__(self, steps: Mapping[str, int], on_progress: OnProgress | None) -> None:
        self._steps = dict(steps)
        self._on_progress = on_progress
        self.timings: dict[str, float] = {}

    def report(self, stage: str, step: int) -> None:
        """Reports how many units of a stage are done.

        Raises:
            Cancelled: the callback returned False.
        """
        if self._on_progress is None:
            return
        names = list(self._steps)
        before = sum(self._steps[name] for name in names[: names.index(stage)])
        progress = Progress(stage, step, self._steps[stage], (before + step) / sum(self._steps.values()))
        if self._on_progress(progress) is False:
            raise Cancelled("", f"cancelled after {stage} {step} of {self._steps[stage]}")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Reports the start of a stage, and adds the seconds of the block to it."""
        self.report(name, 0)
        with self.timed(name):
            yield

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage."""
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Adds seconds to a stage."""
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds
