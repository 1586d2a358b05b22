"""Proves on a device that progress follows its events: a launched CUDA graph must make the host wait for them again.

CUDA documents that each launch of a graph records its events, but not that the host cannot see them as passed before
the device reaches them. If it could, progress would run ahead of the device; frames and timings would still be right,
since both are read after the whole stream.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.progress import OnProgress, Progress

TOLERANCE = 0.1
"""Part of the device's time by which the host's may differ."""
SLACK = 0.004
"""Seconds more: the launch, and the copies before the first and after the last event."""


@dataclass(frozen=True, slots=True)
class StageEnd:
    """The end of a stage, in seconds after the launch: as the device's events tell it, and as the host saw it."""

    stage: str
    device: float
    host: float


def stage_ends(
    ask: Callable[[OnProgress], Clip], clock: Callable[[], float] = time.perf_counter
) -> tuple[StageEnd, ...]:
    """The ends of a request's stages on the device.

    Args:
        ask: makes a clip that replays its CUDA graphs; so ask for one of the same kind twice before.
        clock: the host's time in seconds.
    """
    seen: dict[str, float] = {}

    def on_progress(progress: Progress) -> None:
        seen[progress.stage] = clock()

    clip = ask(on_progress)
    launched = seen.pop("load") + clip.timings["inputs"]
    ends, device = [], 0.0
    for stage, passed in seen.items():
        device += clip.timings[stage]
        ends.append(StageEnd(stage, device, passed - launched))
    return tuple(ends)


def faults(ends: tuple[StageEnd, ...], slack: float = SLACK) -> list[str]:
    """What is wrong with the order of events; empty if the host saw each stage end when the device did."""
    first, last = ends[0], ends[-1]
    if last.device < 4 * slack:
        return [f"{last.device * 1e3:.1f} ms on the device are too few to tell; ask for a larger clip"]
    margin = TOLERANCE * last.device + slack
    found = [
        f"{end.stage} ended {end.device * 1e3:.1f} ms after the launch, but the host passed its event at "
        f"{end.host * 1e3:.1f} ms"
        for end in ends
        if end.host < end.device - margin
    ]
    if last.host > last.device + margin:
        found.append(f"the stages take {last.device * 1e3:.1f} ms, but the host waited for {last.host * 1e3:.1f} ms")
    if last.host - first.host < (last.device - first.device) / 2:
        found.append(f"the host passed the event of {first.stage} only when that of {last.stage} had passed")
    return found
