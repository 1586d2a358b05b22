"""Options of the prompt in whole requests: frames against diffusers with compel's embeddings, on several backends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from compel import Compel
from fakes.emulated_demo import SMALL
from fakes.gpu_emulation import PortableGraphs, emulate
from pictures import pictures
from references import normalize_per_frame, sparsectrl_pipeline, to_uint8
from sparsectrl_lcm.runtime import Clip, InvalidRequest, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.gpu.buffers import from_type, to_type

TRAINED = Path(__file__).parents[2] / "demo" / "trained"
NEGATIVE = "a (blue:1.4) square"
WEIGHTED = "a (red:1.4) [circle] moves (right:0.3) over a green ground"
LONG = "a red circle moves right over a green ground. " * 11
CASES: dict[str, dict[str, Any]] = {
    "skipped layer": {"prompt": WEIGHTED, "clip_skip": 1},
    "skipped layer without guidance": {"prompt": WEIGHTED, "clip_skip": 1, "guidance_scale": 1},
    "weights": {"prompt": WEIGHTED, "prompt_weights": True},
    "long": {"prompt": LONG, "long_prompts": True},
}

EQUIVALENT = {
    "weights": ["a (red)1.4 (circle)0.9090909 moves (right)0.3 over a green ground", "a (blue)1.4 square"],
    "long": [LONG, r"a \(blue:1.4\) square"],
}
"""The prompts in compel's syntax."""


def generate(pipeline: VideoPipeline, seed: int = 3, **options: Any) -> Clip:
    size = {"width": SMALL.width, "height": SMALL.height, "num_frames": SMALL.frames, "num_inference_steps": 2}
    given = {"keyframes": [Keyframe(1, pictures(1, 64, 64)[0])], "guidance_scale": 2, "negative_prompt": NEGATIVE}
    return pipeline.generate(**{**given, **size, "seed": seed, **options})


def difference(one: Clip, other: Any) -> int:
    frames = other.frames if isinstance(other, Clip) else other
    return int(np.abs(one.frames.astype(int) - frames).max())


@pytest.fixture(scope="module")
def host() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


@pytest.fixture(scope="module")
def reference() -> Any:
    pipe = sparsectrl_pipeline(TRAINED, "scribble")
    normalize_per_frame(pipe.unet)
    normalize_per_frame(pipe.controlnet)
    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder  # diffusers looks for the last norm there
    return pipe


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_diffusers(name: str, host: VideoPipeline, reference: Any) -> None:
    options = CASES[name]
    given: dict[str, Any] = {"prompt": WEIGHTED, "negative_prompt": NEGATIVE, "clip_skip": options.get("clip_skip")}
    if "clip_skip" not in options:
        embeds = Compel(reference.tokenizer, reference.text_encoder, truncate_long_prompts=False)(EQUIVALENT[name])
        given = {"prompt_embeds": embeds[:1], "negative_prompt_embeds": embeds[1:]}
    expected = reference(
        **given,
        num_inference_steps=2,
        guidance_scale=float(options.get("guidance_scale", 2)),
        conditioning_frames=pictures(1, 64, 64),
        controlnet_frame_indices=[1],
        num_frames=4,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).frames[0]
    clip = generate(host, **options)
    assert_close(clip.frames, to_uint8(expected))
    others = {"prompt": options["prompt"], "guidance_scale": options.get("guidance_scale", 2)}
    assert difference(clip, generate(host, **others)) > 1, "the option changes the clip"
    assert difference(clip, generate(host, **options)) == 0, "kept for the same options"


def test_frames_on_a_gpu_are_those_of_the_host(host: VideoPipeline) -> None:
    """First runs, replays, kept conditioning; embeddings of an earlier request never leak."""
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle))
    device = VideoPipeline(bundle, machine.executor)
    weights, skip = CASES["weights"], CASES["skipped layer"]
    requests = [weights, {**weights, "seed": 4}, weights, skip, {**weights, **skip}]
    requests += [{"prompt": WEIGHTED}, {**weights, "guidance_scale": 1, "keyframes": ()}]
    requests += [{**weights, "num_frames": 6, "context_length": 4, "context_overlap": 2}]
    for options in requests:
        clips = [generate(pipeline, **options) for pipeline in (device, host)]
        assert_close(clips[0].frames, clips[1].frames, options)
    assert machine.executor.replayed is not None
    with pytest.raises(InvalidRequest, match="long_prompts: a prompt takes 2 chunks of tokens, engines of a GPU take"):
        generate(device, **CASES["long"])
    device.close()
    assert machine.cudart.leaked == []


@pytest.mark.slow
def test_openvino_compiles_for_the_tokens_of_a_request(host: VideoPipeline) -> None:
    pipeline = VideoPipeline.load(backend="openvino")
    for options in ({"prompt": WEIGHTED}, CASES["long"], CASES["weights"]):
        assert_close(generate(pipeline, **options).frames, generate(host, **options).frames)


def test_a_prompt_of_too_many_chunks_is_refused(host: VideoPipeline) -> None:
    with pytest.raises(
        InvalidRequest, match="long_prompts: a prompt takes 12 chunks of tokens; allowed are at most 10"
    ):
        generate(host, prompt="red " * 900, long_prompts=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_of_each_type(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    assert (from_type(to_type(values, dtype), dtype) == expected).all()
