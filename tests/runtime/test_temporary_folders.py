"""Temporary folders of a process, and folders left behind by killed processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from sparsectrl_lcm.runtime.format.temporary_folders import (
    clear_leftovers,
    complete_folder,
    is_vacant,
    staged_folder,
)

WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from sparsectrl_lcm.runtime.format.temporary_folders import staged_folder
with staged_folder(Path(sys.argv[1]), "set") as folder:
    (folder / "engine").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_moves_into_place_and_nothing_else_stays(tmp_path: Path) -> None:
    with staged_folder(tmp_path, "set") as folder:
        (folder / "engine").write_text("whole")
        clear_leftovers(tmp_path)
        folder.rename(tmp_path / "set")
    assert names(tmp_path) == ["set"]
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path, "set"):
        _ = 1 / 0
    assert names(tmp_path) == ["set"]


def test_a_folder_stays_while_its_process_lives_and_goes_when_it_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        clear_leftovers(tmp_path)
        clear_leftovers(tmp_path, "set")
        assert (folder / "engine").exists()
        process.kill()
    assert names(tmp_path) == [folder.name, f"{folder.name}.lock"]
    clear_leftovers(tmp_path, "other")
    assert folder.exists()
    clear_leftovers(tmp_path, "set")
    assert names(tmp_path) == []


def test_what_was_replaced_goes_and_locks_without_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / ".fp32-1-0123abcd-old").mkdir()
    (tmp_path / ".fp16-1-0123abcd.lock").touch()
    (tmp_path / ".notes.lock").touch()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".notes.lock"]


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount, or the folder in which the command was typed."""
    target = tmp_path / "bundle"
    target.mkdir(mode=0o750)
    before = target.stat()
    monkeypatch.chdir(target)
    (target / ".new-1-0123abcd").mkdir()
    assert is_vacant(Path())
    with pytest.raises(ZeroDivisionError), complete_folder(Path()) as folder:
        (folder / "onnx").mkdir()
        _ = 1 / 0
    assert names(target) == []
    order: list[str] = []
    with complete_folder(Path()) as folder:
        (folder / "onnx").mkdir()
        for name in ("manifest.json", "tokenizer.json"):
            (folder / name).touch()
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: (order.append(path.name), rename(path, to))[1])
    assert names(target) == sorted(order) == ["manifest.json", "onnx", "tokenizer.json"]
    assert order[-1] == "manifest.json"
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
    assert os.getcwd() == str(target)  # noqa: PTH109
    assert names(tmp_path) == ["bundle"]
    assert not is_vacant(target)
    assert not is_vacant(target / "manifest.json")


@pytest.mark.parametrize("error", [Timeout("lock"), OSError(37, "no locks available"), NotImplementedError()])
def test_a_file_system_without_locks_keeps_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """filelock reports a file system without locks in different ways, depending on its version."""
    (tmp_path / ".set-1-0123abcd").mkdir()

    def acquire(self: FileLock, timeout: float) -> None:
        Path(self.lock_file).touch()
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with staged_folder(tmp_path, "set") as folder:
        clear_leftovers(tmp_path)
        assert folder.exists()
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == [".set-1-0123abcd"]
    assert not any(folder.name in name for name in names(tmp_path))
