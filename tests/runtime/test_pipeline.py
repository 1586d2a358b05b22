"""Frames against diffusers' AnimateDiffSparseControlNetPipeline with LCMScheduler: same weights, same seed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from conftest import Exported
from pictures import pictures
from references import animatediff_pipeline, control_keeps, normalize_per_frame, sparsectrl_pipeline, to_uint8
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.load_options import KEPT_BYTES

TRAINED = Path(__file__).parents[2] / "demo" / "trained"
EMPTY = ""
FIVE_TOKENS = "a red circle moves right"
LONG = "a large green triangle slowly turns over the plain sea on a snow night, " * 9
NEGATIVE = "blue small square"
KINDS = ("scribble", "rgb")
CASES = [
    # steps, guidance, keyframes, prompt, conditioning scale
    (1, 1, (5,), EMPTY, 1.0),
    (2, 2, (14, 3), LONG, 1.0),
    (4, 1, (0, 8, 15), FIVE_TOKENS, 1.0),
    (8, 2, (2, 13, 7), EMPTY, 1.0),
    (4, 2, (15,), FIVE_TOKENS, 1.0),
    (1, 2, (0, 9), FIVE_TOKENS, 0.5),
    (8, 1, (1,), LONG, 1.0),
    (2, 1, (6, 7, 8), EMPTY, 1.0),
    (1, 1, (3, 12, -1, 0), FIVE_TOKENS, 0.5),
    (1, 1, (0, 2, 4, 6, 9, 11, 13, -1), FIVE_TOKENS, 1.0),
]


@pytest.fixture(scope="module")
def both(exported: Exported):
    """This runtime, and diffusers for each kind of keyframes, on one architecture."""
    references = {kind: sparsectrl_pipeline(exported.checkpoints, kind) for kind in KINDS}
    return VideoPipeline.load(exported.bundle, "onnxruntime"), references


@pytest.mark.parametrize("number", range(len(CASES)))
def test_frames_are_those_of_diffusers(exported: Exported, both, number: int) -> None:
    """Every case with both kinds of keyframes, each on one architecture."""
    pipeline, references = both
    steps, guidance, indices, prompt, scale = CASES[number]
    controlnet = KINDS[(number + (exported.name == "other")) % 2]
    reference = references[controlnet]
    side = pipeline.bundle.manifest.sizes.height
    images = pictures(len(indices), side, side, seed=steps)
    expected = to_uint8(
        reference(
            prompt,
            negative_prompt=NEGATIVE,
            num_inference_steps=steps,
            guidance_scale=float(guidance),
            conditioning_frames=images,
            controlnet_frame_indices=list(indices),
            controlnet_conditioning_scale=scale,
            num_frames=16,
            height=side,
            width=side,
            generator=torch.Generator("cpu").manual_seed(7 + steps),
            output_type="np",
        ).frames[0]
    )
    clip = pipeline.generate(
        prompt,
        keyframes=[Keyframe(index, image) for index, image in zip(indices, images, strict=True)],
        controlnet=controlnet,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=7 + steps,
        conditioning_scale=scale,
    )
    assert clip.frames.dtype == np.uint8
    assert expected.std() > 10, "a flat clip would prove nothing"
    assert_close(clip.frames, expected)


def test_start_and_end_of_control_are_those_of_diffusers(sd15_like: Exported) -> None:
    """As in the loop of diffusers' ControlNet pipelines, its SparseCtrl pipeline gets a scale of 0 at other steps."""
    start, end, scale, steps, side = 0.25, 0.8, 0.7, 4, 64
    reference = sparsectrl_pipeline(sd15_like.checkpoints, "scribble")
    keeps = iter(control_keeps(steps, start, end))
    plain = reference.controlnet.forward
    reference.controlnet.forward = lambda *args, **given: plain(
        *args, **given | {"conditioning_scale": given["conditioning_scale"] * next(keeps)}
    )
    images = pictures(2, side, side)
    request = {"num_inference_steps": steps, "guidance_scale": 1.0, "num_frames": 3, "width": side, "height": side}
    expected = to_uint8(
        reference(
            FIVE_TOKENS,
            conditioning_frames=images,
            controlnet_frame_indices=[0, -1],
            controlnet_conditioning_scale=scale,
            generator=torch.Generator("cpu").manual_seed(4),
            output_type="np",
            **request,
        ).frames[0]
    )
    for kept_bytes in (KEPT_BYTES, 0):
        clip = VideoPipeline.load(sd15_like.bundle, "onnxruntime", kept_bytes=kept_bytes).generate(
            FIVE_TOKENS,
            [Keyframe(0, images[0]), Keyframe(-1, images[1])],
            seed=4,
            conditioning_scale=scale,
            control_guidance_start=start,
            control_guidance_end=end,
            **request,
        )
        assert_close(clip.frames, expected)


def test_keyframes_prompt_and_guidance_change_the_clip(exported: Exported) -> None:
    """Makes the comparison with diffusers meaningful: every input changes the frames with these random weights."""
    pipeline = VideoPipeline.load(exported.bundle, "onnxruntime")
    side = pipeline.bundle.manifest.sizes.height
    first, second = (Keyframe(4, image) for image in pictures(2, side, side))
    requests = [
        {},
        {"keyframes": [first]},
        {"keyframes": [second]},
        {"keyframes": [Keyframe(5, first.image)]},
        {"keyframes": [first], "controlnet": "rgb"},
        {"keyframes": [first], "prompt": LONG},
        {"keyframes": [first], "seed": 2},
        {"keyframes": [first], "guidance_scale": 2},
        {"keyframes": [first], "guidance_scale": 2, "negative_prompt": NEGATIVE},
    ]
    usual = {"prompt": FIVE_TOKENS, "seed": 1, "num_frames": 8, "num_inference_steps": 2}
    clips = [pipeline.generate(**usual | request) for request in requests]
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert np.abs(clip.frames.astype(int) - other.frames).max() > 3


