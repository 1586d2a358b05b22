"""Long clips: a plain loop over diffusers' modules, a GPU on an emulated device, options, progress and memory."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Exported
from fakes.gpu_emulation import PortableGraphs, emulate
from pictures import pictures
from references import sparsectrl_pipeline
from sparsectrl_lcm.runtime import Cancelled, ClipRequest, InvalidRequest, Keyframe, Progress, VideoPipeline
from sparsectrl_lcm.runtime.checked_request import check_request
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.loop.conditioning import ConditioningCache

FRAMES, LENGTH, OVERLAP = 24, 8, 4
INDICES = (0, 9, 23)
PROMPT, NEGATIVE = "a red circle moves right", "blue small square"
LONG: dict[str, Any] = {
    "num_frames": FRAMES,
    "context_length": LENGTH,
    "context_overlap": OVERLAP,
    "num_inference_steps": 2,
    "seed": 3,
}


def keyframes(images: list[Any]) -> list[Keyframe]:
    return [Keyframe(index, image) for index, image in zip(INDICES, images, strict=True)]


@torch.no_grad()
def diffusers_frames(pipe: Any, side: int, images: list[Any], guidance: float) -> np.ndarray:
    """The clip of diffusers' modules, window by window: frames uint8 [F, H, W, 3]."""
    negative_first = [NEGATIVE, PROMPT] if guidance > 1 else [PROMPT]
    embeds = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in negative_first])
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images], dim=1)
    pipe.scheduler.set_timesteps(2)
    generator = torch.Generator("cpu").manual_seed(3)
    latents = torch.randn((1, 4, FRAMES, side // 8, side // 8), generator=generator)
    others = [frame for frame in range(FRAMES) if frame not in INDICES]
    spread = [sorted([*INDICES, *others[first::4][:5]]) for first in range(5)]
    overlapping = [list(range(start, start + LENGTH)) for start in range(0, FRAMES - LENGTH + 1, LENGTH - OVERLAP)]
    flat, pyramid = torch.ones(LENGTH), torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])
    for timestep, windows, weights in zip(
        pipe.scheduler.timesteps, (spread, overlapping), (flat, pyramid), strict=True
    ):
        total, shares = torch.zeros(len(embeds), *latents.shape[1:]), torch.zeros(FRAMES)
        for window in windows:
            inside = [index for index in INDICES if index in window]
            places = [window.index(index) for index in inside]
            condition = torch.zeros(len(embeds), 3, LENGTH, side, side)
            mask = torch.zeros(len(embeds), 1, LENGTH, side, side)
            condition[:, :, places] = pixels[None, :, [INDICES.index(index) for index in inside]]
            mask[:, :, places] = 1
            noisy = latents[:, :, window].repeat(len(embeds), 1, 1, 1, 1)
            down, middle = pipe.controlnet(
                noisy, timestep, embeds, condition, conditioning_mask=mask, return_dict=False
            )
            prediction = pipe.unet(
                noisy,
                timestep,
                embeds,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
            total[:, :, window] += prediction * weights[:, None, None]
            shares[window] += weights
        blended = total / shares[:, None, None]
        guided = blended[:1] + guidance * (blended[-1:] - blended[:1]) if guidance > 1 else blended
        step = pipe.scheduler.step(guided, timestep, latents, generator=generator)
        latents = step.prev_sample
    decoded = pipe.decode_latents(step.denoised)[0]
    return ((decoded.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_frames_are_those_of_a_loop_over_diffusers_modules(sd15_like: Exported, guidance: float) -> None:
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    side = pipeline.bundle.manifest.sizes.height
    images = pictures(len(INDICES), side, side, seed=1)
    expected = diffusers_frames(sparsectrl_pipeline(sd15_like.checkpoints, "scribble"), side, images, guidance)
    options = {"guidance_scale": guidance, "negative_prompt": NEGATIVE, **LONG}
    clip = pipeline.generate(PROMPT, keyframes(images), height=side, width=side, **options)
    assert expected.std() > 10, "a flat clip would prove nothing"
    assert np.abs(clip.frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_frames_of_a_gpu_are_those_of_the_cpu(kept_bytes: int) -> None:
    """Both kinds of keyframes, guidance and neither; kept residuals and residuals of each step."""
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle), kept_bytes=kept_bytes)
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(backend="onnxruntime")
    images = pictures(len(INDICES), 64, 64)
    requests: list[dict[str, Any]] = [{"controlnet": "rgb", "guidance_scale": 2.0, "control_guidance_end": 0.5}, {}]
    for options in requests if kept_bytes else requests[:1]:
        given = LONG | {"width": 64, "height": 64, "num_frames": 13, "context_length": 6, "context_overlap": 2}
        given |= {"keyframes": [Keyframe(4 * place, image) for place, image in enumerate(images)], **options}
        expected = host.generate(PROMPT, **given).frames
        assert expected.std() > 10
        runs = [device.generate(PROMPT, **given).frames for _ in range(2)]  # the second with kept residuals
        assert np.abs(runs[0].astype(int) - expected).max() <= 1, options
        np.testing.assert_array_equal(runs[0], runs[1])
    controls = machine.loader.enqueued.count("controlnet_rgb")
    assert controls == (4 * 2 if kept_bytes else 4 * 2 * 2), "windows of the first step, for each prompt"


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


def test_progress_and_frames_come_in_order(pipeline: VideoPipeline) -> None:
    """Frames that the last part decodes again are handed over once."""
    seen: list[Progress] = []
    parts: list[tuple[int, np.ndarray]] = []
    clip = pipeline.generate(
        PROMPT,
        [Keyframe(-1, pictures(1, 64, 64)[0])],
        **LONG | {"num_frames": 21, "width": 64, "height": 64},
        on_progress=seen.append,
        on_frames=lambda first, frames: parts.append((first, frames.copy())),
    )
    assert [first for first, _ in parts] == [*np.cumsum([0, *(len(frames) for _, frames in parts[:-1])])]
    assert (np.concatenate([frames for _, frames in parts]) == clip.frames).all()
    for stage, steps in {"control": 4 + 5, "denoise": 4 + 5, "decode": 3}.items():
        assert [item.step for item in seen if item.stage == stage] == list(range(steps + 1)), stage
    fractions = [item.fraction for item in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_a_long_clip_can_be_cancelled_between_windows(pipeline: VideoPipeline) -> None:
    def stop(done: Progress) -> bool:
        return (done.stage, done.step) != ("denoise", 2)

    with pytest.raises(Cancelled, match="denoise 2 of"):
        pipeline.generate(PROMPT, **LONG | {"width": 64, "height": 64}, on_progress=stop)


def test_without_memory_for_residuals_the_frames_are_the_same() -> None:
    """Then each window computes its own: only prompt and keyframes are kept, whatever the length of the clip."""
    kept = {}
    images = pictures(2, 64, 64)
    for kept_bytes in (1 << 30, 1 << 20):
        pipeline = VideoPipeline.load(backend="onnxruntime", kept_bytes=kept_bytes)
        options = LONG | {"width": 64, "height": 64, "num_frames": 12}
        clip = pipeline.generate(PROMPT, [Keyframe(1, images[0]), Keyframe(-1, images[1])], **options)
        cache: ConditioningCache = pipeline.executor.cache  # type: ignore[attr-defined]
        (entry,) = cache._entries.values()
        kept[kept_bytes] = clip.frames, entry
    (frames, all_kept), (others, little) = kept.values()
    np.testing.assert_array_equal(frames, others)
    assert all_kept.residuals is not None
    assert little.residuals is None
    assert little.nbytes < 100_000 < all_kept.nbytes


def test_windows_are_chosen_by_the_number_of_frames(pipeline: VideoPipeline) -> None:
    """Clips that the backend can make in one piece are; others take windows of the bundle's number of frames."""
    manifest = pipeline.bundle.manifest

    def chosen(in_one_piece: bool = True, **options: Any) -> tuple[int | None, int]:
        checked = check_request(ClipRequest(PROMPT, **options), manifest, lambda size: in_one_piece)
        return checked.context_length, checked.context_overlap

    assert chosen() == chosen(num_frames=32) == (None, 0)
    assert chosen(num_frames=33) == chosen(num_frames=128) == (16, 8)
    assert chosen(False, num_frames=24) == (16, 8)
    assert chosen(False, num_frames=16) == chosen(False, num_frames=8) == (None, 0), "no window is shorter"
    assert chosen(num_frames=24, context_length=12) == (12, 6)
    assert chosen(num_frames=24, context_length=12, context_overlap=0) == (12, 0)
    assert chosen(num_frames=24, context_length=24) == chosen(num_frames=8, context_length=12) == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 129}, "num_frames: 129 is not allowed; give a whole number from 1 to 128"),
        ({"context_length": 3}, "context_length: 3 is not allowed; give a whole number from 4 to 32"),
        ({"context_length": 33}, "context_length: 33 .* from 4 to 32"),
        ({"num_frames": 64, "context_overlap": 16}, "context_overlap: 16 is not allowed; .* from 0 to 15"),
        ({"num_frames": 64, "context_length": 8, "context_overlap": 8}, "context_overlap: 8 .* from 0 to 7"),
        ({"context_overlap": True}, "context_overlap: True"),
    ],
)
def test_bad_windows_are_named(pipeline: VideoPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline.generate(PROMPT, **options)


def test_a_gpu_without_engines_for_all_frames_takes_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle))
    executor, slots = machine.executor, machine.loader.keyframe_slots

    def only_16_frames(bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        if size.frames != 16:
            raise BackendError("backend", "engines were not built")
        return int(slots(bundle, size, keyframes))

    monkeypatch.setattr(machine.loader, "keyframe_slots", only_16_frames)
    sizes = [ClipSize(width=64, height=64, frames=frames) for frames in (16, 24)]
    assert [executor.in_one_piece(size) for size in sizes] == [True, False]
    checked = check_request(ClipRequest(PROMPT, num_frames=24), bundle.manifest, executor.in_one_piece)
    assert checked.window_size == checked.clip_size.model_copy(update={"frames": 16})
