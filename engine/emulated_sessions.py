"""Runs the typed graphs of a GPU backend on the CPU, with every result rounded to its type.

Products accumulate in fp32. Each operator rounds its result, also where an engine fuses several operators and rounds
only once.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import numpy as np
import onnx_ir as ir
import onnxruntime

from ..runtime.backends import find_backend
from ..runtime.cpu.sessions import Array
from ..runtime.errors import BackendError
from ..runtime.format.bundle import Bundle
from .check import onnxruntime_errors, round_results
from .rewrites.typed_graph import write_typed


class Emulation(Protocol):
    """The interface of a module of `engine` that emulates a backend's engines."""

    def emulated_graphs(self, bundle: Bundle, precision: str) -> Callable[[str], ir.Model]:
        """Returns a function that makes the typed graph of an engine, given its name.

        Its operators are those that ONNX Runtime's CPU provider has.
        """


class EmulatedSessions:
    """The graphs of a bundle as a GPU backend's engines compute them. Follows `Sessions`.

    Args:
        bundle: the bundle.
        backend: a GPU backend.
        precision: of its engines.
        threads: threads on the CPU; None takes one per core.

    Raises:
        BackendError: the backend is unknown or not emulated, or does not have the precision.
    """

    def __init__(self, bundle: Bundle, backend: str, precision: str, threads: int | None = None) -> None:
        record = find_backend(backend)
        if record.emulation is None:
            raise BackendError("backend", f"{backend} is not emulated", "load its engines instead")
        if precision not in record.precisions:
            allowed = ", ".join(record.precisions)
            raise BackendError("precision", f"{precision!r} is unknown to {backend}", f"allowed are {allowed}")
        self.backend = backend
        self.precision = precision
        module = cast(Emulation, import_module(f".{record.emulation}", __package__))
        self._make = module.emulated_graphs(bundle, precision)
        self._threads = threads
        self._folder = TemporaryDirectory()
        self._sessions: dict[str, EmulatedSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph for any size. It stays open for later requests."""
        if graph not in self._sessions:
            path = Path(self._folder.name) / f"{graph}.onnx"
            self._sessions[graph] = EmulatedSession(self._make(graph), path, self._threads)

    def session(self, graph: str) -> "EmulatedSession":
        """The session of an open graph."""
        return self._sessions[graph]

    def close(self) -> None:
        """Frees all sessions and deletes their files."""
        self._sessions.clear()
        self._folder.cleanup()


class EmulatedSession:
    """One typed graph, computed in fp32 with rounded results.

    Args:
        model: the typed graph; it is changed in place.
        path: a new file for it; its weights are written beside it.
        threads: threads on the CPU; None takes one per core.

    Raises:
        BackendError: ONNX Runtime cannot open the graph.
    """

    def __init__(self, model: ir.Model, path: Path, threads: int | None = None) -> None:
        self._types = {
            str(value.name): value.dtype.numpy()
            for value in model.graph.inputs
            if value.dtype is not None and value.dtype.is_floating_point()
        }
        round_results(model)
        write_typed(model, path)
        options = onnxruntime.SessionOptions()
        # These optimisations fold constants and keep every rounding; the higher levels order sums differently.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        options.enable_mem_reuse = False  # planning it for thousands of casts takes longer than a run
        with onnxruntime_errors(path.name):
            self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Rounds the inputs to their types and runs the graph; returns its outputs in order, fp32 or uint8."""
        rounded = {
            name: array.astype(self._types[name]).astype(np.float32) if name in self._types else array
            for name, array in feeds.items()
        }
        with onnxruntime_errors("an emulated graph"):
            return [np.asarray(output) for output in self._session.run(None, rounded)]
