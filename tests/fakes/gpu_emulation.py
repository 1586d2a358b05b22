"""An emulated GPU: CUDA calls on host memory, recorded, with graphs that replay and faults on demand."""

import ctypes
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cudart
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.manifest import Manifest
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor

SUCCESS = cudart.cudaError_t.cudaSuccess
INVALID_CAPTURE = cudart.cudaError_t.cudaErrorStreamCaptureInvalidated


class EmulatedCudart:
    """Replaces `cuda.bindings.runtime`; a call that the real module lacks raises AttributeError.

    Attributes:
        calls: the names of all calls, in order.
        fault: index of the call that fails, and the status it returns.
        limit: bytes of device memory.
    """

    def __init__(self, limit: int = 1 << 34) -> None:
        self.calls: list[str] = []
        self.fault: tuple[int, Any] | None = None
        self.limit = limit
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, int] = {}
        self.streams: set[int] = set()
        self.capture: list[Callable[[], None]] | None = None
        self.broken_capture = False
        self._handles = 0
        self._clock = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(cudart, name)
        if not name.startswith("cuda") or not callable(real) or isinstance(real, type):
            return real
        emulated = getattr(type(self), f"_{name}")

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if self.fault is not None and len(self.calls) - 1 == self.fault[0]:
                self.broken_capture = self.capture is not None
                if name == "cudaStreamEndCapture":
                    self.capture = None
                return (self.fault[1], *[None] * 3)
            result = emulated(self, *args)
            return result if isinstance(result, tuple) else (SUCCESS, result)

        return call

    def submit(self, work: Callable[[], None]) -> None:
        """Runs work now, or records it if a graph is being captured."""
        if self.capture is None:
            work()
        else:
            self.capture.append(work)

    @property
    def used(self) -> int:
        """Bytes of allocated device memory."""
        return sum(ctypes.sizeof(buffer) for buffer in self.memory.values())

    @property
    def leaked(self) -> list[Any]:
        """Everything allocated or created and not released yet, except for streams."""
        return [*self.memory, *self.pinned, *self.graphs, *self.events]

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _cudaSetDevice(self, device: int) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaGetLastError(self) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == cudart.cudaStreamNonBlocking
        handle = self._handle()
        self.streams.add(handle)
        return handle

    def _cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        self.streams.remove(stream)
        return (SUCCESS,)

    def _cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return SUCCESS, self.limit - self.used, self.limit

    def _take(self, pool: dict[int, Any], nbytes: int) -> int:
        assert self.capture is None, "memory cannot be allocated during a capture"
        buffer = (ctypes.c_byte * (nbytes + 256))()
        ctypes.memset(buffer, 0xA5, nbytes)  # a device does not clear memory
        address = -(-ctypes.addressof(buffer) // 256) * 256
        pool[address] = buffer
        return address

    def _cudaMalloc(self, nbytes: int) -> tuple[Any, int | None]:
        assert nbytes > 0
        if self.used + nbytes > self.limit:
            return cudart.cudaError_t.cudaErrorMemoryAllocation, None
        return SUCCESS, self._take(self.memory, nbytes)

    def _cudaFree(self, address: int) -> tuple[Any]:
        del self.memory[address]
        return (SUCCESS,)

    def _cudaHostAlloc(self, nbytes: int, flags: int) -> int:
        return self._take(self.pinned, nbytes)

    def _cudaFreeHost(self, address: int) -> tuple[Any]:
        del self.pinned[address]
        return (SUCCESS,)

    def check_range(self, address: int, nbytes: int) -> None:
        """Fails if the range is not inside allocated memory."""
        pools = (*self.memory.items(), *self.pinned.items())
        inside = any(start <= address and address + nbytes <= start + ctypes.sizeof(buffer) for start, buffer in pools)
        assert inside, "memory was never allocated, or was freed"

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any]:
        on_device = {"Host": False, "Device": True}
        source_kind, target_kind = kind.name.removeprefix("cudaMemcpy").split("To")
        for address, side in ((source, source_kind), (target, target_kind)):
            pool = self.memory if on_device[side] else self.pinned
            assert any(start <= address < start + ctypes.sizeof(buffer) for start, buffer in pool.items()), kind.name

        def work() -> None:
            self.check_range(source, nbytes)
            self.check_range(target, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.submit(work)
        return (SUCCESS,)

    def _cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any]:
        self.check_range(address, nbytes)
        self.submit(lambda: ctypes.memset(address, value, nbytes) and None)
        return (SUCCESS,)

    def _cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert self.capture is None, "a stream cannot be synchronized during its capture"
        return (SUCCESS,)

    def _cudaEventCreateWithFlags(self, flags: int) -> int:
        handle = self._handle()
        self.events[handle] = -1
        return handle

    def _cudaEventDestroy(self, event: int) -> tuple[Any]:
        del self.events[event]
        return (SUCCESS,)

    def _cudaEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[Any]:
        external = flags == cudart.cudaEventRecordExternal
        assert external == (self.capture is not None), (
            "only an external event in a capture can be waited for after a replay"
        )

        def work() -> None:
            self._clock += 1
            self.events[event] = self._clock

        self.submit(work)
        return (SUCCESS,)

    def _cudaEventSynchronize(self, event: int) -> tuple[Any]:
        assert self.events[event] > 0
        return (SUCCESS,)

    def _cudaEventElapsedTime(self, start: int, end: int) -> float:
        assert 0 < self.events[start] < self.events[end]
        return float(self.events[end] - self.events[start])

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        assert self.capture is None
        self.capture, self.broken_capture = [], False
        return (SUCCESS,)

    def _cudaStreamEndCapture(self, stream: int) -> tuple[Any, Any]:
        assert self.capture is not None
        recorded, self.capture = self.capture, None
        if self.broken_capture:
            return INVALID_CAPTURE, None
        handle = self._handle()
        self.graphs[handle] = recorded
        return SUCCESS, handle

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        handle = self._handle()
        self.graphs[handle] = self.graphs[graph]
        return handle

    def _cudaGraphUpload(self, graph: int, stream: int) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:
        for work in self.graphs[graph]:
            work()
        return (SUCCESS,)

    def _cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (SUCCESS,)

    _cudaGraphExecDestroy = _cudaGraphDestroy


