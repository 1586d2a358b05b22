"""Frames of a long clip against a plain loop over diffusers' UNet and SparseCtrl, window by window."""

from typing import Any

import numpy as np
import torch
from closeness import assert_close
from conftest import Exported
from pictures import pictures
from references import sparsectrl_pipeline
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

FRAMES, LENGTH, OVERLAP = 24, 8, 4
INDICES = (0, 9, 23)
PROMPT, NEGATIVE = "a red circle moves right", "blue small square"


@torch.no_grad()
def diffusers_frames(pipe: Any, side: int, images: list[Any], guidance: float) -> np.ndarray:
    """The clip of diffusers' modules, window by window: frames uint8 [F, H, W, 3]."""
    embeds = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (NEGATIVE, PROMPT)])
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
            text = embeds.repeat_interleave(LENGTH, dim=0)
            down, middle = pipe.controlnet(noisy, timestep, text, condition, conditioning_mask=mask, return_dict=False)
            prediction = pipe.unet(
                noisy,
                timestep,
                text,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
            total[:, :, window] += prediction * weights[:, None, None]
            shares[window] += weights
        blended = total / shares[:, None, None]
        guided = blended[:1] + guidance * (blended[1:] - blended[:1])
        step = pipe.scheduler.step(guided, timestep, latents, generator=generator)
        latents = step.prev_sample
    decoded = pipe.decode_latents(step.denoised)[0]
    return ((decoded.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()


def test_frames_are_those_of_a_loop_over_diffusers_modules(sd15_like: Exported) -> None:
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    side = pipeline.bundle.manifest.sizes.height
    images = pictures(len(INDICES), side, side, seed=1)
    expected = diffusers_frames(sparsectrl_pipeline(sd15_like.checkpoints, "scribble"), side, images, 2.0)
    clip = pipeline.generate(
        PROMPT,
        [Keyframe(index, image) for index, image in zip(INDICES, images, strict=True)],
        negative_prompt=NEGATIVE,
        num_inference_steps=2,
        guidance_scale=2.0,
        seed=3,
        height=side,
        width=side,
        num_frames=FRAMES,
        context_length=LENGTH,
        context_overlap=OVERLAP,
    )
    assert expected.std() > 10, "a flat clip would prove nothing"
    assert_close(clip.frames, expected)
