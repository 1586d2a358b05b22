"""`generate --seeds`: clips of consecutive seeds, a contact sheet of all, and no graph run twice for nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.quick_executor import quick_pipeline
from PIL import Image
from sparsectrl_lcm.runtime import BackendError, VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.cpu.onnxruntime import OnnxRuntimeSessions

from sparsectrl_lcm import cli

SCRIBBLE = Path(__file__).parent.parent.parent / "demo/scribbles/frame_00.png"
SMALL = ("generate", "--prompt", "a boat", "--backend", "onnxruntime", "--size", "64x64", "--frames", "10")


def generate(*arguments: object) -> int:
    return cli.run([*SMALL, *map(str, arguments)])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the runs of each graph."""
    counter: Counter[str] = Counter()
    session_of = OnnxRuntimeSessions.session

    def counted(self: Any, graph: str) -> Any:
        counter[graph] += 1  # a session is fetched for each run
        return session_of(self, graph)

    monkeypatch.setattr(OnnxRuntimeSessions, "session", counted)
    return counter


def frames_of(sheet: Path) -> np.ndarray:
    """The frames of a contact sheet [F, 64, 64, 3] with two rows: eight frames, then two."""
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    tops, lefts = [18 + 82 * row for row in range(2)], [4 + 68 * column for column in range(8)]
    return np.stack([pixels[top : top + 64, left : left + 64] for top in tops for left in lefts][:10])


def test_each_clip_is_that_of_its_seed_and_text_and_control_run_once(
    tmp_path: Path, runs: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 1, "--guidance", 2, "--negative-prompt", "night")
    assert generate(*options, "--seed", 41, "--seeds", 2, "-o", tmp_path / "clip.png") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"clip-seed{seed}.png" for seed in (41, 42)),
        "clip-seeds.png",
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1] for line in lines[:-1:2]] == [" seed 41", " seed 42"]
    assert lines[-1] == f"{tmp_path / 'clip-seeds.png'}: up to eight frames of each"
    several = Counter(runs)
    runs.clear()
    for seed in (41, 42):
        alone = tmp_path / f"alone-{seed}.png"
        assert generate(*options, "--seed", seed, "-o", alone) == 0
        assert (frames_of(tmp_path / f"clip-seed{seed}.png") == frames_of(alone)).all()
    assert several["text_encoder"] * 2 == runs["text_encoder"] > 0
    assert several["unet"] == runs["unet"]


def test_sparsectrl_runs_once_for_all_seeds(tmp_path: Path, runs: Counter[str]) -> None:
    options = ("--steps", 2, "--keyframe", f"0={SCRIBBLE}", "--seed", 1)
    assert generate(*options, "--seeds", 2, "-o", tmp_path / "clip.gif") == 0
    several = Counter(runs)
    runs.clear()
    assert generate(*options, "-o", tmp_path / "clip.gif") == 0
    assert several["controlnet_scribble"] == runs["controlnet_scribble"] == 2, "once for each step"
    assert several["unet"] == 2 * runs["unet"]


def use(monkeypatch: pytest.MonkeyPatch, at_step: Any = lambda _: None) -> None:
    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: quick_pipeline(at_step))


def test_the_sheet_has_a_row_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    assert generate("--seed", 5, "--seeds", 2, "-o", tmp_path / "a/clip.gif") == 0
    with Image.open(tmp_path / "a/clip-seeds.png") as image:
        rows = np.asarray(image)
    for row, seed in enumerate((5, 6)):
        for column in range(8):
            cell = rows[18 + 82 * row :, 4 + 68 * column :][:64, :64]
            assert (cell == seed).all(), "the colour of the stand-in's frames"


def test_a_random_seed_is_followed_by_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    assert generate("--seeds", 3, "-o", tmp_path / "frames") == 0
    (tmp_path / "frames-seeds.png").unlink()
    seeds = sorted(int(path.name.removeprefix("frames-seed")) for path in tmp_path.iterdir())
    assert seeds == list(range(seeds[0], seeds[0] + 3))
    assert len(list((tmp_path / f"frames-seed{seeds[0]}").iterdir())) == 10


def test_clips_before_a_failure_are_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_step(request: CheckedRequest) -> None:
        if request.seed == 2:
            raise BackendError("backend", "it broke")

    use(monkeypatch, at_step)
    assert generate("--seed", 1, "--seeds", 9, "-o", tmp_path / "clip.gif") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["clip-seed1.gif"]
    out, err = capsys.readouterr()
    assert f"{tmp_path}/clip-seed1.gif: 10 frames of 64x64, seed 1, quick fp32" in out
    assert err.splitlines()[-1] == "error: backend: it broke"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", 0, "-o", "clip.gif"), "error: --seeds: 0 is not allowed; give a whole number from 1 to 100"),
        (
            ("--seed", 2**64 - 1, "--seeds", 2, "-o", "clip.gif"),
            f"error: --seeds: 2 seeds from {2**64 - 1} on end at {2**64}; the last may be {2**64 - 1}",
        ),
        (("--seeds", 2, "-o", "."), "error: --output: '.' has no name for the clips; give one, such as clip.mp4"),
        (("--seeds", 2, "-o", "clip.avi"), "error: --output: '.avi' is not a known format"),
        (
            ("--seeds", 2, "--fps", 99, "-o", "clip.mp4"),
            "error: --fps: 99.0 is not allowed; give a number from 1 to 60",
        ),
    ],
)
def test_wrong_options_load_no_pipeline(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert generate(*arguments) == 2
    assert capsys.readouterr().err.startswith(message)
