"""Upsamplers as transposed convolutions, compared with the original graphs on ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Exported
from flops import count_flops
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.rewrites.upsampling import (
    drop_empty_cuts,
    find_doublings,
    smallest_with_equal_cuts,
    transpose_upsampling,
)
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from test_exact_simplifications import assert_equal_results, operators, random, rewritten, upsampler


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 7)])
def test_a_transposed_upsampling_gives_the_same_up_to_the_border(
    shape: tuple[int, int], bias: bool, tmp_path: Path
) -> None:
    path = upsampler(tmp_path / "g.onnx", bias=bias)
    result, counts = rewritten(path, tmp_path, transpose_upsampling)
    assert counts == [1]
    assert operators(result) == ["ConvTranspose", "Neg"]
    feeds = {"x": random(3, 4, *shape, seed=1)}
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, result))
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=1e-5)
    assert 9 * count_flops(result, feeds, tmp_path) == 4 * count_flops(path, feeds, tmp_path)


def test_a_cut_doubling_is_not_transposed(tmp_path: Path) -> None:
    path = upsampler(tmp_path / "g.onnx", cut=True)
    left, counts = rewritten(path, tmp_path, transpose_upsampling)
    assert counts == [0]
    assert operators(left) == operators(path)


@pytest.mark.parametrize(("side", "found"), [(3, 1), (5, 0)])
def test_a_weight_tells_the_size_of_a_kernel(side: int, found: int, tmp_path: Path) -> None:
    """ONNX needs no `kernel_shape`, and exports with onnxscript before 0.7.2 have none."""
    weight = random(6, 4, side, side)
    path = upsampler(tmp_path / "g.onnx", convolution={"kernel_shape": None}, weight=weight)
    assert len(find_doublings(ir.load(path))) == found


@pytest.mark.parametrize(("latents", "checked"), [((8, 16), (4, 4)), ((9, 13), (5, 5)), ((18, 7), (4, 5))])
def test_upsamplers_that_are_cut_at_a_size_stay(
    sd15_like: Exported, latents: tuple[int, int], checked: tuple[int, int], tmp_path: Path
) -> None:
    """Others are transposed, and results stay the same at a small size with the same cuts."""
    bundle = Bundle.load(sd15_like.bundle)
    path = bundle.folder / bundle.graph("unet").path
    portable = ir.load(path)
    assert tuple(smallest_with_equal_cuts(portable, side) for side in latents) == checked
    result, counts = rewritten(path, tmp_path, lambda model: drop_empty_cuts(model, *latents), transpose_upsampling)
    assert counts[0] == counts[1] == (not any(side % 2 for side in latents))
    height, width = (8 * side for side in checked)
    assert_equal_results(
        path, result, random_inputs(bundle, "unet", size=ClipSize(width=width, height=height, frames=2))
    )


def test_the_upsamplers_of_a_decoder_are_transposed(sd15_like: Exported, tmp_path: Path) -> None:
    bundle = Bundle.load(sd15_like.bundle)
    path = bundle.folder / bundle.graph("vae_decoder").path
    result, (count,) = rewritten(path, tmp_path, transpose_upsampling)
    assert 2**count == bundle.manifest.sizes.vae_scale_factor
    assert_equal_results(path, result, random_inputs(bundle, "vae_decoder"))
