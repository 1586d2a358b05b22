"""Progress that follows the device, whose events lie inside CUDA graphs."""

import pytest
from sparsectrl_lcm.benchmarks.harness.event_order import faults, stage_ends
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.progress import OnProgress

from .conftest import Load
from .requests import captures, keyframes

pytestmark = pytest.mark.gpu


def test_the_host_passes_events_when_the_device_does(load: Load, replays: list[bool]) -> None:
    """A replay: the stages add up to the wall time, and the first one ends before the last."""
    pipeline: VideoPipeline = load()

    def clip(seed: int, on_progress: OnProgress | None = None) -> Clip:
        options = {"seed": seed, "num_inference_steps": 12, "guidance_scale": 2.0, "negative_prompt": "a blue square"}
        return pipeline.generate("a red circle moves", keyframes((seed, 9)), on_progress=on_progress, **options)

    for seed in (1, 2):
        clip(seed)
    for seed in (3, 4, 5):
        ends = stage_ends(lambda on_progress, seed=seed: clip(seed, on_progress))  # type: ignore[misc]
        assert replays[-1] == captures(pipeline)
        assert faults(ends, slack=1e-3) == [], ends
