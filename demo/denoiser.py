"""The denoising part of the model: text encoder, UNet with motion modules, both kinds of SparseCtrl."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from clips import Batch
from diffusers import MotionAdapter, SparseControlNetModel, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from networks import (
    KINDS,
    make_controlnet,
    make_motion_adapter,
    make_schedule,
    make_spatial_unet,
    make_text_encoder,
)
from sparsectrl_lcm.benchmarks.random_checkpoints import write_index
from sparsectrl_lcm.export.temporal_transformer import TemporalTransformer, replace_temporal_transformers
from torch import Tensor, nn
from transformers import CLIPTextModel


class Denoiser(nn.Module):
    """Text encoder, UNet with motion modules, and both kinds of SparseCtrl.

    Args:
        folder: the tokenizer is written to its `tokenizer`, as in a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(folder / "tokenizer")
        self.unet = UNetMotionModel.from_unet2d(make_spatial_unet(), make_motion_adapter())
        self.controlnets = nn.ModuleDict({kind: make_controlnet(kind) for kind in KINDS})
        replace_temporal_transformers(self, "frame")
        for module in self.modules():  # motion modules start without effect, like SparseCtrl
            if isinstance(module, TemporalTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        self.register_buffer("alphas", make_schedule().alphas_cumprod, persistent=False)

    def motion_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all motion modules."""
        modules = [module for module in self.modules() if isinstance(module, TemporalTransformer)]
        return [parameter for module in modules for parameter in module.parameters()]

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of picture and of noise at a timestep [B], each [B, 1, 1, 1, 1]."""
        alphas = self.alphas[timestep][:, None, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def original(self, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Predicts the clip without noise from latents [B, 4, F, h, w] at a timestep [B]."""
        alpha, sigma = self.levels(timestep)
        return alpha * latents - sigma * self(latents, timestep, batch)

    @contextmanager
    def showing(self, frames: Tensor | None) -> Iterator[None]:
        """Gives the motion modules the positions of these frames [F] of a clip, instead of the first ones."""
        modules = [module for module in self.modules() if isinstance(module, SinusoidalPositionalEmbedding)]
        tables = [module.pe for module in modules]
        for module, table in zip(modules, tables, strict=True):
            module.pe = table if frames is None else table[:, frames]
        try:
            yield
        finally:
            for module, table in zip(modules, tables, strict=True):
                module.pe = table

    def forward(self, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Predicts v for latents [B, 4, F, h, w] at a timestep [B]."""
        frames = latents.shape[2]
        prompt = self.text_encoder(batch.tokens).last_hidden_state.repeat_interleave(frames, 0)  # [B*F, 77, D]
        with self.showing(batch.shown):
            residuals: list[Tensor] = []
            if batch.kind is not None:
                residuals = control(self.controlnets[batch.kind], timestep, prompt, batch, frames)
            return self.unet(
                latents,
                timestep,
                prompt,
                down_block_additional_residuals=residuals[:-1] or None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
            ).sample


def control(model: SparseControlNetModel, timestep: Tensor, prompt: Tensor, batch: Batch, frames: int) -> list[Tensor]:
    """Computes SparseCtrl as diffusers does, but embeds only the keyframes and one blank frame.

    Returns:
        The residuals of the down blocks, then of the middle block, each [B*F, C, h, w].
    """
    size, count = batch.places.shape
    pictures = batch.keyframes.flatten(0, 1)  # [B*K, C, H, W]
    shown = batch.wanted.flatten()[:, None, None, None].float()
    pictures = torch.cat([pictures * shown, shown.expand(-1, 1, *pictures.shape[2:])], 1)
    blank = torch.zeros_like(pictures[:1])
    embedded = model.controlnet_cond_embedding(torch.cat([pictures, blank]))
    index = torch.full((size, frames), size * count, device=pictures.device)
    index.scatter_(1, batch.places, torch.arange(size * count, device=pictures.device).view(size, count))
    sample = embedded.index_select(0, index.flatten()) + model.conv_in.bias[None, :, None, None]

    temb = model.time_embedding(model.time_proj(timestep)).repeat_interleave(frames, 0)
    states = [sample]
    for block in model.down_blocks:
        arguments = {"encoder_hidden_states": prompt} if hasattr(block, "attentions") else {}
        sample, more = block(hidden_states=sample, temb=temb, num_frames=frames, **arguments)
        states += more
    sample = model.mid_block(sample, temb, encoder_hidden_states=prompt)
    down = [project(state) for project, state in zip(model.controlnet_down_blocks, states, strict=True)]
    return [*down, model.controlnet_mid_block(sample)]


def save(denoiser: Denoiser, folder: Path) -> None:
    """Writes the parts in diffusers format: base (without the VAE), motion_adapter, scribble, rgb."""
    weights = denoiser.unet.state_dict()
    base = folder / "base"
    for part, path in ((make_spatial_unet(), base / "unet"), (make_motion_adapter(), folder / "motion_adapter")):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
        part.save_pretrained(path)
    denoiser.text_encoder.save_pretrained(base / "text_encoder")
    make_schedule().save_pretrained(base / "scheduler")
    write_index(base)
    for kind, controlnet in denoiser.controlnets.items():
        controlnet.save_pretrained(folder / kind)


def load(folder: Path, scratch: Path) -> Denoiser:
    """Loads the parts that `save` wrote, in fp32; the tokenizer is written to `scratch`/base."""
    denoiser = Denoiser(scratch / "base")
    denoiser.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "base" / "text_encoder").state_dict())
    spatial = UNet2DConditionModel.from_pretrained(folder / "base" / "unet").state_dict()
    motion = MotionAdapter.from_pretrained(folder / "motion_adapter").state_dict()
    denoiser.unet.load_state_dict(spatial | motion)
    for kind, controlnet in denoiser.controlnets.items():
        controlnet.load_state_dict(SparseControlNetModel.from_pretrained(folder / kind).state_dict())
    return denoiser
