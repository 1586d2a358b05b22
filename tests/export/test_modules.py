"""Group norms, compared with torch's."""

import pytest
import torch
from sparsectrl_lcm.benchmarks.random_checkpoints import randomize
from sparsectrl_lcm.export.module_replacement import ClipGroupNorm, GroupNorm, replace_modules
from torch import nn


def norm(groups: int = 4, channels: int = 12) -> nn.GroupNorm:
    return randomize(nn.GroupNorm(groups, channels, eps=1e-5), seed=1)


@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 12, 1, 2), (3, 12, 40)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_group_norm(shape: tuple[int, ...], offset: float) -> None:
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    with torch.no_grad():
        assert torch.allclose(GroupNorm(norm())(states), norm()(states), atol=2e-5)


@pytest.mark.parametrize("frames", [1, 16])
def test_clip_group_norm_takes_its_statistics_over_all_frames(frames: int) -> None:
    states = torch.randn(2, 12, frames, 30, generator=torch.Generator().manual_seed(0))
    states *= torch.linspace(0.1, 3, frames)[:, None]
    with torch.no_grad():
        assert torch.allclose(ClipGroupNorm(norm())(states), norm()(states), atol=2e-5)


def test_replacing_keeps_names_and_weights() -> None:
    model = nn.Sequential(norm(), nn.Sequential(nn.Linear(2, 2), norm()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replace_modules(model, nn.GroupNorm, GroupNorm)
    assert isinstance(model[0], GroupNorm)
    assert isinstance(model[1][1], GroupNorm)
    assert before.keys() == model.state_dict().keys()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
