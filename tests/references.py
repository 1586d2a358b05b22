"""The independent reference: diffusers' own pipelines on the same checkpoints."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers.pipelines.animatediff.pipeline_animatediff_sparsectrl as sparsectrl
import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSparseControlNetPipeline,
    AutoencoderKL,
    DDIMScheduler,
    LCMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer


def _parts(checkpoints: Path) -> dict[str, Any]:
    """Copies, which a pipeline may change."""
    return deepcopy(_loaded(checkpoints))


@lru_cache(2)
def _loaded(checkpoints: Path) -> dict[str, Any]:
    base = checkpoints / "base"
    scheduler = DDIMScheduler.from_pretrained(base / "scheduler")
    return {
        "vae": AutoencoderKL.from_pretrained(base / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(base / "text_encoder", dtype="float32"),
        "tokenizer": CLIPTokenizer.from_pretrained(base / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(base / "unet"),
        "motion_adapter": MotionAdapter.from_pretrained(checkpoints / "motion_adapter"),
        "scheduler": LCMScheduler.from_config(scheduler.config, beta_schedule="linear"),
    }


def sparsectrl_pipeline(checkpoints: Path, controlnet: str) -> AnimateDiffSparseControlNetPipeline:
    """diffusers' pipeline, but rgb keyframes are encoded to the mode of the VAE's posterior instead of a sample."""
    retrieve = diffusers_retrieve_latents
    sparsectrl.retrieve_latents = lambda output: retrieve(output, sample_mode="argmax")
    model = SparseControlNetModel.from_pretrained(checkpoints / controlnet)
    pipe = AnimateDiffSparseControlNetPipeline(controlnet=model, **_parts(checkpoints))
    pipe.set_progress_bar_config(disable=True)
    return pipe


diffusers_retrieve_latents = sparsectrl.retrieve_latents


def animatediff_pipeline(checkpoints: Path) -> AnimateDiffPipeline:
    """diffusers' AnimateDiff pipeline, without SparseCtrl."""
    pipe = AnimateDiffPipeline(**_parts(checkpoints))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control_keeps(steps: int, start: float, end: float) -> list[float]:
    """For each step the factor on the scale, in the words of diffusers' `StableDiffusionControlNetPipeline`."""
    return [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]


class _PerFrame(nn.Module):
    """A GroupNorm over each frame on its own. diffusers passes states [B, C, F, h, w]."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        frames = [self.norm(states[:, :, index]) for index in range(states.shape[2])]
        return torch.stack(frames, dim=2)


def normalize_per_frame(model: nn.Module) -> None:
    """Changes diffusers' model to the temporal norm of the original AnimateDiff code."""
    for module in model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm = _PerFrame(module.norm)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Converts diffusers' frames in 0..1 to levels in 0..255."""
    return (frames * 255).round().astype(np.uint8)
