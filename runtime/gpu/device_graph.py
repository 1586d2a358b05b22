"""One engine on the device with buffers of its own, to compare its results with those of other backends."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from ..cpu.sessions import Array
from ..errors import BackendError
from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize, static_shapes
from .buffers import Block, Inputs, aligned, from_type, to_type
from .cuda import Cuda
from .engine_interface import Loader


class DeviceGraph:
    """Opens a graph's engine as a request does, and runs it on arrays in the host's memory.

    Raises:
        BackendError: the engine is missing, must not be loaded here, or does not fit into the device's memory.
    """

    def __init__(self, bundle: Bundle, loader: Loader, cuda: Cuda, graph: str, size: ClipSize) -> None:
        record = bundle.graph(graph)
        bundle = bundle.with_keyframe_slots(loader.keyframe_slots(bundle, size, 0))
        shapes = static_shapes(bundle.manifest, graph, size)
        self._cuda = cuda
        self._activation = 0
        self._buffers: Inputs | None = None
        self._outputs = [item.name for item in record.outputs]
        self._engine = loader.open(bundle, graph, size, shapes, cuda)
        try:
            self._dtypes = self._engine.dtypes
            block = Block()
            for name, shape in shapes.items():
                block.add(name, shape, self._dtypes[name])
            self._buffers = Inputs(cuda, block)
            nbytes = aligned(max(self._engine.activation_bytes, 1))
            self._activation = cuda.allocate(nbytes)
            self._engine.use_activation(self._activation, nbytes)
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the engine; returns its outputs in order, bfloat16 as float32."""
        buffers = self._buffers
        assert buffers is not None
        block = buffers.block
        for name, values in feeds.items():
            buffers.array(name)[:] = to_type(values, self._dtypes[name])
        try:
            self._cuda.copy_in(block.address, buffers.host, block.nbytes)
            self._engine.enqueue({name: block.at(name) for name in block.tensors})
            self._cuda.copy_out(buffers.host, block.address, block.nbytes)
        finally:
            self._cuda.synchronize()
        return [from_type(buffers.array(name), self._dtypes[name]) for name in self._outputs]

    def close(self) -> None:
        """Frees the engine and its buffers, even if the device no longer answers."""
        steps = [self._cuda.synchronize, self._engine.close]
        if self._buffers is not None:
            steps.append(self._buffers.close)
        if self._activation:
            steps.append(partial(self._cuda.free, self._activation))
        for step in steps:
            with suppress(BackendError):
                step()
        self._buffers, self._activation = None, 0
