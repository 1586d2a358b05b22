"""The check that progress follows the device's events, on the emulated device."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from fakes.emulated_demo import SMALL, emulated_demo, keyframes, small_clip
from sparsectrl_lcm.benchmarks.harness.event_order import StageEnd, faults, stage_ends
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.progress import OnProgress


@pytest.fixture
def demo() -> SimpleNamespace:
    """A device on which a request has been captured."""
    machine = emulated_demo(SMALL)
    asking(machine, 1)(lambda _: None)
    return machine


def asking(machine: SimpleNamespace, seed: int) -> Callable[[OnProgress], Clip]:
    def ask(on_progress: OnProgress) -> Clip:
        return small_clip(machine, "a boat", keyframes(seed=seed), seed=seed, on_progress=on_progress)

    return ask


def ends_of(machine: SimpleNamespace, seed: int) -> tuple[StageEnd, ...]:
    machine.cudart.calls.clear()
    ends = stage_ends(asking(machine, seed), clock=lambda: machine.cudart.streams.now / 1000)
    assert "cudaGraphLaunch" in machine.cudart.calls
    return ends


def test_the_sum_of_the_stages_is_the_wall_time(demo: SimpleNamespace) -> None:
    for seed in (2, 3):
        ends = ends_of(demo, seed)
        assert [end.stage for end in ends] == ["text", "keyframes", "control", "denoise", "decode"]
        assert [end.device for end in ends] == [1, 2, 6, 10, 11]
        assert faults(ends) == []


def test_events_that_a_launch_does_not_rearm_are_found(demo: SimpleNamespace) -> None:
    demo.cudart.streams.rearms = False
    ends = ends_of(demo, 2)
    found = faults(ends)
    assert "keyframes ended 2000.0 ms after the launch, but the host passed its event at" in found[0]
    assert any(fault.startswith("decode ended 11000.0 ms") for fault in found)


def test_stale_events_spoil_neither_frames_nor_timings(demo: SimpleNamespace) -> None:
    """Both are read when the whole stream has passed; the events hold times of another kind of request before."""

    def clip(seed: int, steps: int) -> Clip:
        return small_clip(demo, "a boat", keyframes(seed=seed), seed=seed, num_inference_steps=steps)

    for seed in range(2):
        clip(seed, 2)
        right = clip(5, 4)
    demo.cudart.streams.rearms = False
    clip(3, 2)
    small_clip(demo, "a dog", keyframes(seed=4), seed=4, num_inference_steps=2)
    demo.cudart.calls.clear()
    stale = clip(5, 4)
    assert "cudaGraphLaunch" in demo.cudart.calls
    assert (stale.frames == right.frames).all()
    assert (stale.timings["denoise"], stale.timings["decode"]) == (4.0, 1.0)


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        ((("text", 1.0, 11.0), ("denoise", 11.0, 11.0)), "passed the event of text only when that of denoise"),
        ((("text", 1.0, 1.0), ("denoise", 11.0, 15.0)), "the stages take 11000.0 ms, but the host waited for 15000.0"),
        ((("text", 1.0, 1.0), ("denoise", 11.0, 8.0)), "denoise ended 11000.0 ms after the launch"),
        ((("text", 1e-3, 1e-3), ("denoise", 2e-3, 2e-3)), "too few to tell"),
    ],
)
def test_each_fault_is_named(ends: tuple[tuple[str, float, float], ...], fault: str) -> None:
    (found,) = faults(tuple(StageEnd(*end) for end in ends))
    assert fault in found
