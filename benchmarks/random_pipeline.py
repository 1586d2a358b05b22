"""diffusers' pipeline for AnimateDiff with SparseCtrl and LCM, with random weights made on the device."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffSparseControlNetPipeline, LCMScheduler, UNetMotionModel
from transformers import CLIPTokenizer

from . import random_checkpoints as parts
from .random_checkpoints import Architecture


def sparsectrl_pipeline(folder: Path, arch: Architecture, device: str, dtype: torch.dtype) -> Any:
    """The pipeline with torch's default weights; some of SparseCtrl's are zero, which does not change its speed.

    Args:
        folder: gets the tokenizer, which diffusers reads from files.
        arch: sizes of the models.
        device: where the models are made.
        dtype: of the weights.
    """
    vocabulary = parts.write_tokenizer(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            motion = parts.motion_adapter(arch)
            models = {
                "vae": parts.vae(arch),
                "text_encoder": parts.text_encoder(arch, vocabulary),
                "unet": UNetMotionModel.from_unet2d(parts.unet(arch), motion),
                "motion_adapter": motion,
                "controlnet": parts.controlnet(arch, "scribble"),
            }
    finally:
        torch.set_default_dtype(before)
    pipe = AnimateDiffSparseControlNetPipeline(
        **{name: model.eval().requires_grad_(False) for name, model in models.items()},
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        scheduler=LCMScheduler.from_config(parts.scheduler().config, beta_schedule="linear"),
    )
    pipe = pipe.to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
