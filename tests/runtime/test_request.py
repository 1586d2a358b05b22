"""The values that a request may have, and the one-line errors for others."""

from dataclasses import fields as fields_of
from inspect import signature
from typing import Any

import numpy as np
import pytest
from sparsectrl_lcm.runtime import ClipRequest, InvalidRequest, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.request_checks import check_request

PICTURE = np.zeros((16, 16, 3), np.uint8)

BAD = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"negative_prompt": None}, "negative_prompt"),
    ({"prompt": "a \ud800 boat"}, "prompt: .* is not valid Unicode"),
    ({"num_inference_steps": 0}, "num_inference_steps: 0 is not allowed; give a whole number from 1 to 12"),
    ({"num_inference_steps": 13}, "1 to 12"),
    ({"num_inference_steps": 4.0}, "num_inference_steps"),
    ({"num_inference_steps": True}, "num_inference_steps"),
    ({"guidance_scale": float("nan")}, "guidance_scale: nan is not allowed; give a number from 0 to 30"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"guidance_scale": "2"}, "guidance_scale"),
    ({"conditioning_scale": float("nan")}, "conditioning_scale: nan is not allowed; give a number from 0 to 10"),
    ({"conditioning_scale": -0.5}, "conditioning_scale: -0.5 is not allowed"),
    ({"conditioning_scale": None}, "conditioning_scale: None is not allowed"),
    ({"control_guidance_start": -0.1}, "control_guidance_start: -0.1 is not allowed; give a number from 0 to 1"),
    ({"control_guidance_end": 0}, "control_guidance_end: 0 is not above the start, 0"),
    ({"control_guidance_end": 1.1}, "control_guidance_end: 1.1 is not allowed; give a number from 0 to 1"),
    (
        {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
        "0.5 is not below the end, 0.5",
    ),
    ({"seed": -1}, "seed: -1 is not allowed; give a whole number from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 10**5000}, "seed: a number of thousands of digits is not allowed"),
    ({"seed": 1.5}, "seed"),
    ({"height": 0}, "height"),
    ({"height": 100}, "height: 100 is not allowed; give a multiple of 8 from 8 to 2048"),
    ({"width": 4096}, "width"),
    ({"num_frames": 0}, "num_frames"),
    ({"num_frames": 129}, "1 to 128"),
    ({"decoder": "fast"}, "decoder: 'fast' is not in this bundle; allowed are full, tiny"),
    ({"clip_skip": 2}, "clip_skip: 2 is not allowed; give a whole number from 0 to 1"),
    ({"clip_skip": None}, "clip_skip"),
    ({"prompt_weights": 1}, "prompt_weights: 1 is not allowed; give True or False"),
    ({"long_prompts": "yes"}, "long_prompts"),
    ({"prompt_weights": True, "prompt": "a (red:11)"}, "prompt: the weight 11 of 'red' is not allowed; give weights"),
    ({"prompt_weights": True, "negative_prompt": "(b:-.5)"}, "negative_prompt: the weight -0.5 of 'b' is not allowed"),
    ({"decoder": None}, "decoder: None is not in this bundle"),
    ({"controlnet": "depth", "keyframes": [Keyframe(0, PICTURE)]}, "controlnet: 'depth' .* allowed are scribble, rgb"),
    ({"keyframes": [Keyframe(16, PICTURE)]}, "keyframe index: 16 is not allowed; give a whole number from -16 to 15"),
    ({"keyframes": [Keyframe(-17, PICTURE)]}, "keyframe index: -17 is not allowed"),
    ({"keyframes": [Keyframe(4, PICTURE)], "num_frames": 4}, "from -4 to 3"),
    ({"keyframes": [Keyframe(15, PICTURE), Keyframe(-1, PICTURE)]}, "index 15 was given twice"),
    ({"keyframes": [Keyframe(2, PICTURE), Keyframe(2, PICTURE)]}, "index 2 was given twice"),
    ({"keyframes": [Keyframe(i, PICTURE) for i in (0, 1, 2, -3)], "num_frames": 3}, "index 0 was given twice"),
    ({"keyframes": [PICTURE]}, "keyframes: .* is not allowed; give a list of Keyframe"),
    ({"keyframes": Keyframe(0, PICTURE)}, "keyframes: .* is not allowed; give a list of Keyframe"),
    ({"keyframes": [Keyframe(0, b"nothing")]}, "keyframe 0: the data is not an image"),
]


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_are_named(pipeline: VideoPipeline, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        pipeline.generate(**{"prompt": "a boat", **fields})
    assert "\n" not in str(error.value)


LONG = ["x" * 5000, b"x" * 5000, ["a"] * 900, {"a": "b" * 900}, 10**400, np.zeros(500), "a\n" * 900]


@pytest.mark.parametrize("value", LONG, ids=[type(value).__name__ for value in LONG])
@pytest.mark.parametrize("field", [item.name for item in fields_of(ClipRequest) if item.name != "keyframes"])
def test_long_values_are_cut_in_errors(pipeline: VideoPipeline, field: str, value: Any) -> None:
    """Whatever the value, the error is one line that names the field."""
    if isinstance(value, str) and "prompt" in field and field not in ("prompt_weights", "long_prompts"):
        value = "\ud800" * 900  # other text is allowed
    with pytest.raises(InvalidRequest) as error:
        check_request(ClipRequest(**{"prompt": "a", field: value}), pipeline.bundle.manifest)
    message = str(error.value)
    assert message.startswith(f"{field}: ")
    assert len(message) < 200
    assert "\n" not in message


@pytest.mark.parametrize("keyframe", [Keyframe(10**400, PICTURE), Keyframe(0, "x" * 5000), Keyframe(0, "x/" * 900)])
def test_long_keyframes_are_cut_in_errors(pipeline: VideoPipeline, keyframe: Keyframe) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_request(ClipRequest("a", [keyframe]), pipeline.bundle.manifest)
    assert len(str(error.value)) < 200


def test_numpy_numbers_are_numbers(pipeline: VideoPipeline) -> None:
    clip = pipeline.generate(
        "a boat",
        [Keyframe(np.int64(1), PICTURE)],
        num_inference_steps=np.int32(1),
        guidance_scale=np.float32(1),
        seed=np.uint64(5),
        num_frames=2,
    )
    assert clip.seed == 5


def test_order_of_keyframes_does_not_matter(pipeline: VideoPipeline) -> None:
    white = np.full((16, 16, 3), 255, np.uint8)
    keyframes = [Keyframe(0, PICTURE), Keyframe(3, white)]
    one = pipeline.generate("a boat", keyframes, num_inference_steps=1, seed=1, num_frames=4)
    other = pipeline.generate("a boat", keyframes[::-1], num_inference_steps=1, seed=1, num_frames=4)
    assert (one.frames == other.frames).all()


def test_a_request_has_the_arguments_and_defaults_of_generate() -> None:
    arguments = signature(VideoPipeline.generate).parameters.values()
    asked = [(item.name, item.default) for item in arguments if item.name != "self" and item.name[:3] != "on_"]
    assert asked == [(item.name, item.default) for item in signature(ClipRequest).parameters.values()]


def test_generate_and_run_make_the_same_clip(pipeline: VideoPipeline) -> None:
    options = {
        "keyframes": [Keyframe(1, PICTURE)],
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 3,
        "height": 64,
        "width": 96,
        "num_frames": 3,
    }
    seen: list[int] = []
    clip = pipeline.run(ClipRequest("a boat", **options), on_frames=lambda first, frames: seen.extend(range(first, 3)))
    assert clip.frames.shape == (3, 64, 96, 3)
    assert seen[0] == 0
    assert (clip.frames == pipeline.generate("a boat", **options).frames).all()


def test_what_is_left_open_is_the_bundles_own(pipeline: VideoPipeline) -> None:
    sizes = pipeline.bundle.manifest.sizes
    checked = check_request(ClipRequest("a boat"), pipeline.bundle.manifest)
    assert (checked.width, checked.height, checked.frames) == (sizes.width, sizes.height, sizes.frames)
    assert checked.controlnet is None, "there are no keyframes"
    seeds = {check_request(ClipRequest("a boat"), pipeline.bundle.manifest).seed for _ in range(3)}
    assert len(seeds) == 3, "each request draws its own seed"


def test_guidance_needs_a_scale_above_1(pipeline: VideoPipeline) -> None:
    for scale, texts in ((0, ["a boat"]), (1, ["a boat"]), (1.5, ["blue", "a boat"])):
        asked = ClipRequest("a boat", negative_prompt="blue", guidance_scale=scale)
        assert check_request(asked, pipeline.bundle.manifest).texts == texts
