"""Emulated engines on emulated CUDA."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from lasting_bundles import DEMO, EXPORTED, opened_once
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.manifest import Manifest
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor

from .cuda_emulation import EmulatedCudart


@dataclass(frozen=True)
class EngineRun:
    """A run of an engine that a stream, or a graph, holds."""

    engine: "EmulatedEngine"
    addresses: dict[str, int]

    def __call__(self) -> None:
        engine, loader = self.engine, self.engine.loader
        loader.cudart.check_range(*engine.activation)
        feeds = {name: engine.array(name, self.addresses) for name in engine.inputs}
        for name, values in zip(engine.outputs, loader.compute(engine.graph, feeds), strict=True):
            engine.array(name, self.addresses)[:] = values


class EmulatedEngine:
    """An engine that computes on the host, with the given shapes and the types of the graph's record."""

    def __init__(
        self, loader: "EmulatedLoader", graph: str, shapes: Mapping[str, tuple[int, ...]], stream: int
    ) -> None:
        self.loader = loader
        self.stream = stream
        self.graph = graph
        self.shapes = shapes
        record = loader.manifest.graphs[graph]
        self.dtypes = {item.name: item.dtype for item in (*record.inputs, *record.outputs)}
        self.inputs = [item.name for item in record.inputs]
        self.outputs = [item.name for item in record.outputs]
        self.activation_bytes = loader.activation_bytes.get(graph, 1000)
        self.activation = (0, 0)
        self.capturable = loader.capturable

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
        self.loader.cudart.submit(EngineRun(self, dict(addresses)), self.stream)

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
        self.capturable = True
        self.activation_bytes = {"unet": 2000, "vae_decoder": 3000, "controlnet_scribble": 5000, "vae_encoder": 7000}

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        return max(bundle.manifest.keyframe_slots, keyframes)

    def open(self, bundle: Bundle, graph: str, size: ClipSize, shapes: Any, cuda: Cuda) -> EmulatedEngine:
        return EmulatedEngine(self, graph, shapes, cuda.stream)

    def check_refit(self, bundle: Bundle) -> None:
        pass

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        return self.tables.get(graph, WeightTable({}))


def _open_session(
    path: Path, level: onnxruntime.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
) -> onnxruntime.InferenceSession:
    """Opens a CPU session fast, without memory reuse: planning it takes most of the time for large graphs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.enable_mem_reuse = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


open_session = opened_once(_open_session, DEMO, EXPORTED)


class PortableGraphs:
    """Computes with ONNX Runtime's CPU provider on a bundle's portable graphs; a run is not computed twice."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.known: dict[bytes, list[np.ndarray]] = {}

    def __call__(self, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        key = digest(graph, feeds)
        if key not in self.known:
            if graph not in self.sessions:
                self.sessions[graph] = open_session(self.bundle.folder / self.bundle.graph(graph).path)
            self.known[key] = list(self.sessions[graph].run(None, feeds))
        return self.known[key]


def digest(graph: str, feeds: dict[str, np.ndarray]) -> bytes:
    """A hash of a graph's name and all its inputs."""
    found = blake2b(graph.encode())
    for name in sorted(feeds):
        found.update(name.encode())
        found.update(np.ascontiguousarray(feeds[name]).data)
    return found.digest()


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
            seed = zlib.crc32(np.ascontiguousarray(feeds[name]).data, seed)
        outputs = []
        for item in self.manifest.graphs[graph].outputs:
            seed = zlib.crc32(item.name.encode(), seed)
            outputs.append(np.full(self.shapes(graph)[item.name], seed % 251, item.dtype))
        return outputs


def emulate(
    bundle: Bundle, compute: Any, kept_bytes: int = 1 << 30, limit: int = 1 << 34, cuda_graphs: bool = True
) -> SimpleNamespace:
    """Creates an executor on an emulated device; returns `executor`, `cudart` and `loader`."""
    api = EmulatedCudart(limit)
    loader = EmulatedLoader(bundle, api, compute)
    executor = GpuExecutor(bundle, loader, kept_bytes, Cuda(api), cuda_graphs)
    return SimpleNamespace(cudart=api, loader=loader, executor=executor)
