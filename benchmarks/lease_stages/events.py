"""Whether events within a replayed CUDA graph pass in order."""

from typing import Any

from gpu.event_order import UNITS, fault, watch
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT

from .processes import Settings, Write
from .torch_pipelines import EMULATED_FRAMES, EMULATED_SIDE, EMULATED_STEPS, torch_pipeline

REQUESTS = 6
SETTLED = 3
"""Requests after which replays are judged: the first ones load, capture and prove the graph."""


def measure(settings: Settings, write: Write) -> None:
    """Writes for each request what the device's events and the host's clock say.

    Raises:
        RuntimeError: they do not agree.
    """
    size: dict[str, Any] = {"num_inference_steps": UNITS}
    if settings.dry_run:
        side = EMULATED_SIDE
        size = {"width": side, "height": side, "num_frames": EMULATED_FRAMES, "num_inference_steps": EMULATED_STEPS}
    with torch_pipeline(None, settings.dry_run) as pipeline:
        rows = [watch(pipeline, PROMPT, seed=seed, **size) for seed in range(REQUESTS)]
    for row in rows:
        write(row)
    faults = [] if settings.dry_run else list(filter(None, map(fault, rows[SETTLED:])))  # an emulation has no clock
    if faults:
        raise RuntimeError(faults[0])
