"""The packaged model follows keyframes and prompt: figures of a few held-out requests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "demo"))

import evaluate
import pytest
from sparsectrl_lcm.runtime import VideoPipeline


@pytest.mark.slow
def test_the_model_in_the_package_heeds_keyframes_and_prompt() -> None:
    """The share of requested colours and shapes has a loose bound, since four requests are a small sample."""
    figures = evaluate.evaluate(evaluate.with_runtime(VideoPipeline.load(backend="onnxruntime")), 4)
    assert figures.scribble_f1 > 0.8
    assert figures.free_f1 < 0.35
    assert figures.rgb_psnr > 24
    assert figures.on_path > 0.85
    assert figures.flicker < 2
    assert figures.prompt >= 0.5
