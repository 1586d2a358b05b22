"""`VideoPipeline.generate_many`: results in order, work ahead of the caller, errors, and the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from fakes.quick_executor import quick_pipeline
from pictures import pictures
from sparsectrl_lcm.runtime import (
    BackendError,
    Cancelled,
    ClipRequest,
    DeviceLost,
    InvalidRequest,
    Keyframe,
    RequestResult,
    RequestWarning,
    VideoPipeline,
)
from sparsectrl_lcm.runtime import request_checks as checks
from sparsectrl_lcm.runtime.checked_request import CheckedRequest

ROOT = Path(__file__).parent.parent.parent
SMALL = ClipRequest("a boat", width=64, height=64, num_frames=2, num_inference_steps=1)
SECONDS = 60
"""More than any wait of these tests takes."""


def with_seeds(*seeds: Any) -> list[ClipRequest]:
    return [replace(SMALL, seed=seed) for seed in seeds]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_the_clips_are_those_of_single_requests() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    picture = Keyframe(1, pictures(1, 64, 64)[0])
    requests = [*with_seeds(3, 4), replace(SMALL, seed=4, keyframes=[picture]), replace(SMALL, prompt="a cat", seed=3)]
    results = list(pipeline.generate_many(iter(requests)))
    assert [result.request for result in results] == requests
    other = VideoPipeline.load(backend="onnxruntime")
    for result in results:
        alone = other.run(result.request)
        assert result.clip is not None
        assert result.error is None
        assert (result.clip.frames == alone.frames).all()
        assert result.clip.seed == alone.seed


def test_nothing_begins_before_the_first_result_is_asked_for() -> None:
    pipeline = quick_pipeline(lambda _: pytest.fail("it began"))
    pipeline.generate_many(iter(lambda: pytest.fail("a request was taken"), None)).close()
    assert list(pipeline.generate_many([])) == []


def test_the_next_request_runs_and_reads_pictures_while_a_clip_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the next one runs, the keyframe of the one after it is read."""
    running, read, used = ({seed: Event() for seed in range(4)} for _ in range(3))
    load_picture = checks.load_picture

    def load(image: np.ndarray, field: str) -> Any:
        read[int(image.max())].set()
        return load_picture(image, field)

    def at_step(request: CheckedRequest) -> None:
        running[request.seed].set()
        if request.seed in (1, 2):
            assert used[request.seed - 1].wait(SECONDS)

    monkeypatch.setattr(checks, "load_picture", load)
    requests = [
        replace(SMALL, seed=seed, keyframes=[Keyframe(0, np.full((64, 64), seed, np.uint8))]) for seed in range(4)
    ]
    for seed, result in enumerate(quick_pipeline(at_step).generate_many(requests)):
        assert result.error is None
        if seed < 2:
            assert running[seed + 1].wait(SECONDS), "the next request runs, and waits for this one's use to end"
            assert read[seed + 2].wait(SECONDS), "the keyframe of the one after it is read"
            used[seed].set()


def test_two_requests_are_taken_ahead() -> None:
    taken = []

    def endless() -> Iterator[ClipRequest]:
        for seed in count():
            taken.append(seed)
            yield replace(SMALL, seed=seed)

    results = quick_pipeline().generate_many(endless())
    for number, result in enumerate(islice(results, 5)):
        assert result.clip is not None
        assert result.clip.seed == number
        time.sleep(0.01)
        assert taken == list(range(number + 3))
    results.close()


def fails(request: CheckedRequest) -> None:
    if request.seed in FAILURES:
        raise FAILURES[request.seed]


FAILURES: dict[int, Exception] = {
    1: BackendError("backend", "it failed"),
    2: MemoryError("no memory"),
    3: RuntimeError("a fault of a library"),
}


