"""The modules to trace, compared with diffusers' models before any graph is written.

The architecture has what the exported one of the quick tests has not: several layers in a block, heads that differ by
level, motion in the middle block, linear projections, and keyframes in BGR.
"""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from diffusers import MotionAdapter, SparseControlNetModel, UNet2DConditionModel, UNetMotionModel
from sparsectrl_lcm.benchmarks.random_checkpoints import write_checkpoints
from sparsectrl_lcm.export.plan import ExportOptions, Job, plan_jobs, read_parts
from transformers import CLIPTextModel


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), ARCHITECTURES["other"])


@pytest.fixture(scope="module")
def jobs(parts: dict[str, Path]) -> dict[str, Job]:
    options = ExportOptions(
        base=str(parts["base"]),
        motion_adapter=str(parts["motion_adapter"]),
        controlnets={"scribble": str(parts["scribble"]), "rgb": str(parts["rgb"])},
        temporal_norm="clip",
    )
    return {job.spec.name: job for job in plan_jobs(read_parts(options))}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_text_encoder(parts: dict[str, Path], jobs: dict[str, Job]) -> None:
    """Hidden tokens as in transformers, skipped layers as in diffusers' `encode_prompt`."""
    model = CLIPTextModel.from_pretrained(parts["base"] / "text_encoder").eval()
    module = jobs["text_encoder"].build().eval()
    for input_ids, attention_mask, _ in jobs["text_encoder"].check_inputs():
        found = model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        for clip_skip in range(model.config.num_hidden_layers):
            expected = model.final_layer_norm(found.hidden_states[-(clip_skip + 1)])
            assert_close(module(input_ids, attention_mask, torch.tensor([clip_skip])), expected)


@torch.no_grad()
def test_the_unet(parts: dict[str, Path], jobs: dict[str, Job]) -> None:
    unet = UNet2DConditionModel.from_pretrained(parts["base"], subfolder="unet")
    model = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(parts["motion_adapter"])).eval()
    module = jobs["unet"].build().eval()
    for latents, timestep, prompt_embeds, scale, *residuals in jobs["unet"].check_inputs():
        assert 0 < scale < 1
        scaled = [residual * scale for residual in residuals]  # as diffusers' SparseControlNetModel does
        expected = model(
            latents.expand(len(prompt_embeds), -1, -1, -1, -1),
            timestep,
            prompt_embeds.repeat_interleave(latents.shape[2], 0),
            down_block_additional_residuals=scaled[:-1],
            mid_block_additional_residual=scaled[-1],
        ).sample
        assert_close(module(latents, timestep, prompt_embeds, scale, *residuals), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_sparsectrl(kind: str, parts: dict[str, Path], jobs: dict[str, Job]) -> None:
    """diffusers gets all frames; the module gets the distinct ones and where they stand."""
    model = SparseControlNetModel.from_pretrained(parts[kind]).eval()
    job = jobs[f"controlnet_{kind}"]
    module = job.build().eval()
    for timestep, prompt_embeds, conditioning, mask, frame_index in job.check_inputs():
        pixels = conditioning.permute(0, 3, 1, 2) / 255 if kind == "scribble" else conditioning
        batch, frames = len(prompt_embeds), len(frame_index)
        clip = pixels[frame_index].transpose(0, 1).expand(batch, -1, -1, -1, -1)  # [B, C, F, H, W]
        shown = mask[frame_index][None, None, :, None, None].expand(batch, 1, -1, *clip.shape[3:])
        *_, height, width = module(timestep, prompt_embeds, conditioning, mask, frame_index)[0].shape
        down, middle = model(
            torch.zeros(batch, model.config.in_channels, frames, height, width),
            timestep,
            prompt_embeds.repeat_interleave(frames, 0),
            clip,
            conditioning_mask=shown,
            return_dict=False,
        )
        residuals = module(timestep, prompt_embeds, conditioning, mask, frame_index)
        for actual, expected in zip(residuals, [*down, middle], strict=True):
            assert_close(actual, expected)
