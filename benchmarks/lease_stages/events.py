"""Whether events within a replayed CUDA graph pass in order, so that progress can be trusted.

The host waits for each event in turn. If a replay did not arm the events again, all waits would return at once.
Requests that replay no graph prove nothing.
"""

from dataclasses import asdict
from typing import Any

from sparsectrl_lcm.benchmarks.harness.event_order import faults, stage_ends
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.progress import OnProgress

from .processes import Settings, Write
from .torch_pipelines import (
    EMULATED_FRAMES,
    EMULATED_SIDE,
    EMULATED_STEPS,
    NOT_REPLAYED,
    torch_pipeline,
    watched_replays,
)

REQUESTS = 5
PLAIN_REQUESTS = 2
"""The first ones load the engines, capture the graphs and prove them."""


def measure(settings: Settings, write: Write) -> None:
    """Writes for each request when its stages ended by the device's events and by the host's clock.

    Raises:
        RuntimeError: they do not agree, or no graph was replayed.
    """
    size: dict[str, Any] = {"num_inference_steps": 12}
    if settings.dry_run:
        side = EMULATED_SIDE
        size = {"width": side, "height": side, "num_frames": EMULATED_FRAMES, "num_inference_steps": EMULATED_STEPS}
    measured = []
    with watched_replays() as replays, torch_pipeline(None, settings.dry_run) as pipeline:
        for seed in range(REQUESTS):

            def ask(on_progress: OnProgress, seed: int = seed) -> Clip:
                return pipeline.generate(PROMPT, seed=seed, on_progress=on_progress, **size)

            measured.append(stage_ends(ask))
            last, ends = measured[-1][-1], [asdict(end) for end in measured[-1]]
            write({"stages_s": last.device, "seen_s": last.host, "replayed": replays[-1], "ends": ends})
    if not all(replays[PLAIN_REQUESTS:]):
        raise RuntimeError(NOT_REPLAYED)
    if settings.dry_run:
        return  # an emulated device has no clock
    for stages in measured[PLAIN_REQUESTS:]:
        if found := faults(stages, slack=1e-3):
            raise RuntimeError("; ".join(found))