def test_a_request_that_fails_does_not_stop_the_others() -> None:
    broken = [replace(SMALL, seed=0, num_frames=999), replace(SMALL, seed=0, keyframes=[Keyframe(0, "missing.png")])]
    requests: list[Any] = [*with_seeds(0, 1, 2), *broken, "a boat", *with_seeds(3, 4)]
    results = list(quick_pipeline(fails).generate_many(requests))
    assert [result.clip is None for result in results] == [result.error is not None for result in results]
    errors = [result.error for result in results]
    assert [errors[place] for place in (0, 1, 2, 6, 7)] == [None, FAILURES[1], FAILURES[2], FAILURES[3], None]
    fields = ["num_frames", "keyframe 0", "request"]
    assert [error.field for error in errors[3:6] if isinstance(error, InvalidRequest)] == fields


def test_what_the_callback_of_warnings_raises_is_the_error_of_its_request() -> None:
    fault = ZeroDivisionError()

    def on_warning(position: int, warning: RequestWarning) -> None:
        assert "unknown words: boat" in warning.text
        if position == 0:
            raise fault

    results = list(quick_pipeline(lambda _: None).generate_many(with_seeds(0, 1), on_warning=on_warning))
    assert [result.error for result in results] == [fault, None]


def test_a_lost_device_ends_the_results() -> None:
    def at_step(request: CheckedRequest) -> None:
        if request.seed >= 1:
            raise DeviceLost("", "the device has fallen off")

    results = quick_pipeline(at_step).generate_many(with_seeds(0, 1, 2, 3))
    assert next(results).clip is not None
    with pytest.raises(DeviceLost):
        next(results)
    assert list(results) == []


def test_what_the_requests_raise_follows_the_results_before_it() -> None:
    def requests() -> Iterator[ClipRequest]:
        yield from with_seeds(0, 1)
        raise LookupError("the list is torn")

    results: list[RequestResult] = []
    with pytest.raises(LookupError, match="the list is torn"):
        results.extend(quick_pipeline().generate_many(requests()))
    assert [result.clip.seed for result in results if result.clip] == [0, 1]


def test_progress_has_the_position_and_cancels_one_request() -> None:
    seen: list[tuple[int, str, int]] = []

    def on_progress(position: int, progress: Any) -> bool:
        seen.append((position, progress.stage, progress.step))
        return position != 1

    results = list(quick_pipeline().generate_many(with_seeds(5, 6, 7), on_progress))
    assert seen == [(0, "denoise", 0), (0, "denoise", 1), (1, "denoise", 0), (2, "denoise", 0), (2, "denoise", 1)]
    assert [type(result.error) for result in results] == [type(None), Cancelled, type(None)]


def test_closing_ends_the_request_that_runs_and_those_that_wait() -> None:
    begun, closing = Event(), Event()
    ran: list[int] = []

    def at_step(request: CheckedRequest) -> None:
        ran.append(request.seed)
        if request.seed == 1:
            begun.set()
            assert closing.wait(SECONDS)

    pipeline = quick_pipeline(at_step)
    results = pipeline.generate_many(with_seeds(*range(9)))
    next(results)
    assert begun.wait(SECONDS)
    timer = threading.Timer(0.05, closing.set)
    timer.start()
    results.close()  # waits for the step of request 1
    timer.join()
    time.sleep(0.1)
    assert ran == [0, 1]
    assert pipeline.run(replace(SMALL, seed=8)).seed == 8


INTERRUPTED = """
import signal, sys, threading, time
from fakes.quick_executor import quick_pipeline
from sparsectrl_lcm.runtime import ClipRequest

pressed = threading.Event()

def press(number, frame):
    pressed.set()
    signal.default_int_handler(number, frame)

signal.signal(signal.SIGINT, press)  # whoever runs the tests may ignore it

def at_step(request):
    if request.seed == 1:
        print("running", flush=True)
        pressed.wait(60)
    assert request.seed < 2, "it went on"

requests = (ClipRequest("a boat", width=64, height=64, num_frames=2, seed=seed) for seed in range(99))
for result in quick_pipeline(at_step).generate_many(requests):
    assert result.error is None, result.error
    if sys.argv[1] == "use":
        time.sleep(60)
"""


@pytest.mark.parametrize("where", ["wait", "use"])
def test_an_interrupt_ends_the_process(where: str) -> None:
    """While the caller waits for a result, or uses a clip."""
    command = [sys.executable, "-c", INTERRUPTED, where]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment, pipe = os.environ | {"PYTHONPATH": path}, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "it went on" not in errors
