"""The folder that a batch writes to: what it holds before is kept."""

from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

from .conftest import SMALL, Ran, batch, clips, write


@pytest.mark.parametrize("option", [(), ("--resume",)])
def test_a_folder_of_other_files_is_refused_and_kept(
    ran: Ran, option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/keep.gif").write_text("my own film")
    write(SMALL | {"id": "keep"})
    assert batch(*option) == 2
    assert capsys.readouterr().err == "error: --output: the folder 'out' is not empty; name a new one\n"
    assert ran.seeds == []
    assert [path.name for path in Path("out").iterdir()] == ["keep.gif"]
    assert Path("out/keep.gif").read_text() == "my own film"


def test_a_clip_without_a_line_is_made_again_with_resume_alone(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    """As a batch leaves it that was killed between its first clip and the line of it."""
    Path("out").mkdir()
    Path("out/results.jsonl").touch()
    Path("out/a.gif").write_text("a clip")
    write(SMALL | {"id": "a", "seed": 1})
    assert batch() == 2
    expected = "error: --output: the folder 'out' is not empty; give --resume to go on, or name another folder\n"
    assert capsys.readouterr().err == expected
    assert Path("out/a.gif").read_text() == "a clip"
    assert batch("--resume") == 0
    assert ran.seeds == [1]
    assert clips() == {"a.gif"}


def test_a_batch_whose_weights_cannot_be_used_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is then as good as new for the next batch."""
    monkeypatch.chdir(tmp_path)
    write(SMALL)
    for _ in range(2):
        assert batch("--backend", "onnxruntime", "--weights", f"anime={demo_bundle()}") == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == (
            "error: --weights: anime: onnxruntime cannot change the weights of its engines; make its clips in a run of "
            "its own, with --bundle, or use a GPU and engines from build --refit"
        )
    assert clips() == set()
