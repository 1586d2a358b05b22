"""Whether events within a replayed CUDA graph pass in order, so that progress and stage times can be trusted.

The host waits for each event in turn. If a replay did not arm the events again, all waits would return at once.
"""

import time
from itertools import pairwise
from typing import Any

from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT

from .processes import Settings, Write
from .torch_pipelines import EMULATED_FRAMES, EMULATED_SIDE, EMULATED_STEPS, torch_pipeline

REQUESTS = 5
STAGES = ("text", "keyframes", "control", "denoise", "decode")
TOLERANCE = 0.1
"""Largest share by which the sum of the stages, or what the host saw of it, may be off."""


def measure(settings: Settings, write: Write) -> None:
    """Writes for each request what the device's events and the host's clock say.

    Raises:
        RuntimeError: they do not agree.
    """
    size: dict[str, Any] = {"num_inference_steps": 12}
    if settings.dry_run:
        side = EMULATED_SIDE
        size = {"width": side, "height": side, "num_frames": EMULATED_FRAMES, "num_inference_steps": EMULATED_STEPS}
    rows = []
    with torch_pipeline(None, settings.dry_run) as pipeline:
        for seed in range(REQUESTS):
            seen: list[float] = []
            begin = time.perf_counter()
            clip = pipeline.generate(PROMPT, seed=seed, on_progress=lambda _, seen=seen: seen.append(now()), **size)
            wall = now() - begin
            device = sum(clip.timings.get(stage, 0.0) for stage in STAGES)
            steps = [late - early for early, late in pairwise(seen[1:])]
            rows.append(
                {"wall_s": wall, "stages_s": device, "seen_s": seen[-1] - seen[1], "longest_wait_s": max(steps)}
            )
            write(rows[-1])
    if settings.dry_run:
        return  # an emulated device has no clock
    for row in rows[1:]:  # the first request loads the engines
        if not row["stages_s"] <= row["wall_s"] * (1 + TOLERANCE):
            raise RuntimeError(f"the stages take {row['stages_s']:.4f} s of a request of {row['wall_s']:.4f} s")
        if row["seen_s"] < row["stages_s"] * (1 - TOLERANCE) - row["longest_wait_s"]:
            raise RuntimeError(f"the host saw {row['seen_s']:.4f} s of {row['stages_s']:.4f} s of stages")


def now() -> float:
    """Seconds of the host's clock."""
    return time.perf_counter()
