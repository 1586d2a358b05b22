"""The clip of `make demo` shows what its prompt and scribbles ask for."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "demo"))

import run
from draw_scribbles import SCENE
from drawing import DETAIL, scribble
from measure import shows
from sparsectrl_lcm.runtime import VideoPipeline


def test_every_frame_of_the_demo_shows_the_asked_shape_and_colour() -> None:
    clip = VideoPipeline.load(backend="onnxruntime").run(run.request())
    as_asked = [shows(frame, SCENE, index) == [(True, True)] for index, frame in enumerate(clip.frames)]
    assert len(as_asked) == 16 and all(as_asked), as_asked


def test_the_scribbles_are_those_of_the_scene() -> None:
    for keyframe in run.request().keyframes:
        with Image.open(keyframe.image) as picture:
            assert np.array_equal(np.asarray(picture), scribble(SCENE, keyframe.index, DETAIL))
