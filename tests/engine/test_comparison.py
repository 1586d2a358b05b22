"""The measures by which results are compared, against values computed by hand, and the bounds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sparsectrl_lcm.engine.comparison import BOUNDS, EQUAL_PSNR, Bounds, Difference, errors, measure, worst


def test_measures_of_arrays() -> None:
    expected = np.zeros(1000, np.float32)
    expected[0] = 4
    actual = expected.copy()
    actual[1:6] = 2  # five of 1000 values, so the 99% quantile does not see them
    found = measure(actual, expected)
    assert found == Difference(0.5, 0.0, pytest.approx(4 / np.sqrt(16 + 5 * 4)))
    assert found.error == 0.5
    assert errors({"a": actual}, {"a": expected}) == {"a": 0.5}
    actual[1:21] = 1
    assert measure(actual, expected).quantile == 0.25
    assert measure(expected * 0, expected * 0) == Difference(0.0, 0.0, 1.0)
    assert measure(expected * 0, expected).cosine == 0


def test_measures_of_frames() -> None:
    expected = np.full((2, 8, 8, 3), 100, np.uint8)
    actual = expected.copy()
    actual[0] += 10
    found = measure(actual, expected)
    assert found.levels == found.error == 5
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / 50))
    assert measure(expected, expected).psnr == EQUAL_PSNR
    assert BOUNDS["fp32"].exceeded(found) == ("levels", "psnr")
    assert BOUNDS["fp32"].exceeded(measure(expected, expected)) == ()
    assert worst([measure(expected, expected), found]) == found


def test_the_worst_of_several_is_by_measure_and_in_any_order() -> None:
    good = Difference(largest=0.1, quantile=0.02, cosine=0.99, levels=0.5, psnr=50.0)
    changes = [{"largest": 0.3}, {"quantile": 0.05}, {"cosine": 0.8}, {"levels": 2.0}, {"psnr": 20.0}]
    for change in changes:
        bad = replace(good, **change)
        assert worst([good, bad]) == worst([bad, good]) == worst([good, bad, good]) == bad, change
    each = [replace(good, **change) for change in changes]
    assert worst(each) == worst(each[::-1]) == Difference(0.3, 0.05, 0.8, 2.0, 20.0)
    assert worst([Difference(0.1, 0.02, 0.99), Difference(0.3, 0.01, 0.8)]) == Difference(0.3, 0.02, 0.8)


@pytest.mark.parametrize("wrong", [np.full(3, np.nan, np.float32), np.zeros(4, np.float32)])
def test_a_wrong_shape_or_nan_is_out_of_every_bound(wrong: np.ndarray) -> None:
    found = measure(wrong, np.ones(3, np.float32))
    assert BOUNDS["int8"].exceeded(found) == ("largest", "quantile", "cosine")
    assert worst([measure(np.ones(3), np.ones(3)), found]) == found
    assert BOUNDS["int8"].exceeded(measure(np.zeros(3), np.zeros(3, np.uint8))) == ("levels", "psnr")


def test_the_page_has_the_bounds() -> None:
    page = (Path(__file__).parents[2] / "docs/verify.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `") and line.endswith(" dB |")]
    found = {cells[0].strip(" `"): Bounds(*(float(cell.strip(" dB")) for cell in cells[1:])) for cells in rows}
    assert found == BOUNDS
