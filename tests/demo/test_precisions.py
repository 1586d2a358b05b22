"""The comparison of precisions: its figures, and runs that go on after an interruption."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "demo"))

import drawing
import precisions
from precisions import REFERENCE
from world import Scene


def drawn(world: Scene, kind: str | None, seed: int) -> np.ndarray:
    return drawing.clip(world)


def darker(world: Scene, kind: str | None, seed: int) -> np.ndarray:
    """One level darker, and three from the second request on."""
    return drawing.clip(world) - (3 if seed else 1)


def test_figures_are_those_of_the_frames() -> None:
    rows = list(precisions.compare({"gpu:darker": darker}, drawn, 2, []))
    exact, found = (precisions.summary(rows, name) for name in (REFERENCE, "gpu:darker"))
    assert exact["colour"] == exact["kind"] == found["colour"] == 1
    assert found["difference"] == {"colour": 0, "kind": 0}
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / np.sqrt(3)))
    assert (found["worst_psnr"], found["worst_request"]) == (pytest.approx(20 * np.log10(255 / 3)), 1)


def test_an_interrupted_run_goes_on_with_the_missing_clips(tmp_path: Path) -> None:
    made: list[int] = []

    def counted(world: Scene, kind: str | None, seed: int) -> np.ndarray:
        made.append(seed)
        return darker(world, kind, seed)

    whole = list(precisions.compare({"gpu:darker": darker}, drawn, 3, []))
    path = tmp_path / "rows.jsonl"
    precisions.add_rows(path, whole[:4])
    path.write_text(path.read_text() + '{"maker": "gpu:da')
    rows = precisions.read_rows(path)
    assert rows == whole[:4]
    for row in precisions.compare({"gpu:darker": counted}, drawn, 3, rows):
        precisions.add_rows(path, [row])
    assert made == [2]
    assert precisions.read_rows(path) == whole
