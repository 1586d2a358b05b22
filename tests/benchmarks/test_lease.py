"""The program for a rented GPU, as far as it needs none: every stage ends in a line, whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import lease
from lease_report import make_report, read_lines, tables
from lease_stages import device, kernels, processes, requests
from lease_stages.processes import Settings
from lease_stages.schedule import NEEDED, STAGES, Stage

BENCHMARKS = Path(lease.__file__).parent
STAGE = """
import json, os, signal, subprocess, sys, time
from lease_stages.processes import CannotRun

def measure(settings, write):
    if settings.stage == "sleeps":
        with open(settings.output + "/group", "w") as file:
            file.write(str(os.getpid()))
    write({"first": settings.stage})
    if settings.stage == "sleeps":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    elif settings.stage == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif settings.stage == "leaves":
        os._exit(7)
    elif settings.stage == "fails":
        raise ValueError("no such kernel")
    elif settings.stage == "cannot":
        raise CannotRun("no library")
    write({"second": 2})
"""

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs stages of a toy module; returns the lines of the file."""
    (tmp_path / "toy_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*names: str, seconds: float = 20.0, budget: float = 60.0, **options: Any) -> list[dict[str, Any]]:
        stages = [Stage(name, seconds, "toy_stage", **options) for name in names]
        settings = Settings("", str(tmp_path), str(tmp_path), str(tmp_path))
        returned = list(lease.run_stages(stages, settings, budget))
        assert returned == read(tmp_path)
        return returned

    return run


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lease.jsonl").read_text().splitlines()]


def test_a_stage_that_is_killed_or_fails_ends_in_a_line_and_the_next_ones_run(run: Run) -> None:
    lines = run("works", "dies", "leaves", "fails", "cannot", "again")
    assert [line["state"] for line in lines] == ["done", "killed", "failed", "failed", "skipped", "done"]
    reasons = ["", "ended by SIGKILL", "ended with code 7: no message", "ValueError: no such kernel", "no library", ""]
    assert [line.get("reason", "") for line in lines] == reasons
    for line in lines:
        expected = [{"first": line["stage"]}, *([{"second": 2}] if line["state"] == "done" else [])]
        assert line["rows"] == expected


def test_a_stage_is_killed_at_its_deadline_and_keeps_what_it_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "sleeps.rows"

    def now() -> float:
        """The time, later by 20 seconds once the stage has written a row."""
        return time.monotonic() + 20.0 * (rows.exists() and "first" in rows.read_text())

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=now, time=time.time, sleep=time.sleep))
    slow, after = run("sleeps", "works", seconds=20.0)
    assert (slow["state"], slow["reason"]) == ("killed", "took longer than 20 s")
    assert slow["rows"] == [{"first": "sleeps"}]
    assert slow["seconds"] < 60
    assert after["state"] == "done"


def test_stages_that_the_budget_does_not_reach_get_lines(run: Run) -> None:
    lines = run("sleeps", "works", budget=2.0)
    assert [line["state"] for line in lines] == ["killed", "not started"]
    assert lines[1]["reason"] == "the budget of 2 s was spent"


def test_nothing_is_started_after_a_decisive_failure(run: Run) -> None:
    lines = run("fails", "works", decisive="second")
    assert [line["state"] for line in lines] == ["failed", "not started"]
    assert lines[1]["reason"] == "fails: ValueError: no such kernel"


def test_a_stage_that_wrote_its_decisive_row_stops_nothing(run: Run) -> None:
    lines = run("dies", "fails", "works", decisive="first")
    assert [line["state"] for line in lines] == ["killed", "failed", "done"]


LEASE = """
import sys
import lease
from lease_stages.schedule import Stage
folder, *names = sys.argv[1:]
lease.STAGES = [Stage(name, 60, "toy_stage", decisive="first" if name == "fails" else "") for name in names]
lease.NEEDED = {}
sys.argv = ["lease.py", "--output", folder, "--work", folder, "--packages", folder + "/none"]
lease.main()
"""


def start_program(folder: Path, *names: str) -> subprocess.Popen[str]:
    """Starts the program with stages of the toy module. The stage "fails" is decisive."""
    path = os.pathsep.join([str(BENCHMARKS), str(folder)])
    command = [sys.executable, "-c", LEASE, str(folder), *names]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def start_lease(folder: Path) -> subprocess.Popen[str]:
    """Starts three stages, and waits until the second has written a row."""
    process = start_program(folder, "works", "sleeps", "again")
    rows = folder / "sleeps.rows"
    while not rows.exists() or "first" not in rows.read_text():
        time.sleep(0.05)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without a signal")
