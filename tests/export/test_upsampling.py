"""The UNet's upsampler for any size, compared with diffusers', in torch and as a graph."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from sparsectrl_lcm.benchmarks.random_checkpoints import randomize
from sparsectrl_lcm.export.check import largest_error, open_session
from sparsectrl_lcm.export.graph_specs import GraphSpec, Input
from sparsectrl_lcm.export.onnx_file import trace, write
from sparsectrl_lcm.export.plan import ExportOptions, plan_jobs, read_parts
from sparsectrl_lcm.export.upsampling import Upsampler
from sparsectrl_lcm.runtime.format.manifest import MAX_SIDE, resolve_shape
from torch import nn


def upsampler() -> Upsample2D:
    return randomize(Upsample2D(4, use_conv=True), seed=1)


def test_a_cut_doubling_is_the_interpolation_to_that_size() -> None:
    """For every side of latents up to the largest clip."""
    for side in range(1, MAX_SIDE // 8 + 1):
        places = torch.arange(side, dtype=torch.float32)[None, None]
        for size in (2 * side, 2 * side - 1):
            cut = places.repeat_interleave(2, dim=2)[..., :size]
            assert torch.equal(F.interpolate(places, size=size, mode="nearest"), cut)


@pytest.mark.parametrize("size", [(10, 14), (9, 14), (10, 13), (9, 13)])
@torch.no_grad()
def test_the_upsampler_is_diffusers(size: tuple[int, int]) -> None:
    states = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Upsampler(upsampler())(states, size), upsampler()(states, size), atol=1e-6)


class _Levels(nn.Module):
    """Two halvings, and upsamplers to the sizes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"down": nn.Conv2d(4, 4, 3, 2, 1), "first": upsampler(), "second": upsampler()})
        for name in ("first", "second"):
            self.model[name] = Upsampler(self.model[name])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        half = self.model["down"](states)
        up = self.model["first"](self.model["down"](half), half.shape[2:]) + half
        return self.model["second"](up, states.shape[2:]) + states


SPEC = GraphSpec("g", (Input("x", ("n", 4, "h", "w")),), (("y", ("n", 4, "h", "w")),))


def inputs(*shape: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


@torch.no_grad()
def test_the_graph_takes_every_size_and_cuts_once(tmp_path: Path) -> None:
    """Traced at a size that can be halved twice; each upsampler is a doubling, one cut and a convolution."""
    module = randomize(_Levels(), seed=2)
    model = trace(module, SPEC, inputs(2, 4, 8, 12))
    for resize in [node for node in model.graph if node.op_type == "Resize"]:
        (cut,) = (use.node for use in resize.outputs[0].uses())
        (convolution,) = (use.node for use in cut.outputs[0].uses())
        assert (cut.op_type, convolution.op_type) == ("Slice", "Conv")
    write(model, tmp_path / "g.onnx", lambda _: "g.weights")
    session = open_session(tmp_path / "g.onnx")
    for height, width in ((8, 12), (9, 13), (10, 11), (1, 2), (36, 64)):
        feeds = inputs(1, 4, height, width)
        assert largest_error(session, feeds, (module(*feeds),)) <= 1e-5


def test_a_graph_for_even_sides_alone_is_found(checkpoints: Path) -> None:
    """The check's other size has odd sides at several levels; the traced one has none, and no side of one latent."""
    parts = read_parts(ExportOptions(str(checkpoints / "base"), str(checkpoints / "motion_adapter")))
    (job,) = (job for job in plan_jobs(parts) if job.spec.name == "unet")
    levels = len(parts.channels)
    for layout, odd in ((job.traced, set()), (job.checked, {0, 1, 2})):
        sides = [
            resolve_shape((f"latent_height/{2**level}", f"latent_width/{2**level}"), layout.dimensions("unet"))
            for level in range(levels)
        ]
        assert min(map(min, sides)) > 1
        assert {level for level, pair in enumerate(sides[:-1]) if any(side % 2 for side in pair)} == odd


def test_names_of_weights_stay() -> None:
    assert set(Upsampler(upsampler()).state_dict()) == set(upsampler().state_dict()) == {"conv.weight", "conv.bias"}


def test_symbolic_quotients_are_rounded_up() -> None:
    """As a convolution of stride 2 does."""
    assert resolve_shape(("n/2", "n/4", "m*n/8", 5), {"n": 9, "m": 8}) == (5, 3, 9, 5)
