"""An executor without a model: its frames are one colour that the seed gives. Pipelines around it check requests."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.progress import Stages


class QuickExecutor:
    """Makes clips at once.

    Args:
        at_step: called with each request at its one step; what it raises ends the request.
    """

    backend, precision = "quick", "fp32"

    def __init__(self, at_step: Callable[[CheckedRequest], None] = lambda _: None) -> None:
        self.at_step = at_step

    def run(
        self, request: CheckedRequest, on_progress: Any, on_frames: Any = None, on_preview: Any = None
    ) -> tuple[Any, dict[str, float]]:
        stages = Stages({"denoise": 1}, on_progress)
        with stages.timed("total"), stages.stage("denoise"):
            self.at_step(request)
            stages.report("denoise", 1)
        frames = np.full((request.frames, request.height, request.width, 3), request.seed % 251, np.uint8)
        for keyframe in request.keyframes:
            frames[keyframe.index] = keyframe.pixels
        if on_frames:
            on_frames(0, frames)
        return frames, stages.timings

    def refit(self, weights: Bundle | None) -> None:
        """Takes any weights, which change nothing."""

    check_refit = refit

    def in_one_piece(self, size: object) -> bool:
        return True

    def close(self) -> None:
        pass


def quick_pipeline(at_step: Callable[[CheckedRequest], None] = lambda _: None, weights: Any = None) -> VideoPipeline:
    return VideoPipeline(Bundle.load(), QuickExecutor(at_step), weights)  # type: ignore[arg-type]
