"""TensorRT engines with strict fakes of each release, on an emulated stream."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import ACTIVATION_BYTES, TENSORRT
from fakes.tensorrt_process import GRAPH, Opened, Process, one_line
from sparsectrl_lcm.runtime.errors import BackendError, DeviceOutOfMemory

tensorrt_only, tensorrt_rtx_only = (
    pytest.mark.parametrize("release", releases, scope="module", indirect=True) for releases in (TENSORRT, ["rtx-1.7"])
)


# One engine


def test_an_engine_tells_its_types_and_its_memory(process: Process) -> None:
    encoder = process.open("text_encoder").engine
    ids = dict.fromkeys(("input_ids", "attention_mask", "clip_skip"), "int64")
    assert encoder.dtypes == {**ids, "prompt_embeds": "float16"}
    assert process.open().engine.dtypes == {"latents": "float32", "frames": "uint8"}
    assert encoder.activation_bytes == ACTIVATION_BYTES


def test_the_plan_is_what_was_built(process: Process) -> None:
    process.open()
    assert len(process.workshop.calls("Runtime")) == 1
    process.open("unet")
    assert len(process.workshop.calls("Runtime")) == 1, "one runtime serves all engines"
    assert len(process.workshop.calls("Runtime.deserialize_cuda_engine")) == 2


def test_activation_memory_is_the_callers(opened: Opened) -> None:
    trt, workshop = opened.workshop.trt, opened.workshop
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    (given,) = workshop.calls("ICudaEngine.create_execution_context")
    if workshop.backend == "tensorrt":
        assert given == (strategy,)
    else:
        assert isinstance(given[0], trt.IRuntimeConfig)
        assert workshop.calls("IRuntimeConfig.set_execution_context_allocation_strategy") == [(strategy,)]
    opened.engine.use_activation(8192, 2 * ACTIVATION_BYTES)
    given = workshop.calls("IExecutionContext.set_device_memory")
    assert given == [(4096, ACTIVATION_BYTES), (8192, 2 * ACTIVATION_BYTES)]
    assert len(workshop.calls("ICudaEngine.create_execution_context")) == 1, "other memory takes no other context"


def test_a_run_goes_to_the_stream(opened: Opened) -> None:
    opened.engine.enqueue({"latents": 256, "frames": 512})
    assert opened.workshop.calls("IExecutionContext.execute_async_v3") == [(opened.cuda.stream,)]
    assert opened.cudart.streams.queues.keys() == {0, opened.cuda.stream}


def test_only_addresses_that_changed_are_set(opened: Opened) -> None:
    for addresses in (
        {"latents": 256, "frames": 512},
        {"latents": 256, "frames": 512},
        {"latents": 256, "frames": 768},
    ):
        opened.engine.enqueue(addresses)
    expected = [("latents", 256), ("frames", 512), ("frames", 768)]
    assert opened.workshop.calls("IExecutionContext.set_tensor_address") == expected
    assert len(opened.workshop.calls("IExecutionContext.execute_async_v3")) == 3


def test_a_refused_address_is_an_error_and_is_set_again(opened: Opened) -> None:
    workshop = opened.workshop
    workshop.fail("IExecutionContext.set_tensor_address", "the address\nis not aligned", False)
    with pytest.raises(BackendError, match="address of latents") as error:
        opened.engine.enqueue({"latents": 257})
    one_line(error, workshop.backend, "the address is not aligned")
    assert workshop.calls("IExecutionContext.execute_async_v3") == []
    workshop.trt.answers["IExecutionContext.set_tensor_address"] = lambda *_: True
    opened.engine.enqueue({"latents": 257})
    assert workshop.calls("IExecutionContext.set_tensor_address") == [("latents", 257)] * 2


def test_a_run_that_fails_is_an_error(opened: Opened) -> None:
    opened.workshop.fail("IExecutionContext.execute_async_v3", "Error Code 1:\nCuda Runtime", False)
    with pytest.raises(BackendError) as error:
        opened.engine.enqueue({"latents": 256})
    one_line(error, opened.workshop.backend, "Error Code 1: Cuda Runtime")


def test_memory_that_an_earlier_call_did_without_is_not_blamed(opened: Opened) -> None:
    """A larger memory helps against one of these failures only: the loop frees everything for the other."""
    opened.workshop.complain("Error Code 2: out of memory")  # of a call that succeeded nevertheless
    opened.workshop.fail("IExecutionContext.execute_async_v3", "Error Code 1: Cuda Runtime", False)
    with pytest.raises(BackendError) as error:
        opened.engine.enqueue({"latents": 256})
    assert type(error.value) is BackendError
    one_line(error, opened.workshop.backend, "Error Code 1: Cuda Runtime")


def test_an_engine_tells_whether_it_can_be_captured(opened: Opened) -> None:
    """TensorRT-RTX is asked before a capture, since the call would break the capture. TensorRT has no such call."""
    assert opened.engine.capturable
    asked = opened.workshop.calls("IExecutionContext.is_stream_capturable")
    if opened.workshop.backend == "tensorrt-rtx":
        opened.workshop.trt.answers["IExecutionContext.is_stream_capturable"] = lambda *_: False
        assert not opened.engine.capturable
        assert asked == [(opened.cuda.stream,)]
    else:
        assert asked == []


def test_nothing_is_asked_within_a_capture(opened: Opened) -> None:
    opened.cuda.begin_capture()
    opened.engine.enqueue({"latents": 256})
    assert opened.workshop.calls("IExecutionContext.is_stream_capturable") == []
    assert len(opened.workshop.calls("IExecutionContext.execute_async_v3")) == 1


@pytest.mark.parametrize("name", ["Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"])
def test_an_engine_that_cannot_be_loaded_is_an_error(process: Process, name: str) -> None:
    process.workshop.fail(name, "Error Code 2:\nout of memory")
    with pytest.raises(BackendError) as error:
        process.open()
    one_line(error, process.workshop.backend, f"{GRAPH}.engine", "Error Code 2: out of memory")
    assert isinstance(error.value, DeviceOutOfMemory)


def test_a_context_is_freed_before_its_engine(process: Process) -> None:
    freed: list[str] = []
    answers, trt = process.workshop.trt.answers, process.workshop.trt
    load = answers["Runtime.deserialize_cuda_engine"]

    def watched(name: str, made: Any) -> Any:
        weakref.finalize(made, freed.append, name)
        return made

    answers["Runtime.deserialize_cuda_engine"] = lambda *args: watched("engine", load(*args))
    answers["ICudaEngine.create_execution_context"] = lambda *_: watched("context", trt.new("IExecutionContext"))
    opened = process.open()
    assert freed == []
    opened.engine.close()
    gc.collect()
    assert freed == ["context", "engine"]


# Kernels that TensorRT-RTX compiles


@tensorrt_rtx_only
def test_compiled_kernels_are_kept_for_the_next_process(spoilt: Process) -> None:
    engine, kernels = spoilt.open().engine, spoilt.folder / f"{GRAPH}.kernels"
    assert not kernels.exists()
    for _ in range(2):
        engine.enqueue({"latents": 256})
    assert kernels.read_bytes() == b"kernels"
    assert len(spoilt.workshop.calls("IRuntimeCache.serialize")) == 1
    assert spoilt.workshop.calls("IRuntimeCache.deserialize") == []
    assert not list(spoilt.folder.glob("*.part"))
    later = Process(spoilt.release, spoilt.bundle)
    later.open().engine.enqueue({"latents": 256})
    assert later.workshop.calls("IRuntimeCache.deserialize") == [(b"kernels",)]
    assert later.workshop.calls("IRuntimeCache.serialize") == []


@tensorrt_rtx_only
def test_the_cache_belongs_to_the_context(spoilt: Process) -> None:
    spoilt.open()
    names = [name for name, _, _ in spoilt.workshop.trt.calls]
    assert names.index("IRuntimeConfig.set_runtime_cache") < names.index("ICudaEngine.create_execution_context")


@tensorrt_rtx_only
def test_kernels_of_another_device_are_compiled_anew(spoilt: Process) -> None:
    """A cache is refused if the device or the driver has changed."""
    kernels = spoilt.folder / f"{GRAPH}.kernels"
    kernels.write_bytes(b"of another device")
    spoilt.workshop.fail("IRuntimeCache.deserialize", "the cache is of another device", False)
    spoilt.open().engine.enqueue({"latents": 256})
    assert kernels.read_bytes() == b"kernels"
    later = Process(spoilt.release, spoilt.bundle)
    later.open().engine.enqueue({"latents": 256})
    assert later.workshop.calls("IRuntimeCache.deserialize") == [(b"kernels",)]
    assert later.workshop.calls("IRuntimeCache.serialize") == []


@tensorrt_rtx_only
def test_kernels_that_cannot_be_read_are_compiled_anew(spoilt: Process) -> None:
    kernels = spoilt.folder / f"{GRAPH}.kernels"
    kernels.mkdir()
    spoilt.open().engine.enqueue({"latents": 256})
    assert spoilt.workshop.calls("IRuntimeCache.deserialize") == []
    assert [path.name for path in spoilt.folder.glob("*.kernels*")] == [kernels.name]


@tensorrt_rtx_only
def test_without_room_for_kernels_it_runs_all_the_same(spoilt: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    engine = spoilt.open().engine
    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        engine.enqueue({"latents": 256})
    assert not list(spoilt.folder.glob("*.kernels*"))


@tensorrt_only
def test_tensorrt_keeps_no_kernels(process: Process) -> None:
    process.open().engine.enqueue({"latents": 256})
    assert not list(process.folder.glob("*.kernels"))
