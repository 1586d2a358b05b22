"""The seam between the loop on the host and what runs the graphs: one session per graph."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, first_line
from ..format.bundle import Bundle
from ..format.engine_sets import find_set, set_name

Array = NDArray[Any]


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""


class Sessions(Protocol):
    """Opens the graphs of a bundle."""

    backend: str
    precision: str

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Makes a graph ready for inputs of these sizes, by the names of the manifest's symbolic dimensions."""

    def session(self, graph: str) -> Session:
        """The session of a graph that was opened."""

    def close(self) -> None:
        """Frees all sessions."""


class OnnxRuntimeSessions:
    """ONNX Runtime's CPU provider on the portable graphs, or on the engines that were built of them."""

    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = threads
        self._sessions: dict[str, OnnxRuntimeSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph, which takes any size; it stays open, so that the next request starts at once."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)

    def session(self, graph: str) -> "OnnxRuntimeSession":
        """The session of a graph that was opened."""
        return self._sessions[graph]

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()

    def _open(self, graph: str) -> "OnnxRuntimeSession":
        import onnxruntime

        bundle, path = self._bundle, self._bundle.folder / self._bundle.graph(graph).path
        engines = find_set(bundle.folder, self.backend, set_name("fp32"))
        built = engines is not None and graph in engines.index.engines
        engine = engines.open(bundle.manifest, graph, onnxruntime.__version__) if engines and built else path
        return OnnxRuntimeSession(engine, weights=path.parent, threads=self._threads)


class OnnxRuntimeSession:
    """One ONNX graph on the CPU, with its external weights in another folder."""

    def __init__(self, path: Path, weights: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        options.enable_mem_reuse = False  # 4 s to plan for a deep UNet; sizes are symbols, so it saves nothing
        if _shared_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own that share no public base
            raise BackendError("backend", f"ONNX Runtime cannot open {path.name}: {first_line(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""
        try:
            return [np.asarray(output) for output in self._session.run(None, dict(feeds))]
        except Exception as error:
            raise BackendError("backend", f"ONNX Runtime failed: {first_line(error)}") from error


@cache
def _shared_arena() -> bool:
    """One arena for the activations of all sessions, which never run at once: 3 of 13 GB less at full size."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    same_as_requested = 1
    try:
        onnxruntime.create_and_register_allocator(
            memory, onnxruntime.OrtArenaCfg({"arena_extend_strategy": same_as_requested})
        )
    except RuntimeError:  # the embedding program has registered one of its own
        return False
    return True
