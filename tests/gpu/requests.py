"""Requests for the demo bundle."""

from typing import Any

import numpy as np
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

LEVELS = 3.0
"""Limit for the mean difference between the frames of two backends, in levels of 255."""
MOST_LEVELS = 60
"""Limit for their largest difference. An edge of a shape that moves by a pixel is further off than rounding."""


def ask(pipeline: VideoPipeline, controlnet: str | None = "scribble", seed: int = 1, **options: Any) -> np.ndarray:
    """Generates the frames of a clip with three keyframes, or without keyframes if `controlnet` is None."""
    options = {"prompt": "a red circle moves", "negative_prompt": "a blue square", "num_inference_steps": 4, **options}
    if controlnet is not None:
        options = {"keyframes": keyframes((0, 8, 15)), "controlnet": controlnet, **options}
    frames: np.ndarray = pipeline.generate(seed=seed, **options).frames
    return frames


def keyframes(places: tuple[int, ...], side: int = 128) -> list[Keyframe]:
    """Draws discs whose position and size follow the frame's index."""
    y, x = np.mgrid[:side, :side]
    discs = [np.hypot(x - side * (0.2 + place / 30), y - side / 2) < side / 8 + place for place in places]
    return [
        Keyframe(place, np.repeat((disc * 255).astype(np.uint8)[:, :, None], 3, axis=2))
        for place, disc in zip(places, discs, strict=True)
    ]


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the mean difference in levels."""
    return float(np.abs(actual.astype(int) - expected.astype(int)).mean())


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Compares the frames of two backends."""
    off = np.abs(actual.astype(int) - expected)
    assert off.mean() <= LEVELS
    assert off.max() <= MOST_LEVELS


def assert_same(pipeline: VideoPipeline, actual: np.ndarray, expected: np.ndarray) -> None:
    """Compares two runs of a request bit for bit, except on ONNX Runtime, whose group norms add in no fixed order."""
    if pipeline.backend == "onnxruntime-cuda":
        assert difference(actual, expected) <= LEVELS / 10
    else:
        np.testing.assert_array_equal(actual, expected)


def captures(pipeline: VideoPipeline) -> bool:
    """Whether the loop captures CUDA graphs on a backend; engines of ONNX Runtime replay graphs of their own."""
    return pipeline.backend != "onnxruntime-cuda"


def workspaces(pipeline: VideoPipeline) -> list[Any]:
    """Returns the workspaces of a GPU executor, one per clip size."""
    executor: Any = pipeline.executor
    return list(executor._workspaces.values())
