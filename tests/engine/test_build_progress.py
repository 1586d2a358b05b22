"""Progress and cancellation of a build, with strict fakes of each TensorRT release."""

import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import (
    PHASES,
    RELEASES,
    Event,
    Workshop,
    fake,
    finish,
    phase,
    report,
    small_copy,
    start,
    steps,
)
from sparsectrl_lcm.engine.tensorrt.build_progress import BuildControl, interruptible, make_progress_monitor
from sparsectrl_lcm.runtime.errors import BackendError


@pytest.fixture(params=RELEASES)
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return Workshop(request.param)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


# Ctrl-C


def test_ctrl_c_ends_the_build_where_tensorrt_asks(workshop: Workshop, bundle: Path) -> None:
    """A callback must not raise: the bindings would print the error and continue."""
    answers: list[bool] = []

    def interrupted(_: Any, __: Any, config: Any) -> None:
        workshop.measure(config)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 6)
        answers.append(monitor.step_complete("Building engine", 0))
        signal.raise_signal(signal.SIGINT)
        answers.append(monitor.step_complete("Building engine", 1))
        monitor.phase_finish("Building engine")
        workshop.complain("Error Code 7: BuildCanceled")

    workshop.trt.answers["Builder.build_serialized_network"] = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        workshop.build(bundle)
    assert answers == [True, False]
    assert signal.getsignal(signal.SIGINT) is before
    assert workshop.left(bundle) == ([], workshop.timings("text_encoder"))


def test_ctrl_c_counts_though_the_engine_was_ready(workshop: Workshop, bundle: Path) -> None:
    def too_late(_: Any, __: Any, config: Any) -> bytes:
        workshop.measure(config)
        signal.raise_signal(signal.SIGINT)
        return b"plan"

    workshop.trt.answers["Builder.build_serialized_network"] = too_late
    with pytest.raises(KeyboardInterrupt):
        workshop.build(bundle)
    assert workshop.left(bundle) == ([], workshop.timings("text_encoder"))


