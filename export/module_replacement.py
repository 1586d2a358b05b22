"""Replace modules of a library by modules of this package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def replace_modules(model: nn.Module, kind: type[Module], build: Callable[[Module], nn.Module]) -> None:
    """Replaces every module of `kind` inside `model` by `build(module)`."""
    for name, child in model.named_children():
        if isinstance(child, kind):
            setattr(model, name, build(child))
        else:
            replace_modules(child, kind, build)


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494), computed as an instance norm of each group.

    ONNX defines the variance of GroupNormalization as E[x^2] - E[x]^2, and ONNX Runtime's CPU provider computes it
    that way. If the mean is ten standard deviations, its error is 30 times that of InstanceNormalization, which also
    takes half the time.
    """

    def __init__(self, source: nn.GroupNorm) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.num_groups = source.num_groups
        self.eps = source.eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, ...] to the same shape."""
        affine = (-1, *(1,) * (states.ndim - 2))
        return self.normalize(states) * self.weight.reshape(affine) + self.bias.reshape(affine)

    def normalize(self, states: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance in each group."""
        groups = states.reshape(states.shape[0], self.num_groups, -1)
        return F.instance_norm(groups, eps=self.eps).reshape(states.shape)


class ClipGroupNorm(GroupNorm):
    """GroupNorm of [B, C, F, h*w] with statistics over a whole clip.

    A group has up to a million values, and ONNX Runtime's CPU provider sums them one after the other. This module sums
    over the pixels first, then over frames and channels: three times slower, with a tenth of the error.
    """

    def normalize(self, states: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance in each group."""
        groups = states.reshape(states.shape[0], self.num_groups, -1, states.shape[-1])
        centred = groups - groups.mean(-1, keepdim=True).mean(-2, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True).mean(-2, keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps)).reshape(states.shape)


@dataclass(slots=True)
class FrameCount:
    """The number of frames of a clip, for modules that get the frames of all clips as one batch."""

    value: int = 1


class FramesGroupNorm(GroupNorm):
    """GroupNorm of the frames [B*F, C, h, w] of clips, with statistics over all frames of each clip.

    It adds pixels first, for the same reason as `ClipGroupNorm`.
    """

    def __init__(self, source: nn.GroupNorm, frame_count: FrameCount) -> None:
        super().__init__(source)
        self.frame_count = frame_count

    def normalize(self, states: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance in each group of a clip."""
        _, channels, height, width = states.shape
        groups = states.reshape(
            -1, self.frame_count.value, self.num_groups, channels // self.num_groups, height * width
        )  # [B, F, G, C/G, h*w]
        centred = groups - groups.mean(-1, keepdim=True).mean((1, 3), keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True).mean((1, 3), keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps)).reshape(states.shape)


def normalize_over_clips(unet: UNetMotionModel, frame_count: FrameCount) -> None:
    """Makes the norms of all ResNet blocks, and the last one, take their statistics over whole clips.

    AnimateDiff v1 was trained so: `use_inflated_groupnorm: false` in guoyww/AnimateDiff's inference-v1.yaml. The norms
    of its attentions see each frame on its own. So do all norms of SparseCtrl.

    Args:
        unet: the model.
        frame_count: set before each run.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1 = FramesGroupNorm(module.norm1, frame_count)
            module.norm2 = FramesGroupNorm(module.norm2, frame_count)
    unet.conv_norm_out = FramesGroupNorm(unet.conv_norm_out, frame_count)
