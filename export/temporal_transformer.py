"""The temporal transformer of AnimateDiff, with a choice of statistics for its first norm."""

from typing import Any

import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from ..runtime.format.manifest import TemporalNorm
from .module_replacement import ClipGroupNorm, replace_modules

__all__ = ["TemporalNorm", "TemporalTransformer", "replace_temporal_transformers"]


class TemporalTransformer(nn.Module):
    """Self-attention over the frames of each pixel, added to its input.

    Reuses the submodules of a diffusers `AnimateDiffTransformer3D`, so every weight keeps its checkpoint name.

    Args:
        source: the module whose weights are used.
        temporal_norm: what the first GroupNorm takes its statistics over: the whole `clip`, as in diffusers, or else
            each frame, as in the original AnimateDiff code (guoyww/AnimateDiff, motion_module.py) that the public
            checkpoints were trained with.
    """

    def __init__(self, source: AnimateDiffTransformer3D, temporal_norm: TemporalNorm) -> None:
        super().__init__()
        self.norm = ClipGroupNorm(source.norm) if temporal_norm == "clip" else source.norm
        self.proj_in = source.proj_in
        self.transformer_blocks = source.transformer_blocks
        self.proj_out = source.proj_out
        self.over_clip = temporal_norm == "clip"

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        timestep: None = None,
        class_labels: None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Maps [B*F, C, h, w] to the same shape; the diffusers blocks pass the arguments in this order."""
        _, channels, height, width = hidden_states.shape
        layout = (-1, num_frames, channels, height * width)
        if self.over_clip:
            states = self.norm(hidden_states.reshape(layout).transpose(1, 2))  # [B, C, F, h*w]
            states = states.permute(0, 3, 2, 1)
        else:  # before frames and pixels change places: the norm is then one of images like any other
            states = self.norm(hidden_states).reshape(layout).permute(0, 3, 1, 2)
        states = self.proj_in(states.reshape(-1, num_frames, channels))  # [B*h*w, F, C]
        for block in self.transformer_blocks:
            states = block(states)
        states = self.proj_out(states).reshape(-1, height * width, num_frames, channels)
        states = states.permute(0, 2, 3, 1).reshape(hidden_states.shape)
        return hidden_states + states


def replace_temporal_transformers(model: nn.Module, temporal_norm: TemporalNorm) -> None:
    """Replaces every `AnimateDiffTransformer3D` in `model` by a `TemporalTransformer`."""
    replace_modules(model, AnimateDiffTransformer3D, lambda source: TemporalTransformer(source, temporal_norm))
