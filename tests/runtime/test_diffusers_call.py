"""`sparsectrl_lcm.diffusers` against diffusers' `AnimateDiffSparseControlNetPipeline`, with the same arguments."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from conftest import Exported
from pictures import pictures
from references import sparsectrl_pipeline
from sparsectrl_lcm.runtime import InvalidRequest

from sparsectrl_lcm.diffusers import SparseCtrlLcmPipeline

SIDE = 64
KINDS = ("scribble", "rgb")
CALLS: list[dict[str, Any]] = [
    {"kind": "scribble"},
    {"kind": "scribble", "controlnet_frame_indices": [0, 3, -1], "guidance_scale": 2.0, "negative_prompt": "blue"},
    {"kind": "rgb", "controlnet_frame_indices": [2], "output_type": "pil"},
    {"kind": "rgb", "controlnet_frame_indices": [5, 1], "output_type": "pt", "num_inference_steps": 1, "as": "arrays"},
    {"kind": "scribble", "controlnet_frame_indices": [4, 0, 4], "num_frames": 16, "eta": 0.5},
    {"kind": "scribble", "generator": "used", "num_inference_steps": 4},
    {"kind": "scribble", "generator": "list", "prompt": ["a star"], "controlnet_conditioning_scale": 0.5},
    {"kind": "scribble", "generator": None, "guidance_scale": 3.5, "return_dict": False},
    {"kind": "rgb", "size": (100, 80), "controlnet_frame_indices": [0, 5], "height": 72},
    {"kind": "scribble", "as": "tensors", "controlnet_frame_indices": [1, 2], "num_frames": 5},
]


@pytest.fixture(scope="module")
def pipelines(sd15_like: Exported) -> dict[str, tuple[SparseCtrlLcmPipeline, Any]]:
    """The drop-in and diffusers' pipeline, for each kind of keyframes."""
    return {
        kind: (
            SparseCtrlLcmPipeline.from_pretrained(sd15_like.bundle, controlnet=kind, backend="onnxruntime"),
            sparsectrl_pipeline(sd15_like.checkpoints, kind),
        )
        for kind in KINDS
    }


def generator(kind: str | None, seed: int) -> Any:
    """A generator for one of the two pipelines; both get one in the same state."""
    if kind is None:
        torch.manual_seed(seed)
        return None
    made = torch.Generator("cpu").manual_seed(seed)
    if kind == "used":
        torch.randn(7, generator=made)
    return [made] if kind == "list" else made