class EmulatedEngine:
    """An engine that computes on the host, with the given shapes and the types of the graph's record."""

    def __init__(self, loader: "EmulatedLoader", graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.loader = loader
        self.graph = graph
        self.shapes = shapes
        record = loader.manifest.graphs[graph]
        self.dtypes = {item.name: item.dtype for item in (*record.inputs, *record.outputs)}
        self.inputs = [item.name for item in record.inputs]
        self.outputs = [item.name for item in record.outputs]
        self.activation_bytes = loader.activation_bytes.get(graph, 1000)
        self.activation = (0, 0)
        self.capturable = True

    def use_activation(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.activation_bytes
        self.activation = (address, nbytes)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        assert set(addresses) == {*self.inputs, *self.outputs}
        assert all(address % 256 == 0 for address in addresses.values())
        self.loader.enqueued.append(self.graph)
        if self.loader.failures and self.loader.failures[0] == len(self.loader.enqueued):
            self.loader.failures.pop(0)
            self.loader.cudart.broken_capture = self.loader.cudart.capture is not None
            raise BackendError("backend", f"{self.graph} cannot run")
        addresses = dict(addresses)

        def work() -> None:
            self.loader.cudart.check_range(*self.activation)
            feeds = {name: self.array(name, addresses).copy() for name in self.inputs}
            for name, values in zip(self.outputs, self.loader.compute(self.graph, feeds), strict=True):
                self.array(name, addresses)[:] = values

        self.loader.cudart.submit(work)

    def array(self, name: str, addresses: Mapping[str, int]) -> np.ndarray:
        array = host_array(addresses[name], self.shapes[name], self.dtypes[name])
        self.loader.cudart.check_range(addresses[name], array.nbytes)
        return array

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self.loader.refitted.append((self.graph, {name: read(name) for name in names}))

    def close(self) -> None:
        self.loader.closed.append(self.graph)


class EmulatedLoader:
    """Engines of a bundle that compute with `compute(graph, feeds)`."""

    backend = "tensorrt"
    precision = None

    def __init__(self, bundle: Bundle, cudart_: EmulatedCudart, compute: Any) -> None:
        self.manifest: Manifest = bundle.manifest
        self.cudart = cudart_
        self.compute = compute
        self.enqueued: list[str] = []
        self.failures: list[int] = []
        self.closed: list[str] = []
        self.refitted: list[tuple[str, dict[str, Any]]] = []
        self.tables: dict[str, WeightTable] = {}
        self.activation_bytes = {"unet": 2000, "vae_decoder": 3000, "controlnet_scribble": 5000, "vae_encoder": 7000}

    def check(self, bundle: Bundle, size: ClipSize) -> None:
        pass

    def open(self, bundle: Bundle, graph: str, size: ClipSize, shapes: Any, cuda: Cuda) -> EmulatedEngine:
        return EmulatedEngine(self, graph, shapes)

    def check_refit(self, bundle: Bundle) -> None:
        pass

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        return self.tables.get(graph, WeightTable({}))


def open_session(
    path: Path, level: onnxruntime.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
) -> onnxruntime.InferenceSession:
    """Opens a CPU session fast, without memory reuse: planning it takes most of the time for large graphs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.enable_mem_reuse = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class PortableGraphs:
    """Computes with ONNX Runtime's CPU provider on a bundle's portable graphs."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def __call__(self, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if graph not in self.sessions:
            path = self.bundle.folder / self.bundle.graph(graph).path
            self.sessions[graph] = open_session(path)
        return list(self.sessions[graph].run(None, feeds))


class RoundedGraphs:
    """Computes as engines of a low precision do: runs the typed graphs and rounds every result to its type."""

    def __init__(self, bundle: Bundle, precision: str, folder: Path) -> None:
        self.bundle = bundle
        self.precision = precision
        self.folder = folder
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def __call__(self, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if graph not in self.sessions:
            self.sessions[graph] = self.open(graph)
        return list(self.sessions[graph].run(None, feeds))

    def open(self, graph: str) -> onnxruntime.InferenceSession:
        from sparsectrl_lcm.engine.check import round_results
        from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, write_typed

        model = typed_graph(self.bundle, graph, self.precision)
        round_results(model)
        path = self.folder / f"{graph}.onnx"
        write_typed(model, path)
        return open_session(path, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


class Digests:
    """Computes outputs of the right shape instantly; each is filled with a digest of all inputs."""

    def __init__(self, bundle: Bundle, shapes: Callable[[str], Mapping[str, tuple[int, ...]]]) -> None:
        self.manifest = bundle.manifest
        self.shapes = shapes

    def __call__(self, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        seed = zlib.crc32(graph.encode())
        for name in sorted(feeds):
            seed = zlib.crc32(feeds[name].tobytes(), seed)
        outputs = []
        for item in self.manifest.graphs[graph].outputs:
            seed = zlib.crc32(item.name.encode(), seed)
            outputs.append(np.full(self.shapes(graph)[item.name], seed % 251, item.dtype))
        return outputs


def emulate(bundle: Bundle, compute: Any, kept_bytes: int = 1 << 30, limit: int = 1 << 34) -> SimpleNamespace:
    """Creates an executor on an emulated device; returns `executor`, `cudart` and `loader`."""
    api = EmulatedCudart(limit)
    loader = EmulatedLoader(bundle, api, compute)
    return SimpleNamespace(cudart=api, loader=loader, executor=GpuExecutor(bundle, loader, kept_bytes, Cuda(api)))