def test_without_keyframes_the_clip_is_animatediffs(exported: Exported) -> None:
    reference = animatediff_pipeline(exported.checkpoints)
    pipeline = VideoPipeline.load(exported.bundle, "onnxruntime")
    side = pipeline.bundle.manifest.sizes.height
    expected = to_uint8(
        reference(
            FIVE_TOKENS,
            num_inference_steps=4,
            guidance_scale=1.0,
            num_frames=16,
            height=side,
            width=side,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="np",
        ).frames[0]
    )
    clip = pipeline.generate(FIVE_TOKENS, seed=3)
    assert_close(clip.frames, expected)


@pytest.mark.parametrize(
    ("frames", "width", "height", "controlnet"),
    [
        (1, 64, 128, "scribble"),
        (5, 192, 64, "scribble"),
        (32, 64, 64, "scribble"),
        (5, 104, 72, "scribble"),  # latents 13x9, which no downsampler halves
        (4, 72, 88, "rgb"),
        pytest.param(2, 384, 256, "scribble", marks=pytest.mark.slow),
        pytest.param(2, 512, 288, "rgb", marks=pytest.mark.slow),
        pytest.param(2, 768, 432, "scribble", marks=pytest.mark.slow),
    ],
)
def test_other_sizes_and_lengths(sd15_like: Exported, frames: int, width: int, height: int, controlnet: str) -> None:
    reference = sparsectrl_pipeline(sd15_like.checkpoints, controlnet)
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    (image,) = pictures(1, width, height)
    expected = to_uint8(
        reference(
            FIVE_TOKENS,
            num_inference_steps=2,
            guidance_scale=1.0,
            conditioning_frames=[image],
            controlnet_frame_indices=[frames - 1],
            num_frames=frames,
            height=height,
            width=width,
            generator=torch.Generator("cpu").manual_seed(5),
            output_type="np",
        ).frames[0]
    )
    clip = pipeline.generate(
        FIVE_TOKENS,
        [Keyframe(frames - 1, image)],
        controlnet,
        num_inference_steps=2,
        seed=5,
        width=width,
        height=height,
        num_frames=frames,
    )
    assert clip.frames.shape == (frames, height, width, 3)
    assert_close(clip.frames, expected)


DEMO_SIZE = {"width": 64, "height": 64}


def test_the_demo_bundle_normalizes_per_frame() -> None:
    """The packaged bundle, against diffusers with the temporal norm of the original AnimateDiff code."""
    pipeline = VideoPipeline.load(backend="onnxruntime")
    images = pictures(2, **DEMO_SIZE)
    for controlnet in ("scribble", "rgb"):
        reference = sparsectrl_pipeline(TRAINED, controlnet)
        per_clip = _demo_frames(reference)
        normalize_per_frame(reference.unet)
        normalize_per_frame(reference.controlnet)
        expected = _demo_frames(reference)
        clip = pipeline.generate(
            FIVE_TOKENS,
            [Keyframe(0, images[0]), Keyframe(5, images[1])],
            controlnet,
            num_inference_steps=2,
            seed=11,
            num_frames=8,
            **DEMO_SIZE,
        )
        assert_close(clip.frames, expected)
        assert np.abs(clip.frames.astype(int) - per_clip).max() > 3, "the two norms must give different frames"


def _demo_frames(reference) -> np.ndarray:
    return to_uint8(
        reference(
            FIVE_TOKENS,
            num_inference_steps=2,
            guidance_scale=1.0,
            conditioning_frames=pictures(2, **DEMO_SIZE),
            controlnet_frame_indices=[0, 5],
            num_frames=8,
            **DEMO_SIZE,
            generator=torch.Generator("cpu").manual_seed(11),
            output_type="np",
        ).frames[0]
    )


SAME_SEED = """
import hashlib
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
pipeline = VideoPipeline.load(backend="onnxruntime")
keyframes = [Keyframe(3, "demo/scribbles/frame_00.png")]
clips = [pipeline.generate("a boat", keyframes, seed=9, num_frames=4, num_inference_steps=2) for _ in range(2)]
print(*(hashlib.sha256(clip.frames.tobytes()).hexdigest() for clip in clips))
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    """In a new one, and in this one after other requests."""
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", SAME_SEED], capture_output=True, text=True, check=True, cwd=root)
    clip = VideoPipeline.load(backend="onnxruntime").generate(
        "a boat",
        [Keyframe(3, root / "demo/scribbles/frame_00.png")],
        seed=9,
        num_frames=4,
        num_inference_steps=2,
    )
    assert result.stdout.split() == [hashlib.sha256(clip.frames.tobytes()).hexdigest()] * 2


def test_a_seed_is_drawn_and_told() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    clip = pipeline.generate("a boat", num_frames=2, num_inference_steps=1)
    other = pipeline.generate("a boat", num_frames=2, num_inference_steps=1)
    assert clip.seed != other.seed
    again = pipeline.generate("a boat", num_frames=2, num_inference_steps=1, seed=clip.seed)
    assert (again.frames == clip.frames).all()
