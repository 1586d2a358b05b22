"""SparseCtrl once before the loop and only on distinct frames, against diffusers' plain call at every step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Exported
from diffusers import SparseControlNetModel
from flops import count_flops
from pictures import pictures
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.cpu.conditioning_graphs import keyframe_feeds
from sparsectrl_lcm.runtime.cpu.sessions import Sessions
from sparsectrl_lcm.runtime.loop.conditioning import ConditioningCache, graphs_of
from sparsectrl_lcm.runtime.request import FittedKeyframe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FRAMES = 16
INDICES = (0, 8, 15)
SHORT = {"width": 64, "height": 64, "num_inference_steps": 2}


def request(pipeline: VideoPipeline, controlnet: str) -> CheckedRequest:
    side = pipeline.bundle.manifest.sizes.height
    keyframes = tuple(
        FittedKeyframe(index, np.asarray(image))
        for index, image in zip(INDICES, pictures(len(INDICES), side, side), strict=True)
    )
    return CheckedRequest("", "", keyframes, controlnet, 4, 1.0, 0, side, side, FRAMES)


def opened(pipeline: VideoPipeline, asked: CheckedRequest) -> Sessions:
    """The sessions of a pipeline, with the graphs of a request open."""
    sessions = pipeline.executor.sessions
    layout = asked.layout(pipeline.bundle.manifest.sizes, decode_pixels=1)
    for graph in graphs_of(asked):
        sessions.open(graph, layout.dimensions(graph))
    return sessions


def dense_inputs(feeds: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Condition and mask of every frame, as diffusers takes them: [1, C, F, H, W] and [1, 1, F, H, W]."""
    distinct = torch.from_numpy(feeds["conditioning"])
    if distinct.dtype == torch.uint8:
        distinct = distinct.permute(0, 3, 1, 2) / 255
    index = torch.from_numpy(feeds["frame_index"])
    mask = torch.from_numpy(feeds["conditioning_mask"])[index]
    condition = distinct[index].transpose(0, 1)[None]
    return condition, mask[None, None, :, None, None].expand(1, 1, *condition.shape[2:])


