"""The norms of AnimateDiff v1, compared with an independent implementation of the original's configuration.

guoyww/AnimateDiff runs v1 motion modules with `use_inflated_groupnorm: false`: its ResNet blocks then normalize states
[B, C, F, h, w] with torch's own GroupNorm, whose statistics cover all frames. Its motion modules and spatial
transformers fold the frames into the batch first. So diffusers' UNet is changed to that here.
"""

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from references import normalize_per_frame
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, motion_adapter, randomize, unet
from sparsectrl_lcm.engine.check import round_results, run_portable
from sparsectrl_lcm.engine.rewrites.channels_last import norm_by_channels
from sparsectrl_lcm.engine.rewrites.nhwc_group_norm import fuse_nhwc_group_norms
from sparsectrl_lcm.engine.rewrites.precision import assign_types
from sparsectrl_lcm.engine.rewrites.typed_graph import fuse_for_tensorrt, write_typed
from sparsectrl_lcm.export.graph_specs import GraphSpec, Input
from sparsectrl_lcm.export.module_replacement import FrameCount, normalize_over_clips
from sparsectrl_lcm.export.onnx_file import trace, write
from sparsectrl_lcm.export.traced_modules import UNet
from torch import nn

FRAMES = 3


class NotInflated(nn.Module):
    """torch's GroupNorm on states [B, C, F, h, w], for blocks that get [B*F, C, h, w]."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        clips = states.unflatten(0, (-1, FRAMES)).permute(0, 2, 1, 3, 4)
        return self.norm(clips).permute(0, 2, 1, 3, 4).flatten(0, 1)


def as_original_v1(model: UNetMotionModel) -> UNetMotionModel:
    """Changes diffusers' model to the norms of the original code with the configuration of v1."""
    normalize_per_frame(model)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1, module.norm2 = NotInflated(module.norm1), NotInflated(module.norm2)
    model.conv_norm_out = NotInflated(model.conv_norm_out)
    return model


@torch.no_grad()
@pytest.mark.parametrize("mode", ["resnet-clip", "frame"])
def test_the_unet_of_v1(mode: str) -> None:
    """Within 1e-5 of the original's configuration; the norms of v2 and v3 are far off."""
    arch = Architecture(channels=(16, 32), groups=4, text_width=24)
    model = UNetMotionModel.from_unet2d(randomize(unet(arch), 1), randomize(motion_adapter(arch), 2)).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, FRAMES, 8, 6, generator=generator)
    latents *= torch.linspace(0.2, 3, FRAMES)[:, None, None]  # so that statistics of frames and clips differ
    prompts = torch.randn(2, 5, arch.text_width, generator=generator)
    timestep = torch.tensor([499.0])
    residuals = [torch.zeros(1, 1, 1, 1)] * 5
    actual = UNet(copy.deepcopy(model), mode)(latents, timestep, prompts, torch.ones(1), *residuals)
    expected = as_original_v1(model)(
        latents.expand(2, -1, -1, -1, -1), timestep, prompts.repeat_interleave(FRAMES, 0)
    ).sample
    error = (actual - expected).abs().max() / expected.abs().max()
    assert (error <= 1e-5) if mode == "resnet-clip" else (error > 0.05)


class Norms(nn.Module):
    """A ResNet block and a last norm, named as in the UNet: clips [B, C, F, h, w] -> [B*F, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(in_channels=24, groups=4, temb_channels=None)])
        self.conv_norm_out = nn.GroupNorm(4, 24)
        randomize(self, 3)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.conv_norm_out(self.resnets[0](clips.transpose(1, 2).flatten(0, 1), None))


class Traced(nn.Module):
    """The same with this package's norms."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Norms()
        self.frame_count = FrameCount()
        normalize_over_clips(self.model, self.frame_count)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.frame_count.value = clips.shape[2]
        return self.model(clips)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v1") / "norms.onnx"
    spec = GraphSpec("norms", (Input("x", ("batch", 24, "frames", "h", "w")),), (("y", ("images", 24, "h", "w")),))
    sample = spec.sample_inputs({"batch": 2, "frames": 4, "h": 5, "w": 7}, seed=0)
    write(trace(Traced().eval(), spec, sample), path, lambda _: "norms.weights")
    return path


@pytest.mark.parametrize(
    ("rewritten", "bound"), [("as exported", 1e-5), ("by channels", 1e-5), ("fp16", 1e-2), ("bf16", 5e-2)]
)
def test_every_graph_with_norms_over_clips(rewritten: str, bound: float, portable: Path, tmp_path: Path) -> None:
    """As exported, with OpenVINO's statistics by channel, and in the low precisions, where the norms stay in fp32."""
    model = ir.load(portable)
    if rewritten == "by channels":
        assert norm_by_channels(model) == 3
        assert "Reciprocal" not in {node.op_type for node in model.graph}
    elif rewritten != "as exported":
        assert fuse_nhwc_group_norms(model) == 0  # ONNX Runtime's kernel is for frames
        fuse_for_tensorrt(model)
        assign_types(model, rewritten)
        round_results(model)
    clips = torch.randn(2, 24, FRAMES, 6, 9, generator=torch.Generator().manual_seed(1))
    clips = (clips + 2) * torch.linspace(0.2, 3, FRAMES)[:, None, None]
    reference = Norms()
    for resnet in reference.resnets:
        resnet.norm1, resnet.norm2 = NotInflated(resnet.norm1), NotInflated(resnet.norm2)
    reference.conv_norm_out = NotInflated(reference.conv_norm_out)
    with torch.no_grad():
        expected = reference(clips).numpy()
    path = tmp_path / "rewritten.onnx"
    write_typed(model, path)
    (outputs,) = run_portable(path, {"x": clips.numpy()})
    assert np.abs(outputs["y"] - expected).max() <= bound * np.abs(expected).max()
