"""One engine on an emulated device: conversions of its inputs and outputs, and memory that is given back."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda.bindings import runtime as cudart
from fakes.cuda_emulation import EmulatedCudart, Work
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.device_graph import DeviceGraph

SIZE = ClipSize(width=32, height=32, frames=2)
LOW = {"negative": "bfloat16", "noise": "float16", "next_latents": "float16", "images": "bfloat16"}


class Copies:
    """An engine that copies `noise` to `next_latents`, and `negative` to `images`, in their own types."""

    activation_bytes = 100

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], submit: Callable[[Work], None]) -> None:
        self.submit = submit
        self.dtypes = {name: LOW.get(name, "float32") for name in shapes}
        self.shapes = shapes
        self.closed = False
        self.fails = False

    def use_activation(self, address: int, nbytes: int) -> None:
        assert address
        assert nbytes == 256

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        if self.fails:
            raise BackendError("backend", "failed")

        def copy() -> None:
            for source, target in (("noise", "next_latents"), ("negative", "images")):
                values = host_array(addresses[source], self.shapes[source], "uint16")
                host_array(addresses[target], self.shapes[target], "uint16")[:] = values.reshape(self.shapes[target])

        self.submit(copy)

    def close(self) -> None:
        self.closed = True


class Loader:
    def __init__(self, api: EmulatedCudart) -> None:
        self.api = api
        self.engine: Any = None

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        assert (size, keyframes) == (SIZE, 0)
        return 3

    def open(self, bundle: Bundle, graph: str, size: ClipSize, shapes: Any, cuda: Cuda) -> Copies:
        self.engine = Copies(shapes, lambda work: self.api.submit(work, cuda.stream))
        return self.engine


def test_values_are_rounded_to_the_types_of_the_engine() -> None:
    api, bundle = EmulatedCudart(), Bundle.load()
    loader = Loader(api)
    cuda: Any = Cuda(api)
    graph = DeviceGraph(bundle, loader, cuda, "lcm_update", SIZE)  # type: ignore[arg-type]
    shapes, generator = static_shapes(bundle.manifest, "lcm_update", SIZE), np.random.default_rng(0)
    names = [item.name for item in bundle.graph("lcm_update").inputs]
    feeds = {name: generator.standard_normal(shapes[name]).astype(np.float32) for name in names}
    next_latents, images = graph.run(feeds)
    assert next_latents.dtype == np.float16
    np.testing.assert_array_equal(next_latents, feeds["noise"].astype(np.float16))
    assert images.dtype == np.float32
    rounded = feeds["negative"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(images, rounded.reshape(shapes["images"]))
    loader.engine.fails = True
    with pytest.raises(BackendError):
        graph.run(feeds)
    graph.close()
    assert loader.engine.closed
    assert api.leaked == []


def test_everything_is_freed_even_if_the_device_does_not_answer() -> None:
    api, bundle = EmulatedCudart(), Bundle.load()
    loader = Loader(api)
    cuda: Any = Cuda(api)
    graph = DeviceGraph(bundle, loader, cuda, "lcm_update", SIZE)  # type: ignore[arg-type]
    api.fault = (len(api.calls), cudart.cudaError_t.cudaErrorLaunchFailure)
    graph.close()
    assert api.calls[api.fault[0]] == "cudaStreamSynchronize"
    assert loader.engine.closed
    assert api.leaked == []


def test_an_engine_that_does_not_fit_leaves_nothing() -> None:
    api = EmulatedCudart(limit=1000)
    loader = Loader(api)
    cuda: Any = Cuda(api)
    with pytest.raises(BackendError):
        DeviceGraph(Bundle.load(), loader, cuda, "lcm_update", SIZE)  # type: ignore[arg-type]
    assert loader.engine.closed
    assert api.leaked == []
