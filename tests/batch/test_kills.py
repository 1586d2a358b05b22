"""A batch that is killed or interrupted, and resumed: every clip is there once and whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from fakes.quick_executor import quick_pipeline
from PIL import Image
from sparsectrl_lcm.runtime import VideoPipeline, many_requests
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.cpu.graph_runs import RUNS

from .conftest import SMALL, batch, write

DRIVER = Path(__file__).parent / "killed_batch.py"
CLIPS = 80
TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}


def command(place: str, number: int) -> list[str]:
    options = ["requests.jsonl", "-o", "out", "--format", "gif", "--resume"]
    return [sys.executable, str(DRIVER), place, str(number), *options]


def run(folder: Path, place: str, number: int = 0) -> int:
    """Runs the batch; returns its exit code."""
    return subprocess.run(
        command(place, number), cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=120, check=False
    ).returncode


def done(folder: Path) -> list[str]:
    """The IDs of whole results."""
    text = (folder / "out/results.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [item["id"] for item in map(json.loads, lines) if item["status"] == "done"]


def ran(folder: Path) -> list[int]:
    """The seeds that have run since the last call."""
    log = folder / "ran.log"
    seeds = list(map(int, log.read_text().split()))
    log.unlink()
    return seeds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [SMALL | {"id": f"clip{seed}", "seed": seed, "width": 16, "height": 16} for seed in range(CLIPS)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def check_all(folder: Path) -> None:
    """Checks that every clip is whole and of its seed, told once, and that nothing else is left."""
    names = {f"clip{seed}.gif" for seed in range(CLIPS)}
    assert {path.name for path in (folder / "out").iterdir()} - {".lock"} == names | {"results.jsonl"}
    assert Counter(done(folder)) == Counter(name.removesuffix(".gif") for name in names)
    for seed in range(CLIPS):
        with Image.open(folder / f"out/clip{seed}.gif") as image:
            assert image.n_frames in (1, 2), "equal frames may be one"
            assert image.convert("RGB").getpixel((8, 8)) == (seed,) * 3


@pytest.mark.parametrize("places", [("encoding", "result"), ("renamed", "probing")])
def test_after_two_kills_each_clip_is_there_once_and_whole(folder: Path, places: tuple[str, str]) -> None:
    finished: list[str] = []
    for place, number in zip(places, (25, 30), strict=True):
        assert run(folder, place, number) == -signal.SIGKILL
        again = {f"clip{seed}" for seed in ran(folder)} & set(finished)
        assert again == set(), "what is told is not made again"
        assert len(done(folder)) == len(finished) + number - 1
        finished = done(folder)
    assert run(folder, "never") == 0
    made = ran(folder)
    assert len(made) == len(set(made)) == CLIPS - len(finished)
    check_all(folder)


def test_a_kill_from_outside_at_any_time(folder: Path) -> None:
    for clips in (10, 40):
        with subprocess.Popen(command("never", 0), cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            results = folder / "out/results.jsonl"
            deadline = time.monotonic() + 60
            while not results.exists() or results.read_bytes().count(b"\n") < clips:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.kill()  # on a busy machine, all may be done by now
        finished = set(done(folder))
    ran(folder)
    assert run(folder, "never") == 0
    assert {f"clip{seed}" for seed in ran(folder)} & finished == set()
    check_all(folder)


def test_an_interrupt_ends_in_order(folder: Path) -> None:
    process = subprocess.Popen(
        command("waiting", 5), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith(b"stopped\n")
    assert b"Traceback" not in errors
    assert done(folder) == [f"clip{seed}" for seed in range(4)]
    assert len(ran(folder)) <= 5 + many_requests.AHEAD
    assert not list((folder / "out").glob(".part-*"))
    assert run(folder, "never") == 0
    check_all(folder)


@pytest.mark.usefixtures("raising")
def test_ctrl_c_ends_the_graph_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cancelled = threading.Event()

    def run_until_cancelled(_: CheckedRequest) -> None:
        with RUNS.cancellable(cancelled.set):
            os.kill(os.getpid(), signal.SIGINT)
            assert cancelled.wait(20)
            raise RuntimeError("ended by its library")

    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: quick_pipeline(run_until_cancelled))
    monkeypatch.chdir(tmp_path)
    write(SMALL)
    assert batch() == 130
    assert cancelled.is_set()
    assert not Path("out").exists()
