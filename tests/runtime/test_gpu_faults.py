"""Requests on the emulated device that fail, are cancelled or lose the device, and the requests after them."""

import logging
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import runtime as cudart
from fakes.cuda_emulation import EmulatedCudart
from fakes.emulated_demo import SMALL, emulated_demo, fresh, fresh_small, keyframes, small_clip, told
from sparsectrl_lcm.runtime import BackendError, Cancelled
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.cuda import Cuda, DeviceLost

ERRORS = cudart.cudaError_t


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo bundle on an emulated device, whose engines return digests of their inputs."""
    return emulated_demo()


def test_where_capture_fails_requests_are_enqueued(demo: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    loop = 1 + 4 + 2 * 4 + 1
    demo.loader.failures = [loop + 3]  # the third engine within the capture
    with caplog.at_level(logging.WARNING):
        clips = [demo.pipeline.generate("a boat", keyframes(seed=seed), seed=1) for seed in range(3)]
    (warning,) = told(caplog.records)
    assert "requests are enqueued one engine at a time" in warning
    assert demo.cudart.calls.count("cudaStreamBeginCapture") == 1, "the first part"
    assert demo.cudart.calls.count("cudaGraphLaunch") == 0
    for seed, clip in enumerate(clips):
        assert (clip.frames == fresh("a boat", keyframes(seed=seed), seed=1)).all()


def test_a_failed_engine_leaves_the_next_request_whole(demo: SimpleNamespace) -> None:
    demo.loader.failures = [4]
    with pytest.raises(BackendError, match="controlnet_scribble cannot run"):
        demo.pipeline.generate("a boat", keyframes(), seed=1)
    assert (demo.pipeline.generate("a boat", keyframes(), seed=1).frames == fresh("a boat", keyframes(), seed=1)).all()


def test_a_cancelled_request_leaves_the_next_one_whole(demo: SimpleNamespace) -> None:
    seen = []

    def cancel(progress: Any) -> bool:
        seen.append((progress.stage, progress.step))
        return progress.stage != "denoise" or progress.step < 2

    with pytest.raises(Cancelled, match="after denoise 2 of 4"):
        demo.pipeline.generate("a boat", keyframes(), seed=1, on_progress=cancel)
    assert seen[-1] == ("denoise", 2)
    assert (demo.pipeline.generate("a boat", keyframes(), seed=1).frames == fresh("a boat", keyframes(), seed=1)).all()


def requests_with_fault(index: int, status: Any) -> tuple[SimpleNamespace, list[Exception | None]]:
    """Four requests, in which the CUDA call at `index` fails: the last replays what the others have captured."""
    machine = emulated_demo(SMALL)
    machine.cudart.fault = (index, status)
    errors: list[Exception | None] = []
    for seed, picture in ((1, 0), (2, 0), (3, 1), (4, 2)):
        try:
            small_clip(machine, "a boat", keyframes(seed=picture), seed=seed)
            errors.append(None)
        except BackendError as error:
            errors.append(error)
    return machine, errors


@cache
def calls_of_requests() -> list[str]:
    """The CUDA calls of the four requests, from the first allocation on."""
    machine, errors = requests_with_fault(1 << 30, None)
    assert errors == [None] * 4
    return list(machine.cudart.calls)  # before the executor is freed, which releases everything


def places(every: bool) -> Iterator[int]:
    """The calls from the first allocation on: every one, or for each function its first and its last call."""
    calls = calls_of_requests()
    start = calls.index("cudaHostAlloc") - 1
    for index in range(start, len(calls)):
        called, name = calls[start:], calls[index]
        ends = (called.index(name), len(called) - 1 - called[::-1].index(name))
        # A failed release need not fail the request; it shows as a leak.
        if (every or index - start in ends) and not name.endswith("Destroy") and name != "cudaFree":
            yield index


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("status", [ERRORS.cudaErrorMemoryAllocation, ERRORS.cudaErrorInvalidValue])
def test_after_a_fault_at_any_call_the_pipeline_recovers(status: Any, every: bool) -> None:
    """At most the request with the fault fails, in one line. The next one has the right frames, and nothing leaks."""
    expected = fresh_small("a boat", keyframes(), seed=4)
    for index in places(every):
        machine, errors = requests_with_fault(index, status)
        call = (index, calls_of_requests()[index])
        failed = [error for error in errors if error is not None]
        assert len(failed) <= 1, call
        assert all("\n" not in str(error) for error in failed)
        frames = small_clip(machine, "a boat", keyframes(), seed=4).frames
        assert (frames == expected).all(), call
        machine.pipeline.close()
        assert machine.cudart.leaked == [], call


def test_a_lost_device_says_that_the_pipeline_has_to_be_loaded_again() -> None:
    calls = calls_of_requests()
    for index in (next(places(True)), calls.index("cudaGraphLaunch"), calls.index("cudaEventSynchronize")):
        _, errors = requests_with_fault(index, ERRORS.cudaErrorLaunchFailure)
        after = [error for error in errors if error is not None]
        assert after, calls[index]
        assert errors[-1] is after[-1], "no further request is tried"
        assert all(isinstance(error, DeviceLost) for error in after)
        assert "load the pipeline again" in str(after[-1])


def test_what_a_lost_device_answers_keeps_nothing_of_earlier_requests(demo: SimpleNamespace) -> None:
    demo.executor._lost = ("backend", "of another device", "")
    errors = []
    for _ in range(2):
        with pytest.raises(DeviceLost, match="of another device") as error:
            demo.pipeline.generate("a boat", seed=1)
        errors.append(error.value)
    assert errors[0] is not errors[1], "an exception object keeps the stack frames that it passes"


# The emulation itself


def test_the_emulation_knows_no_call_that_cuda_lacks() -> None:
    with pytest.raises(AttributeError):
        EmulatedCudart().cudaMallocEverything(1)
    emulated = [name.removeprefix("_") for name in vars(EmulatedCudart) if name.startswith("_cuda")]
    assert all(callable(getattr(cudart, name)) for name in emulated)
    assert set(calls_of_requests()) <= set(emulated)


def test_what_is_copied_to_the_host_arrives_when_the_host_waits() -> None:
    cuda = Cuda(EmulatedCudart())
    device, host = cuda.allocate(1), cuda.allocate_host(1)
    content = host_array(host, (1,), "uint8")
    content[0] = 1
    cuda.fill(device, 2, 1)
    cuda.copy_out(host, device, 1)
    cuda.fill(device, 3, 1)
    assert content[0] == 1
    cuda.synchronize()
    assert content[0] == 2, "what it was when the copy ran"


def test_work_on_another_stream_is_not_waited_for() -> None:
    api = EmulatedCudart()
    cuda, other = Cuda(api), Cuda(api)
    device, host = cuda.allocate(1), cuda.allocate_host(1)
    content = host_array(host, (1,), "uint8")
    content[0] = 1
    event = other.event()
    other.copy_in(device, host, 1)
    other.record(event)
    other.fill(device, 7, 1)
    cuda.copy_out(host, device, 1)
    cuda.synchronize()
    assert content[0] == 0xA5, "what the memory held before"
    content[0] = 1
    other.wait(event)
    cuda.copy_out(host, device, 1)
    cuda.synchronize()
    assert content[0] == 1, "the work up to the event, and no more"


def test_events_in_a_graph_are_external() -> None:
    api = EmulatedCudart()
    cuda = Cuda(api)
    event = cuda.event()
    cuda.begin_capture()
    cuda.record(event)
    graph = cuda.instantiate(cuda.end_capture())
    cuda.synchronize()
    assert api.streams.events[event] == -1, "recorded, not run"
    cuda.launch(graph)
    cuda.wait(event)
    assert api.streams.events[event] > 0