def outcome(pipeline: Any, call: dict[str, Any], seed: int) -> tuple[Any, Any, list[Any]]:
    """The output of a call, the next value of its generator, and the steps and timesteps of its callback."""
    options = dict(call)
    options.pop("kind")
    indices = options.setdefault("controlnet_frame_indices", [0])
    images: Any = pictures(len(indices), *options.pop("size", (SIDE, SIDE)), seed=seed)
    given = options.pop("as", "pictures")
    if given != "pictures":
        images = [np.array(image, np.float32)[None] / 255 for image in images]
    if given == "tensors":
        images = [torch.from_numpy(image).permute(0, 3, 1, 2) for image in images]
    made = generator(options.pop("generator", "fresh"), seed)
    steps: list[Any] = []

    def callback(called: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert called is pipeline
        steps.append((step, int(timestep)))
        return tensors

    usual = {"prompt": "a red circle moves right", "num_frames": 6, "num_inference_steps": 2, "guidance_scale": 1.0}
    usual |= {"width": SIDE, "height": SIDE, "output_type": "np"}
    output = pipeline(**usual | options, conditioning_frames=images, generator=made, callback_on_step_end=callback)
    return output, torch.randn(1, generator=made[0] if isinstance(made, list) else made), steps


def levels(frames: Any) -> np.ndarray:
    """Frames of any output type as levels [1, F, H, W, 3]."""
    if isinstance(frames, list):
        return np.stack([[np.asarray(image) for image in clip] for clip in frames])
    values = frames.permute(0, 1, 3, 4, 2).numpy() if isinstance(frames, torch.Tensor) else frames
    return (values * 255).round().astype(np.uint8)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_call_gives_what_diffusers_gives(pipelines: Any, number: int) -> None:
    call = CALLS[number]
    (output, value, steps), (expected, expected_value, expected_steps) = (
        outcome(pipeline, call, 20 + number) for pipeline in pipelines[call["kind"]]
    )
    frames, expected_frames = output[0], expected[0]
    if call.get("return_dict", True):
        assert output.frames is frames
    else:
        assert type(output) is type(expected) is tuple
    assert type(frames) is type(expected_frames)
    if isinstance(frames, list):
        assert type(frames[0]) is type(expected_frames[0]) is list
        assert (frames[0][0].mode, frames[0][0].size) == (expected_frames[0][0].mode, expected_frames[0][0].size)
    else:
        assert (frames.shape, frames.dtype) == (expected_frames.shape, expected_frames.dtype)
    assert levels(expected_frames).std() > 10, "a flat clip would prove nothing"
    assert_close(levels(frames), levels(expected_frames))
    assert value == expected_value, "the generator is left in another state"
    assert steps == expected_steps


REFUSED: list[tuple[str, Any]] = [
    ("latents", torch.zeros(1)),
    ("prompt_embeds", torch.zeros(1)),
    ("negative_prompt_embeds", torch.zeros(1)),
    ("ip_adapter_image", "picture"),
    ("ip_adapter_image_embeds", [torch.zeros(1)]),
    ("cross_attention_kwargs", {"scale": 0.5}),
    ("guess_mode", True),
    ("num_videos_per_prompt", 2),
    ("callback_on_step_end_tensor_inputs", ["latents"]),
    ("output_type", "latent"),
    ("prompt", ["a", "b"]),
    ("prompt", None),
    ("negative_prompt", ["a", "b"]),
    ("generator", 3),
    ("generator", [torch.Generator(), torch.Generator()]),
    ("conditioning_frames", None),
    ("conditioning_frames", ["picture.png"]),
    ("conditioning_frames", np.zeros((1, 32, 32, 3))),
    ("controlnet_frame_indices", [0, 1, 2]),
    ("controlnet_frame_indices", [16]),
    ("controlnet_conditioning_scale", [0.5]),
    ("num_inference_steps", 50),
    ("num_frames", "x"),
    ("width", 65),
    ("width", -8),
    ("height", "x"),
    ("height", 10**6),
    ("conditioning_frames", 3),
    ("conditioning_frames", np.zeros((SIDE, SIDE, 7))),
    ("controlnet_frame_indices", [[0]]),
    ("controlnet_frame_indices", [0.5]),
    ("controlnet_frame_indices", 0),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(pipelines: Any, name: str, value: Any) -> None:
    usual = {"prompt": "a star", "conditioning_frames": pictures(1, SIDE, SIDE), "width": SIDE, "height": SIDE}
    with pytest.raises(InvalidRequest) as caught:
        pipelines["scribble"][0](**usual | {name: value})
    assert caught.value.field == name


def test_methods_without_a_meaning_here_are_refused_by_name(pipelines: Any) -> None:
    pipeline, reference = pipelines["scribble"]
    for name in ("to", "load_lora_weights", "enable_model_cpu_offload", "enable_free_init"):
        assert callable(getattr(reference, name))
        with pytest.raises(InvalidRequest, match=f"^{name}: is not supported here; "):
            getattr(pipeline, name)("cuda")
    assert not hasattr(pipeline, "no_such_method")


def test_a_callback_that_needs_tensors_is_told_so_and_leaves_the_generator_alone(pipelines: Any) -> None:
    made = torch.Generator().manual_seed(4)
    for callback in (lambda *given: given[3]["latents"], lambda *given: {"latents": torch.zeros(1)}):
        with pytest.raises(InvalidRequest, match="callback_on_step_end"):
            pipelines["scribble"][0](
                "a star",
                SIDE,
                SIDE,
                num_frames=2,
                num_inference_steps=2,
                conditioning_frames=pictures(1, SIDE, SIDE),
                generator=made,
                callback_on_step_end=callback,
            )
    assert torch.equal(torch.randn(3, generator=made), torch.randn(3, generator=torch.Generator().manual_seed(4)))


def test_neither_torch_nor_diffusers_is_imported_without_need() -> None:
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from sparsectrl_lcm.diffusers import SparseCtrlLcmPipeline\n"
        "pipeline = SparseCtrlLcmPipeline.from_pretrained(backend='onnxruntime')\n"
        "frames = pipeline('a star', 64, 64, 2, 1, conditioning_frames=Image.new('RGB', (9, 9))).frames\n"
        "print(len(frames[0]), *({'torch', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2"]
