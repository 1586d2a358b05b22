"""The demo bundle on an emulated device."""

import logging
from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from pictures import pictures
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.request_warnings import request_log

from .gpu_emulation import Digests, emulate

SIZE = ClipSize(width=128, height=128, frames=16)
SMALL = ClipSize(width=64, height=64, frames=4)
REQUESTS: list[dict[str, Any]] = [
    {},
    {"seed": 2},
    {"guidance_scale": 2, "negative_prompt": "blue"},
    {"guidance_scale": 2, "negative_prompt": "blue", "num_inference_steps": 1},
    {"controlnet": "rgb"},
    {"keyframes": ()},
    {"conditioning_scale": 0.5, "control_guidance_end": 0.5},
    {"num_inference_steps": 7},
    {"control_guidance_start": 0.5},
    {"conditioning_scale": 0},
    {},
]
"""Options of requests that take other graphs, keep other conditioning or run other steps."""


def emulated_demo(size: ClipSize = SIZE, **options: Any) -> SimpleNamespace:
    """A pipeline for clips of one size, whose engines return digests of their inputs.

    Returns `pipeline`, `bundle`, and what `emulate` returns.
    """
    bundle = Bundle.load()
    shapes = cache(lambda graph: static_shapes(bundle.manifest, graph, size))
    machine = emulate(bundle, Digests(bundle, shapes), **options)
    machine.bundle = bundle
    machine.pipeline = VideoPipeline(bundle, machine.executor)
    return machine


def keyframes(count: int = 2, seed: int = 0) -> list[Keyframe]:
    """Keyframes that differ from seed to seed."""
    return [Keyframe(3 * index, image) for index, image in enumerate(pictures(count, 128, 128, seed))]


def small_clip(machine: SimpleNamespace, *args: Any, **options: Any) -> Clip:
    """A clip of `SMALL`, for which `machine` was made."""
    size = {"width": SMALL.width, "height": SMALL.height, "num_frames": SMALL.frames}
    clip: Clip = machine.pipeline.generate(*args, **size, **options)
    return clip


def fresh(*args: Any, **options: Any) -> np.ndarray:
    """The frames of a pipeline that has run nothing else."""
    frames: np.ndarray = emulated_demo(cuda_graphs=False).pipeline.generate(*args, **options).frames
    return frames


def fresh_small(*args: Any, **options: Any) -> np.ndarray:
    """The same, for clips of `SMALL`."""
    return small_clip(emulated_demo(SMALL, cuda_graphs=False), *args, **options).frames


def told(records: Iterable[logging.LogRecord]) -> list[str]:
    """The messages of a log without those about requests: random pictures are no scribbles."""
    return [record.getMessage() for record in records if record.name != request_log.name]
