"""Folders left behind by killed exports: the next export removes them, unless their process is alive."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import ROOT
from sparsectrl_lcm.export import exporter
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.plan import ExportOptions
from sparsectrl_lcm.export.swap import open_swap
from sparsectrl_lcm.runtime.format.bundle import Bundle

OPTIONS = ExportOptions("base", "motion")
BUNDLE = ["manifest.json", "onnx", "tokenizer.json"]

Run = Callable[[exporter._Exporter], str]


def write(self: exporter._Exporter) -> str:
    for name in ("tokenizer.json", "manifest.json"):
        (self.folder / name).write_text("{}")
    return "made"


def write_and_die(self: exporter._Exporter) -> str:
    write(self)
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def write_and_wait(self: exporter._Exporter) -> str:
    time.sleep(600)
    return "never"


@pytest.fixture(params=[True, False], ids=["empty folder", "new folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "bundles" / "bundle"
    (folder if request.param else folder.parent).mkdir(parents=True)
    return folder


def start(target: Path, run: Run, patch: pytest.MonkeyPatch) -> BaseProcess:
    """Starts an export in another process, with `run` in place of the exporter's."""
    patch.setattr(exporter._Exporter, "run", run)
    process = multiprocessing.get_context("fork").Process(target=export_bundle, args=(OPTIONS, target))
    process.start()
    patch.setattr(exporter._Exporter, "run", write)
    return process


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "runtime" / "demo_bundle", tmp_path / "demo"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folders(target: Path) -> list[Path]:
    """The temporary folders of exports."""
    return [path.parent for path in target.parent.rglob("onnx") if path.parent != target]


def test_what_a_killed_export_leaves_goes_with_the_next(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(target, write_and_die, monkeypatch)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(folders(target)) == 1
    assert export_bundle(OPTIONS, target) == "made"
    assert names(target) == BUNDLE
    assert names(target.parent) == ["bundle"]


def test_it_goes_where_the_folder_was_made_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    start(target, write_and_die, monkeypatch).join()
    target.mkdir()
    assert export_bundle(OPTIONS, target) == "made"
    assert names(target) == BUNDLE
    assert names(tmp_path) == ["bundle"]


def test_what_a_living_export_writes_stays(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = target.exists()
    process = start(target, write_and_wait, monkeypatch)
    try:
        while process.is_alive() and not folders(target):
            time.sleep(0.01)
        if empty:
            with pytest.raises(ExportError, match="not an empty folder"):
                export_bundle(OPTIONS, target)
        else:
            assert export_bundle(OPTIONS, target) == "made"
        assert len(folders(target)) == 1
    finally:
        process.kill()
        process.join()


def test_what_is_left_goes_whatever_process_has_its_number_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers, the first process always has the same process id."""
    monkeypatch.setattr(exporter._Exporter, "run", write)
    (tmp_path / f".bundle-{os.getpid()}-0123abcd" / "onnx").mkdir(parents=True)
    assert export_bundle(OPTIONS, tmp_path / "bundle") == "made"
    assert names(tmp_path) == ["bundle"]


def test_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter._Exporter, "run", write)
    process = multiprocessing.get_context("fork").Process()
    process.start()
    process.join()
    others = [
        f".other-{process.pid}-0123abcd",
        f".bundle-{process.pid}",
        ".bundle-notes",
        f"bundle-{process.pid}-0123abcd",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    assert export_bundle(OPTIONS, tmp_path / "bundle") == "made"
    assert names(tmp_path) == sorted([*others, "bundle"])


def test_a_swap_fills_an_empty_folder(demo: Path, tmp_path: Path) -> None:
    target = tmp_path / "mount"
    target.mkdir(mode=0o750)
    (target / f".new-{os.getpid()}-0123abcd").mkdir()
    before = target.stat()
    with open_swap(demo, target):
        pass
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
    assert Bundle.load(target).manifest.files == Bundle.load(demo).manifest.files
    assert names(target) == [name for name in names(demo) if name != "engines"]
    assert names(tmp_path) == ["demo", "mount"]
    with pytest.raises(ExportError, match="exists and is not an empty folder"), open_swap(demo, target):
        pytest.fail("the swap begins")
