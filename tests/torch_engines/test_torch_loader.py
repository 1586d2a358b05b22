"""Whole requests through the loop on an emulated device, with torch's engines on the host."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundles import with_other_motion_module, with_other_weights
from closeness import assert_close
from fakes.gpu_emulation import EmulatedCudart
from gpu.requests import keyframes
from sparsectrl_lcm.runtime import BackendError, DeviceOutOfMemory, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor
from torch.overrides import TorchFunctionMode

from .loader import TorchEngine, TorchLoader
from .streams import NEEDED, CudaStream, HostStream, missing_name

SIDE, FRAMES = 64, 4
LEVELS = {"fp32": 1, "fp16": 4}
"""Largest difference from the CPU backend, in levels of 255."""


def open_pipeline(bundle: Path | None = None, weights: Any = None, **options: Any) -> VideoPipeline:
    """A pipeline on an emulated device."""
    api, opened = EmulatedCudart(), Bundle.load(bundle)
    loader = TorchLoader(stream=lambda cuda: HostStream(api, cuda.stream), **options)
    return VideoPipeline(opened, GpuExecutor(opened, loader, 1 << 30, Cuda(api)), weights)


def ask(pipeline: VideoPipeline, controlnet: str | None = "scribble", **options: Any) -> np.ndarray:
    """A small request with two keyframes."""
    given = {"keyframes": keyframes((0, 3), SIDE), "controlnet": controlnet} if controlnet else {}
    size = {"width": SIDE, "height": SIDE, "num_frames": FRAMES, "num_inference_steps": 2}
    frames: np.ndarray = pipeline.generate("a red circle moves", seed=1, **size, **given, **options).frames
    return frames


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_frames_are_those_of_the_cpu_backend(precision: str) -> None:
    cpu, pipeline = VideoPipeline.load(None, "onnxruntime"), open_pipeline(precision=precision)
    requests: list[dict[str, Any]] = [{"controlnet": "rgb"}, {"guidance_scale": 2.0}]
    for options in requests if precision == "fp32" else [{"controlnet": None}]:
        expected = ask(cpu, **options)
        assert expected.std() > 10  # plain grey frames would pass otherwise
        plain, replayed = ask(pipeline, **options), ask(pipeline, **options)
        assert np.abs(plain.astype(int) - expected).max() <= LEVELS[precision], options
        np.testing.assert_array_equal(plain, replayed)


def test_a_long_clip_runs_on_the_engines_of_a_window() -> None:
    long: dict[str, Any] = {"num_frames": 7, "context_length": FRAMES, "num_inference_steps": 2, "seed": 1}
    long |= {"width": SIDE, "height": SIDE, "keyframes": keyframes((0, 6), SIDE)}
    expected, made = (
        pipeline.generate("a red circle moves", **long).frames
        for pipeline in (VideoPipeline.load(None, "onnxruntime"), open_pipeline(precision="fp32"))
    )
    assert expected.std() > 10
    assert_close(made, expected)


def test_each_request_has_the_weights_that_it_names(tmp_path: Path) -> None:
    """The same keyframes and prompt each time: a conditioning of other weights would show, and so would a graph."""
    motion = with_other_motion_module(demo_bundle(), tmp_path / "motion")
    other = with_other_weights(motion, tmp_path / "other", "onnx/text_encoder.weights")
    expected = {
        name: ask(open_pipeline(bundle, precision="fp32")) for name, bundle in {None: None, "other": other}.items()
    }
    assert np.abs(expected["other"].astype(int) - expected[None]).max() > 10
    pipeline = open_pipeline(precision="fp32", refit=True, weights={"other": other})
    for name in ("other", None, "other"):
        np.testing.assert_array_equal(ask(pipeline, weights=name), expected[name], str(name))


def test_without_refit_the_engines_refuse_other_weights() -> None:
    with pytest.raises(BackendError, match="^refit: [^\n]*$"):
        open_pipeline().refit(demo_bundle())


class Device(TorchFunctionMode):
    """Notes the types and layouts of tensors that come to the device "meta", and what computes there."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            last = result.is_contiguous(memory_format=torch.channels_last) if result.ndim == 4 else False
            self.events.append((function.__name__, args[0].device.type, result.dtype, last))
        return result


def test_weights_reach_the_device_in_the_type_and_layout_of_the_engine() -> None:
    """Whatever torch allocated there for anything else would stay with it."""
    program = SimpleNamespace(constants={}, weights=("conv", "bias"), outputs=())
    types = {"conv": torch.float16, "bias": torch.float32}
    compiled: Any = SimpleNamespace(program=program, types=types, dtypes={})
    stream: Any = SimpleNamespace(device=torch.device("meta"), prepare=lambda work: work())
    engine = TorchEngine(compiled, stream, {}, lambda _: None)
    arrays = {"conv": np.ones((4, 3, 3, 3), np.float32), "bias": np.ones(4, np.float32)}
    with Device() as device:
        engine.load(arrays.__getitem__, channels_last=True)
    assert device.events == [("to", "cpu", torch.float16, True), ("to", "cpu", torch.float32, False)]


def test_torch_has_what_the_stream_of_a_device_uses() -> None:
    for name in ("ExternalStream", "MemPool", "stream", "empty_cache"):
        assert hasattr(torch.cuda, name), name
    torch_has_cuda = hasattr(torch._C, "_cuda_clearCublasWorkspaces")
    assert missing_name() == (None if torch_has_cuda else "_cuda_clearCublasWorkspaces")
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


class Recorded:
    """torch.cuda as far as `CudaStream` uses it, on the host."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.events.append(name)
            return Pool() if name == "MemPool" else nullcontext()

        return call


class Pool:
    """A pool of torch's memory."""

    id = (7, 0)


@pytest.fixture
def cuda_stream(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaStream, Recorded]:
    """A stream of a device on a machine that has none, and the calls on torch.cuda."""
    recorded = Recorded()
    monkeypatch.setattr(torch, "cuda", recorded)
    for name in NEEDED:
        monkeypatch.setattr(torch._C, name, getattr(recorded, name.removeprefix("_cuda_")), raising=False)
    return CudaStream(SimpleNamespace(stream=7)), recorded  # type: ignore[arg-type]


def test_only_work_whose_tensors_end_with_it_takes_memory_of_the_pool(cuda_stream: tuple[CudaStream, Recorded]) -> None:
    stream, recorded = cuda_stream
    stream.prepare(lambda: recorded.events.append("weights"))
    for _ in range(2):
        stream.submit(lambda: recorded.events.append("run"))
    stream.release()
    run = ("stream", "beginAllocateCurrentThreadToPool", "run", "endAllocateToPool", "releasePool")
    assert recorded.events == [
        *("ExternalStream", "stream", "weights"),
        *("MemPool", *run, *run),
        *("clearCublasWorkspaces", "empty_cache"),
    ]


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), DeviceOutOfMemory, "out of memory"),
        (RuntimeError("no kernel\nimage"), BackendError, "backend: torch failed: no kernel"),
        (BackendError("refit", "unknown"), BackendError, "refit: unknown"),
    ],
)
def test_errors_of_torch_are_those_of_a_backend(
    cuda_stream: tuple[CudaStream, Recorded], error: Exception, kind: type[BackendError], text: str
) -> None:
    def work() -> None:
        raise error

    with pytest.raises(kind, match=text) as caught:
        cuda_stream[0].submit(work)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
