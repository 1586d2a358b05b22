"""Whether the events within a replayed CUDA graph pass in order, so that progress and stage times can be trusted.

The host waits for each event in turn. If a replay did not arm the events again, all waits would return at once; if they
passed only when the graph has ended, the first wait would take all the time.
"""

import time
from itertools import pairwise
from typing import Any

from sparsectrl_lcm.runtime import VideoPipeline

STAGES = ("text", "keyframes", "control", "denoise", "decode")
TOLERANCE = 0.1
"""Share by which the sum of the stages may exceed the wall time."""
UNITS = 12
"""The fewest units of work in a request for which a single wait should take less than half of the time."""


def watch(pipeline: VideoPipeline, prompt: str, **options: Any) -> dict[str, float]:
    """Makes a clip. Returns its seconds by the host's clock and by the device's events.

    `seen_s` is the time from the first report of a stage to the last, `longest_wait_s` the longest between two.
    """
    seen: list[float] = []
    begin = time.perf_counter()
    clip = pipeline.generate(prompt, on_progress=lambda _: seen.append(time.perf_counter()), **options)
    wall = time.perf_counter() - begin
    reports = seen[1:]  # the first one is about loading
    return {
        "wall_s": wall,
        "stages_s": sum(clip.timings.get(stage, 0.0) for stage in STAGES),
        "seen_s": reports[-1] - reports[0],
        "longest_wait_s": max(late - early for early, late in pairwise(reports)),
    }


def fault(row: dict[str, float]) -> str:
    """What is wrong with the events of a replay of at least `UNITS` steps; "" if nothing is."""
    stages = row["stages_s"]
    if not 0 < stages <= row["wall_s"] * (1 + TOLERANCE):
        return f"the stages take {stages:.4f} s of a request of {row['wall_s']:.4f} s"
    if row["seen_s"] < stages / 2:
        return f"the host saw {row['seen_s']:.4f} s of {stages:.4f} s of stages: events passed too early"
    if row["longest_wait_s"] > stages / 2:
        return f"one wait took {row['longest_wait_s']:.4f} s of {stages:.4f} s of stages: events passed too late"
    return ""
