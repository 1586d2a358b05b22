"""The temporal transformer, compared with diffusers and with the per-frame statistics of the original AnimateDiff."""

import pytest
import torch
from diffusers import MotionAdapter
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from references import normalize_per_frame
from sparsectrl_lcm.benchmarks.random_checkpoints import randomize
from sparsectrl_lcm.export.temporal_transformer import TemporalTransformer, replace_temporal_transformers
from torch import nn


def transformer() -> AnimateDiffTransformer3D:
    adapter = MotionAdapter((32,), motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8)
    return randomize(adapter, seed=3).down_blocks[0].motion_modules[0]


@pytest.mark.parametrize("frames", [1, 7, 32])
@pytest.mark.parametrize("norm", ["frame", "clip"])
def test_equals_diffusers(frames: int, norm: str) -> None:
    reference = nn.ModuleList([transformer()])
    mine = TemporalTransformer(transformer(), norm)
    if norm == "frame":
        normalize_per_frame(reference)
    states = torch.randn(2 * frames, 32, 5, 3, generator=torch.Generator().manual_seed(0))
    states *= torch.linspace(0.1, 3, 2 * frames)[:, None, None, None]  # so that the two norms differ
    with torch.no_grad():
        expected = reference[0](states, num_frames=frames)
        assert torch.allclose(mine(states, num_frames=frames), expected, atol=1e-5)


def test_weights_keep_their_names() -> None:
    model = nn.Sequential(transformer(), nn.Sequential(transformer()))
    before = set(model.state_dict())
    replace_temporal_transformers(model, "frame")
    assert set(model.state_dict()) == before
    assert not any(isinstance(module, AnimateDiffTransformer3D) for module in model.modules())