def plain(model: SparseControlNetModel, feeds: dict[str, np.ndarray], timestep: float, prompt: torch.Tensor):
    """diffusers' call, with arbitrary latents, which must not change the result."""
    condition, mask = dense_inputs(feeds)
    height, width = condition.shape[-2:]
    factor = (
        1
        if model.use_simplified_condition_embedding
        else 2 ** (len(model.config.conditioning_embedding_out_channels) - 1)
    )
    latents = torch.randn(prompt.shape[0], 4, FRAMES, height // factor, width // factor)
    down, middle = model(
        latents,
        torch.tensor(timestep),
        encoder_hidden_states=prompt.repeat_interleave(FRAMES, 0),
        controlnet_cond=condition,
        conditioning_mask=mask,
        return_dict=False,
    )
    return [*down, middle]


@pytest.mark.parametrize("controlnet", ["scribble", "rgb"])
@pytest.mark.parametrize("batch", [1, 2])
def test_residuals_equal_the_plain_computation(exported: Exported, controlnet: str, batch: int) -> None:
    pipeline = VideoPipeline.load(exported.bundle, "onnxruntime")
    asked = request(pipeline, controlnet)
    sessions = opened(pipeline, asked)
    feeds = keyframe_feeds(sessions, asked)
    assert len(feeds["conditioning"]) == len(INDICES) + 1, "only distinct frames go in"
    model = SparseControlNetModel.from_pretrained(exported.checkpoints / controlnet)
    width = model.config.cross_attention_dim
    prompt = torch.randn(batch, 77, width, generator=torch.Generator().manual_seed(batch))
    session = sessions.session(f"controlnet_{controlnet}")
    for timestep in (999.0, 499.0, 19.0):
        inputs = {"timestep": np.array([timestep], np.float32), "prompt_embeds": prompt.numpy()}
        with torch.no_grad():
            expected = plain(model, feeds, timestep, prompt)
        for residual, reference in zip(session.run({**inputs, **feeds}), expected, strict=True):
            assert residual.shape == tuple(reference.shape)
            assert reference.std() > 1e-2
            assert np.abs(residual - reference.numpy()).max() <= 1e-5 * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("controlnet", ["scribble", "rgb"])
def test_work_saved_on_distinct_frames(exported: Exported, controlnet: str, tmp_path: Path) -> None:
    """The graph does the plain work minus that of the first spatial layers on repeated frames."""
    pipeline = VideoPipeline.load(exported.bundle, "onnxruntime")
    asked = request(pipeline, controlnet)
    sessions = opened(pipeline, asked)
    feeds = keyframe_feeds(sessions, asked)
    model = SparseControlNetModel.from_pretrained(exported.checkpoints / controlnet)
    prompt = torch.randn(1, 77, model.config.cross_attention_dim)
    # the counter does not support flash attention on the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        plain(model, feeds, 499.0, prompt)
    counts = {
        name.removeprefix("SparseControlNetModel."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }
    repeated = {
        "conv_in": FRAMES,  # its input is zero, so only its bias remains
        "controlnet_cond_embedding": FRAMES - len(feeds["conditioning"]),
        "controlnet_down_blocks.0": FRAMES - len(feeds["conditioning"]),
        "down_blocks.0.resnets.0": FRAMES - len(feeds["conditioning"]),
        "down_blocks.0.attentions.0": FRAMES - len(feeds["conditioning"]),
    }
    saved = sum(counts[name] * frames / FRAMES for name, frames in repeated.items())
    inputs = {"timestep": np.array([499.0], np.float32), "prompt_embeds": prompt.numpy(), **feeds}
    path = exported.bundle / pipeline.bundle.graph(f"controlnet_{controlnet}").path
    actual = count_flops(path, inputs, tmp_path)
    plain_flops = counter.get_total_flops()
    text_once = _repeated_text_flops(model, prompt)
    assert saved > 0.05 * plain_flops
    assert actual == pytest.approx(plain_flops - saved - text_once, rel=0.02)


def _repeated_text_flops(model: SparseControlNetModel, prompt: torch.Tensor) -> float:
    """Operations of the text's keys and values, which diffusers projects once per frame."""
    layers = [module for name, module in model.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    text_layers = [layer for layer in layers if layer.in_features == prompt.shape[-1]]
    first = len(
        [
            name
            for name, _ in model.named_modules()
            if name.startswith("down_blocks.0.attentions.0") and name.endswith(("attn2.to_k", "attn2.to_v"))
        ]
    )
    flops = [2 * prompt.shape[1] * layer.in_features * layer.out_features for layer in text_layers]
    # in the first layers, repeated frames are already counted as saved
    return sum(flops[first:]) * (FRAMES - 1) + sum(flops[:first]) * (len(INDICES) + 1 - 1)


class Counting:
    """Sessions that record which graphs are opened, and each run."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.opened: list[str] = []
        self.calls: list[str] = []

    def open(self, graph: str, dimensions: dict[str, int]) -> None:
        self.opened.append(graph)
        self.sessions.open(graph, dimensions)

    def session(self, graph: str):
        session, calls = self.sessions.session(graph), self.calls

        class Noted:
            def run(self, feeds):
                calls.append(graph)
                return session.run(feeds)

        return Noted()


def test_residuals_are_computed_ahead_and_kept_for_the_next_seed() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    counting = pipeline.executor.sessions = Counting(pipeline.executor.sessions)
    keyframes = [Keyframe(index, image) for index, image in zip(INDICES, pictures(3, 128, 128), strict=True)]
    first = pipeline.generate("a boat", keyframes, seed=1, **SHORT)
    order = [graph for graph in counting.calls if graph in ("controlnet_scribble", "unet")]
    assert order == ["controlnet_scribble"] * 2 + ["unet"] * 2
    assert "control" in first.timings

    counting.opened.clear()
    counting.calls.clear()
    second = pipeline.generate("a boat", keyframes, seed=2, **SHORT)
    assert set(counting.opened) == set(counting.calls) == {"unet", "lcm_update", "vae_decoder"}
    assert "control" not in second.timings
    fresh = VideoPipeline.load(backend="onnxruntime").generate("a boat", keyframes, seed=2, **SHORT)
    assert (second.frames == fresh.frames).all()

    counting.calls.clear()
    pipeline.generate("a boat", [*keyframes[:2], Keyframe(FRAMES - 2, keyframes[2].image)], seed=2, **SHORT)
    assert counting.calls.count("controlnet_scribble") == 2, "another frame index changes the conditioning"


@pytest.mark.parametrize("other", [{"width": 96, "height": 64}, {"num_frames": 4}, {"context_length": 4}])
def test_what_is_kept_is_for_one_size(other: dict[str, int]) -> None:
    """Keyframes of one colour have the same bytes in clips of as many pixels."""
    size = {"width": 64, "height": 96, "num_frames": 6, "num_inference_steps": 1, "controlnet": "rgb"}
    keyframes = [Keyframe(0, np.full((8, 8, 3), 90, np.uint8))]
    pipeline = VideoPipeline.load(backend="onnxruntime")
    pipeline.generate("a boat", keyframes, seed=1, **size)
    frames = pipeline.generate("a boat", keyframes, seed=1, **size | other).frames
    fresh = VideoPipeline.load(backend="onnxruntime").generate("a boat", keyframes, seed=1, **size | other)
    assert (frames == fresh.frames).all()


def test_another_scale_runs_no_sparsectrl_and_other_steps_run_only_theirs() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    counting = pipeline.executor.sessions = Counting(pipeline.executor.sessions)
    request = {"keyframes": [Keyframe(0, pictures(1, 64, 64)[0])], "seed": 1, "num_frames": 4, **SHORT}
    clips, runs = [], []
    for options in (
        {},
        {"conditioning_scale": 0.5},
        {"control_guidance_end": 0.5},
        {"control_guidance_start": 0.5},
        {"conditioning_scale": 0},
        {"control_guidance_start": 0.1, "control_guidance_end": 0.6},
        {"keyframes": ()},
    ):
        clips.append(pipeline.generate("a boat", **request | options).frames)
        runs.append(counting.calls.count("controlnet_scribble"))
        counting.calls.clear()
        counting.opened.clear()
    assert runs == [2, 0, 1, 1, 0, 0, 0]
    assert (clips[4] == clips[6]).all()
    assert (clips[5] == clips[6]).all(), "no step lies within 0.1 and 0.6"
    for index, clip in enumerate(clips[:5]):
        assert all(np.abs(clip.astype(int) - other).max() > 3 for other in clips[:index])


def test_residuals_beyond_the_memory_bound_are_computed_step_by_step() -> None:
    keyframes = [Keyframe(0, pictures(1, 128, 128)[0])]
    pipeline = VideoPipeline.load(backend="onnxruntime", kept_bytes=100_000)
    counting = pipeline.executor.sessions = Counting(pipeline.executor.sessions)
    clip = pipeline.generate("a boat", keyframes, seed=1, **SHORT)
    order = [graph for graph in counting.calls if graph in ("controlnet_scribble", "unet")]
    assert order == ["controlnet_scribble", "unet"] * 2
    counting.opened.clear()
    pipeline.generate("a boat", keyframes, seed=2, **SHORT)
    assert set(counting.opened) == {"controlnet_scribble", "unet", "lcm_update", "vae_decoder"}
    fresh = VideoPipeline.load(backend="onnxruntime").generate("a boat", keyframes, seed=1, **SHORT)
    assert (clip.frames == fresh.frames).all()


def test_the_cache_drops_the_least_recently_used() -> None:
    from sparsectrl_lcm.runtime.loop.conditioning import Conditioning

    def entry(count: int) -> Conditioning:
        return Conditioning(np.zeros(count // 4, np.uint8), {"conditioning": np.zeros(count - count // 4, np.uint8)})

    cache = ConditioningCache(max_bytes=100)
    cache.put("a", entry(40))
    cache.put("b", entry(40))
    assert cache.get("a") is not None
    cache.put("c", entry(40))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("d", entry(101))
    assert cache.get("d") is None
    assert cache.get("c") is not None, "an entry that cannot fit evicts nothing"
    assert cache.reserve(50)
    assert cache.get("a") is None, "entries are evicted before the new residuals are computed"
    assert cache.get("c") is not None
