"""Contenders in turn, with stand-in processes instead of backends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.benchmarks.harness.measured_requests import scribbles
from sparsectrl_lcm.benchmarks.harness.rounds import Contender, Rounds, choose_residents, rotated, summarize
from sparsectrl_lcm.benchmarks.harness.worker_process import (
    Worker,
    WorkerFailed,
    kill_with_children,
    stop_with_children,
)

PROGRAM = """
import json, os, sys
from sparsectrl_lcm.benchmarks.harness.worker_process import serve
from sparsectrl_lcm.runtime.errors import BackendError

log = open(sys.argv[1], "a", buffering=1)

def load(name, peak=0):
    global who, bytes_
    who, bytes_ = name, peak
    print("a library talks while it loads")
    return {"precision": "fp32"}

def generate(seed=None, prompt="", dies=False, refuses=False, **request):
    print(json.dumps([who, os.getpid(), prompt[-1:], seed]), file=log)
    if dies and seed is not None:
        sys.exit("the last words")
    if refuses and seed is not None:
        raise BackendError("backend", "it cannot")
    return {"seconds": {"total": 1.0 if seed is None else float(seed)}, "peak_bytes": bytes_}

serve({"load": load, "warm_up": generate, "generate": generate, "limits": lambda: {"flops_per_s": 1.0}})
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "worker.py"
    path.write_text(PROGRAM)
    return sys.executable, str(path), str(tmp_path / "log")


def requests(program: tuple[str, ...]) -> list[list[Any]]:
    """Name, process, round and seed of each request in order of arrival. A warm-up has no seed."""
    return [json.loads(line) for line in Path(program[2]).read_text().splitlines()]


def test_contenders_answer_in_turn_and_stay_where_there_is_room(program: tuple[str, ...]) -> None:
    contenders = [Contender(name, {"name": name}, 1.0, command=program) for name in ("a", "b")]
    with Rounds(contenders, {}, memory_gb=2.0) as rounds:
        rounds.run(0)
        rounds.run(1)
    assert [(name, seed) for name, _, _, seed in requests(program)] == [
        *(("a", None), ("a", 0), ("a", 1), ("b", None), ("b", 0), ("b", 1)),
        *(("b", 100), ("b", 101), ("a", 100), ("a", 101)),
    ]
    assert len({process for _, process, _, _ in requests(program)}) == 2
    assert rounds.results["b"].samples == {"first": {"total": [0.0, 100.0]}, "second_seed": {"total": [1.0, 101.0]}}
    assert rounds.results["b"].loaded == {"precision": "fp32"}


def test_those_without_room_are_started_anew(program: tuple[str, ...]) -> None:
    contenders = [
        Contender("large", {"name": "large", "peak": 3 * 10**9}, 1.0, command=program, kinds=("first",)),
        Contender("small", {"name": "small", "peak": 10**9}, 1.0, command=program, kinds=("first",), probe="limits"),
        Contender("same", {"name": "small", "peak": 10**9}, 1.0, command=program, kinds=("first",), process="small"),
    ]
    with Rounds(contenders, {}, memory_gb=3.5) as rounds:
        for number in range(3):
            rounds.run(number)
    places: dict[str, list[int]] = {}
    for name, process, _, _ in requests(program):
        places.setdefault(name, []).append(process)
    assert {name: len(set(found)) for name, found in places.items()} == {"large": 2, "small": 2}, (
        "one that ends a round begins the next"
    )
    assert [len(rounds.results[name].starts) for name in ("large", "small", "same")] == [2, 2, 2]
    assert [len(result.samples["first"]["total"]) for result in rounds.results.values()] == [3, 3, 3]
    assert rounds.results["small"].probes == [{"flops_per_s": 1.0}] * 3
    assert rounds.results["large"].peak_bytes == 3 * 10**9


def test_one_that_fails_is_a_line_and_the_others_go_on(program: tuple[str, ...]) -> None:
    contenders = [
        Contender("dead", {"name": "dead"}, 1.0, {"dies": True}, program),
        Contender("refusing", {"name": "refusing"}, 1.0, {"refuses": True}, program),
        Contender("missing", {"name": "x"}, 1.0, command=(sys.executable, "-c", "import no_such_module")),
        Contender("good", {"name": "good"}, 1.0, command=program),
    ]
    with Rounds(contenders, {}, memory_gb=9.0) as rounds:
        rounds.run(0)
        rounds.run(1)
    assert rounds.results["dead"].failed == "ended with code 1: the last words"
    assert rounds.results["refusing"].failed == "it cannot"
    assert str(rounds.results["missing"].failed).endswith("No module named 'no_such_module'")
    assert rounds.results["good"].failed is None
    assert len(rounds.results["good"].samples["first"]["total"]) == 2
    assert sum(name == "dead" and seed is not None for name, _, _, seed in requests(program)) == 1


def test_each_contender_begins_a_round_and_those_of_one_process_stay_together() -> None:
    contenders = [Contender(name, {}, 1.0, process=process) for name, process in ("ap", "bq", "cq", "dr")]
    orders = ["".join(item.name for item in rotated(contenders, number)) for number in range(6)]
    assert orders == ["abcd", "cbda", "dabc", "acbd", "bcda", "dacb"]


def test_a_killed_process_is_told_from_one_that_ended() -> None:
    worker = Worker([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    with pytest.raises(WorkerFailed, match="was killed, as systems do if memory runs out"):
        worker.ask("load")
    worker.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")
def test_a_process_is_killed_with_those_that_it_started() -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0, "the child runs"
    kill_with_children(process)
    assert process.returncode == -9
    assert process.stdout.read() == "", "the child, which holds the pipe open, is gone too"
    process.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("ignored", "code"), [([], 7), (["SIGINT"], -15), (["SIGINT", "SIGTERM"], -9)])
def test_a_process_is_asked_to_end_before_it_is_killed(ignored: list[str], code: int) -> None:
    lines = ["import signal, sys, time", "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))"]
    lines += [f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ignored]
    lines += ["print('ready', flush=True)", "time.sleep(60)"]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    stop_with_children(process, seconds=20.0 if not ignored else 0.5)
    assert process.returncode == code
    process.stdout.close()


@pytest.mark.parametrize(
    ("memory_gb", "residents"),
    [
        (35, {"eager", "fp32", "a", "b"}),
        (30, {"eager", "fp32"}),
        (27, {"eager", "b"}),
        (22, {"eager"}),
        (21, {"a"}),
        (12, set()),
    ],
)
def test_residents_are_those_whose_starts_take_longest(memory_gb: float, residents: set[str]) -> None:
    """Among processes that leave room for any one of the others."""
    needs = {"fp32": 13.0, "eager": 9.0, "a": 8.0, "b": 5.0}
    costs = {"fp32": 60.0, "eager": 300.0, "a": 40.0, "b": 20.0}
    assert choose_residents(needs, costs, memory_gb) == residents


def test_summaries_are_medians_with_their_spread() -> None:
    summary = summarize({"first": {"total": [3.0, 1.0, 2.0, 10.0]}})
    assert summary == {"first": {"total": {"median": 2.5, "min": 1.0, "max": 10.0}}}


def test_scribbles_are_on_the_first_frame_the_middle_and_the_last() -> None:
    assert list(scribbles(64, 64, 16)) == [0, 8, 15]
    assert list(scribbles(64, 64, 2)) == [0, 1]
    pictures = scribbles(128, 64, 1)
    assert list(pictures) == [0]
    assert pictures[0].shape == (64, 128, 3)
    assert 0 < pictures[0].mean() < 128
