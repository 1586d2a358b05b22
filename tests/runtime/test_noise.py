"""Noise against torch itself."""

import numpy as np
import pytest
import torch
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator

SEEDS = [
    0, 1, 2, 7, 42, 123, 1234, 99999, 2**16, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3,
    2**53 + 1, 2**63 - 1, 2**63 + 12345, 2**64 - 1,
]  # fmt: skip
SHAPES = [
    (1,), (15,), (3,), (16,), (17,), (2, 31), (1, 4, 16, 8, 8), (5, 7), (33,), (1, 4, 3, 5, 7), (1, 4, 16, 64, 64),
    (11,), (1023,), (2**15,), (2**15 + 5,), (3, 2**15 + 16),
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_torchs(seed: int) -> None:
    """One generator draws all shapes one after the other, as the loop does: single values and large arrays, mixed."""
    reference = torch.Generator("cpu").manual_seed(seed)
    generator = TorchGenerator(seed)
    for shape in SHAPES:
        expected = torch.randn(shape, generator=reference).numpy()
        values = generator.randn(shape)
        assert values.shape == shape
        assert values.dtype == np.float32
        assert np.abs(values - expected).max() <= 1e-6


def test_draws_go_to_a_given_array() -> None:
    for shape in SHAPES:
        array = np.full(shape, np.nan, np.float32)
        assert TorchGenerator(3).randn(shape, array) is array
        assert (array == TorchGenerator(3).randn(shape)).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="allowed are 0 to"):
        TorchGenerator(seed)
