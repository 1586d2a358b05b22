"""The folder that a batch writes to: what it holds before is kept."""

from pathlib import Path

import pytest
from sparsectrl_lcm.batch.results_file import ResultsFile
from sparsectrl_lcm.runtime import DeviceLost
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

from sparsectrl_lcm import cli

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
    """The folder is then as before."""
    monkeypatch.chdir(tmp_path)
    write(SMALL)
    for exists in (False, True):
        if exists:
            Path("out").mkdir()
        assert batch("--backend", "onnxruntime", "--weights", f"anime={demo_bundle()}") == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == (
            "error: --weights: anime: onnxruntime cannot change the weights of its engines; make its clips in a run of "
            "its own, with --bundle, or use a GPU and engines from build --refit"
        )
        assert Path("out").exists() == exists
        assert not exists or not list(Path("out").iterdir())


@pytest.mark.parametrize("fault", [DeviceLost("backend", "the device has fallen off"), KeyboardInterrupt()])
def test_a_batch_that_ends_without_a_result_leaves_no_folder(ran: Ran, fault: BaseException) -> None:
    write(SMALL | {"seed": 1})
    ran.faults = {1: fault}
    assert cli.run(["batch", "requests.jsonl", "-o", "new/out", "--format", "gif"]) in (2, 130)
    assert sorted(path.name for path in Path().iterdir()) == ["requests.jsonl"]
    ran.faults = {}
    assert batch() == 0


def test_a_whole_clip_is_kept_if_its_line_cannot_be_written(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write(SMALL | {"seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "add", full)
        assert batch() == 2
    assert clips() == {"000001.gif"}
    assert batch("--resume") == 0