def test_a_killed_program_leaves_rows_and_no_stage(tmp_path: Path, run: Run) -> None:
    process = start_lease(tmp_path)
    group = int((tmp_path / "group").read_text())
    process.kill()
    process.wait()
    lines, unreadable = read_lines(tmp_path / "lease.jsonl")
    assert unreadable == 0
    assert [(line["stage"], line["state"], line["rows"][0]) for line in lines] == [
        ("works", "done", {"first": "works"}),
        ("sleeps", "killed", {"first": "sleeps"}),
    ]
    end = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)
    list(lease.run_stages([], Settings("", str(tmp_path), "", ""), 60))
    assert read(tmp_path) == lines  # the next run writes the line that is due
    assert read_lines(tmp_path / "lease.jsonl") == (lines, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without a signal")
def test_all_stages_get_lines_if_the_program_is_stopped(tmp_path: Path, run: Run) -> None:
    process = start_lease(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    lines = read(tmp_path)
    assert [line["state"] for line in lines] == ["done", "killed", "not started"]
    assert {line["reason"] for line in lines[1:]} == {"stopped by SIGTERM"}


def test_the_exit_code_tells_that_a_decisive_stage_failed(tmp_path: Path, run: Run) -> None:
    assert start_program(tmp_path, "leaves").wait(60) == 0
    assert start_program(tmp_path, "fails").wait(60) == 1
    assert [(line["state"], line["rows"]) for line in read(tmp_path)] == [
        ("failed", [{"first": "leaves"}]),
        ("failed", [{"first": "fails"}]),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("name", ["lease.log", "lease.jsonl"])
def test_a_full_disk_ends_the_program_in_one_line_and_keeps_the_rows(tmp_path: Path, run: Run, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    process = start_program(tmp_path, "works")
    assert process.communicate(timeout=60)[1] == "error: No space left on device\n"
    assert process.returncode == 2
    (tmp_path / name).unlink()
    list(lease.run_stages([], Settings("", str(tmp_path), "", ""), 60))
    (line,) = read(tmp_path)
    measured = [] if name == "lease.log" else [{"first": "works"}, {"second": 2}]
    assert (line["stage"], line["state"], line["rows"]) == ("works", "killed", measured)


def test_what_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['pydantic'] = sys.modules['diffusers'] = None; sys.argv = sys.argv[1:]"
    program = f"{hide}; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(BENCHMARKS / "lease.py"), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "missing: diffusers pydantic; run before: python benchmarks/lease_prepare.py\n"
    assert not list(tmp_path.iterdir())
    assert lease.missing_packages() == []


def test_packages_are_unpacked_from_an_archive(tmp_path: Path) -> None:
    for name in ("old", "toy"):
        with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
        folder = lease.unpacked(tmp_path / "packages.zip", tmp_path / "folder")
        assert [path.name for path in folder.iterdir()] == [name]
    assert str(folder) in lease.search_path(folder)
    assert lease.unpacked(folder, tmp_path / "other") == folder


def dry_run(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / "lease.py"), "--dry-run", "--output", str(folder), *options]
    places = ["--work", str(folder / "work"), "--packages", str(folder / "none")]  # whatever was prepared here
    result = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return read(folder)


def here(name: str, module: Any, work: Path) -> dict[str, Any]:
    """The line of a stage of a dry run, run in this process, which has imported torch."""
    rows: list[dict[str, Any]] = []
    module.measure(Settings(name, "", "", str(work), dry_run=True, seconds=120, began=time.time()), rows.append)
    return {"stage": name, "state": "done", "seconds": 0.0, "rows": rows}


def test_a_dry_run_measures_a_request_and_is_reported(tmp_path: Path) -> None:
    lines = dry_run(tmp_path, "--stages", "weights")
    assert [line["state"] for line in lines] == ["done"], lines
    stages = {"request": requests, "device": device, "kernels": kernels}
    lines += [here(name, module, tmp_path / "work") for name, module in stages.items()]
    reasons = {row["variant"] for row in lines[-1]["rows"] if "reason" in row}
    assert reasons <= kernels.ATTENTIONS.keys()
    report = make_report(lines)
    assert report["commit"]
    assert report["request"]["frames"] == 4
    (row,) = report["contenders"].values()
    assert (row["mode_warning"], row["replayed"]) == ("", True)
    assert row["p50"]["new_keyframes"]["wall"] <= row["p95"]["new_keyframes"]["wall"]
    text = "\n".join(tables(report))
    assert "| torch engines, CUDA graph, channels last |" in text
    assert "| convolution 3x3 | channels last | 1x32x8x8 |" in text


@pytest.mark.slow
def test_every_stage_of_a_dry_run_ends_in_a_line(tmp_path: Path) -> None:
    lines = dry_run(tmp_path, "--budget", "180")
    assert [line["stage"] for line in lines] == [stage.name for stage in STAGES]
    ran = {line["stage"] for line in lines if line["state"] == "done"}
    assert ran == {"device", "tests", "events", "weights", "request", "kernels", "diffusers-eager"}
    assert {line["state"] for line in lines} == {"done", "skipped"}
    tests = next(line for line in lines if line["stage"] == "tests")["rows"][-1]
    assert tests["outcomes"].keys() == {"skipped"}
    assert len(tests["skipped"]) == 1  # one clear reason


def test_the_modules_of_all_needed_packages_are_here() -> None:
    assert all(lease.find_spec(module) is not None for module in NEEDED.values())
