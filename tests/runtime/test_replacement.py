"""Files of a bundle that are replaced as one, also by processes that are killed."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.replacement import finish_replacement, only_replacement, replace_files

FILES = ("onnx/text_encoder.weights", "onnx/lcm_update.onnx", "onnx/unet.motion.weights")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stage(bundle: Path) -> Path:
    """New files with a manifest, in a folder of the bundle."""
    staged = bundle / ".swap-1-00000000"
    (staged / "onnx").mkdir(parents=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in FILES:
        data = (bundle / name).read_bytes()[::-1]
        (staged / name).write_bytes(data)
        manifest["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (staged / "manifest.json").write_text(json.dumps(manifest))
    return staged


def kill_at(step: int) -> None:
    """Kills the process instead of its rename number `step`."""
    count = 0
    before = {name: getattr(Path, name) for name in ("rename", "replace")}

    def counted(name: str) -> None:
        def rename(self: Path, target: Path) -> Path:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            moved: Path = before[name](self, target)
            return moved

        setattr(Path, name, rename)

    for name in before:
        counted(name)


@pytest.mark.parametrize("step", range(6))
def test_a_killed_replacement_leaves_all_old_or_all_new_files(step: int, bundle: Path) -> None:
    old, staged = contents(bundle), stage(bundle)
    new = old | contents(staged)

    def work() -> None:
        kill_at(step)
        replace_files(staged, bundle)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if step < 5 else 0)
    assert (contents(bundle) != new) == (step < 5), "it was killed half-way"
    Bundle.load(bundle)
    shutil.rmtree(staged, ignore_errors=True)
    assert contents(bundle) == (old if step == 0 else new)
    assert not list(bundle.glob(".*"))


def test_processes_replace_files_one_after_the_other(bundle: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, order = context.Event(), context.SimpleQueue()

    def work() -> None:
        ready.set()
        with only_replacement(bundle):
            order.put("second")

    process = context.Process(target=work)
    with only_replacement(bundle):
        process.start()
        ready.wait()
        time.sleep(0.2)
        order.put("first")
    process.join()
    assert [order.get(), order.get()] == ["first", "second"]
    assert not list(bundle.glob(".*"))


def test_files_that_come_while_another_process_tidies_up_stay(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next replacement may take the name of the folder between the last move and the removal."""
    staged, move = stage(bundle), Path.replace

    def late(self: Path, target: Path) -> Path:
        moved = move(self, target)
        if self.name == "manifest.json":
            (self.parent / "onnx" / "later.weights").write_bytes(b"new")
        return moved

    monkeypatch.setattr(Path, "replace", late)
    replace_files(staged, bundle)
    monkeypatch.undo()
    finish_replacement(bundle)
    assert (bundle / "onnx" / "later.weights").read_bytes() == b"new"
    assert not list(bundle.glob(".*"))
