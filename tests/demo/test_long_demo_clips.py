"""Clips of 64 frames with five keyframes, on the demo model: shapes stay on the path and seams are not seen."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "demo"))

import long_clips
import pytest
from sparsectrl_lcm.runtime import VideoPipeline


@pytest.mark.slow
def test_shapes_follow_five_keyframes_over_64_frames() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    figures = long_clips.evaluate(pipeline, 2)["straight"]
    assert figures["lowest_on_path"] >= 0.95
    assert figures["highest_ratio"] <= 1.3
    assert figures["keyframe_f1"] > 0.8


@pytest.mark.slow
def test_windows_of_consecutive_frames_alone_lose_the_path() -> None:
    """What the spread windows of the first steps are for."""
    pipeline = VideoPipeline.load(backend="onnxruntime")
    with long_clips.changed(windows=long_clips.overlapping_only):
        assert long_clips.evaluate(pipeline, 1)["winding"]["on_path"] < 0.85