def test_the_handler_of_ctrl_c_comes_back_after_a_failure(workshop: Workshop, bundle: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    workshop.fail("Builder.build_serialized_network", "no memory")
    with pytest.raises(BackendError):
        workshop.build(bundle)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_may_build(bundle: Path) -> None:
    """Python allows only the main thread to set signal handlers."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(Workshop("11.4").build(bundle)))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_thread_leaves_the_handler_of_ctrl_c_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def wait() -> None:
        with interruptible() as control:
            seen.append((signal.getsignal(signal.SIGINT), control.stopped.is_set()))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt, even if the tests run in the background, where a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_sets_the_event_within_the_block_alone() -> None:
    with interruptible() as control:
        control.check()
        signal.raise_signal(signal.SIGINT)
        assert control.stopped.is_set()
        assert control.error is None
    with pytest.raises(KeyboardInterrupt):
        control.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# Errors of the caller's callback


class Closed(BaseException):
    """An error that `except Exception` does not catch."""


@pytest.mark.parametrize("kind", [RuntimeError, Closed, KeyboardInterrupt])
def test_an_error_of_the_callback_ends_the_build_and_is_raised(
    workshop: Workshop, bundle: Path, kind: type[BaseException]
) -> None:
    previous, error, seen = workshop.folder(bundle), kind("", "the window was closed"), []
    previous.mkdir(parents=True)
    (previous / "engines.json").write_text("the previous build")

    def on_progress(text: str, _: float) -> None:
        seen.append(text)
        if "timing graph nodes" in text:
            raise error

    with pytest.raises(kind) as raised:
        workshop.build(bundle, on_progress=on_progress)
    assert raised.value is error
    assert seen[0] == "text_encoder (1/4): reading weights"
    assert {text.partition(" ")[0] for text in seen} == {"text_encoder"}
    assert not any("reformatting" in text for text in seen), "the build ends at its next step"
    assert workshop.left(bundle) == ([previous.name], workshop.timings("text_encoder"))
    assert (previous / "engines.json").read_text() == "the previous build"


def test_the_library_sees_no_error_of_the_callback(workshop: Workshop, bundle: Path) -> None:
    """The bindings would print the error and continue.

    The build raises the first error of the callback, even if the engine was finished.
    """
    answers: list[bool] = []

    def asked(_: Any, __: Any, config: Any) -> bytes:
        monitor = config.progress_monitor
        answers.append(monitor.step_complete("Building engine", 0))
        monitor.phase_start("Building engine", None, 6)
        answers.append(monitor.step_complete("Building engine", 0))
        monitor.phase_finish("Building engine")
        return b"plan"

    raised: list[str] = []

    def on_progress(text: str, _: float) -> None:
        if "building engine" in text:
            raised.append(f"error {len(raised)}")
            raise ValueError(raised[-1])

    workshop.trt.answers["Builder.build_serialized_network"] = asked
    with pytest.raises(ValueError, match="error 0"):
        workshop.build(bundle, on_progress=on_progress)
    assert answers == [True, False]
    assert raised == ["error 0", "error 1"]
    assert workshop.calls("Runtime.deserialize_cuda_engine") == []


def test_an_error_comes_before_ctrl_c() -> None:
    control = BuildControl()
    control.check()
    control.stopped.set()
    with pytest.raises(KeyboardInterrupt):
        control.check()
    control.error = ValueError("first")
    with pytest.raises(ValueError, match="first"):
        control.check()


@pytest.mark.parametrize("release", RELEASES)
def test_a_monitor_whose_build_was_stopped_says_so_at_every_step(release: str) -> None:
    control = BuildControl()
    monitor = make_progress_monitor(fake(release), lambda *_: None, control)
    assert report(monitor, [start("outer", None, 4), *steps("outer", 0)])
    control.stopped.set()
    assert not report(monitor, steps("outer", 1))
    assert not report(monitor, steps("outer", 2))


# Progress


def reported(release: str, events: Iterable[Event]) -> list[tuple[str, float]]:
    """Returns the progress that a build with these events reports."""
    seen: list[tuple[str, float]] = []
    control = BuildControl()
    monitor = make_progress_monitor(fake(release), lambda *one: seen.append(one), control)
    assert report(monitor, events)
    control.check()
    return seen


@pytest.mark.parametrize("release", RELEASES)
def test_progress_stays_within_its_bounds(release: str) -> None:
    seen = reported(release, [*PHASES, *PHASES])
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert {"cloning network graph", "timing graph nodes", "building engine"} <= {text for text, _ in seen}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("passes", [1, 2])
def test_progress_never_runs_backwards(release: str, passes: int) -> None:
    fractions = [fraction for _, fraction in reported(release, PHASES * passes)]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] > 0.5


@pytest.mark.parametrize("release", RELEASES)
def test_steps_of_a_phase_within_a_phase_are_parts_of_its_step(release: str) -> None:
    events = [start("outer", None, 2), *phase("inner", "outer", 4), *steps("outer", 0, 1), finish("outer")]
    fractions = [fraction for _, fraction in reported(release, events)]
    assert fractions == pytest.approx([0, 0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 1 / 2, 1])


@pytest.mark.parametrize("release", RELEASES)
def test_a_phase_without_steps_does_no_harm(release: str) -> None:
    assert reported(release, [start("empty", None, 0), finish("empty")]) == [("empty", 0.0)]


def test_the_build_proper_is_the_last_four_fifths_of_each_graph(workshop: Workshop, bundle: Path) -> None:
    seen: list[tuple[str, float]] = []
    graphs = list(workshop.build(bundle, on_progress=lambda *one: seen.append(one)).engines)
    for place, graph in enumerate(graphs):
        mine = {text.partition(": ")[2]: 4 * at - place for text, at in reversed(seen) if text.startswith(f"{graph} ")}
        assert mine["reading weights"] == 0
        assert mine["cloning network graph"] == pytest.approx(0.2)
        last = [4 * at - place for text, at in seen if text.startswith(f"{graph} ")][-1]
        assert last == pytest.approx(0.2 + 0.8 * reported(workshop.release, PHASES)[-1][1])
