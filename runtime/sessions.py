"""The seam between the loop and what runs the graphs: a backend opens one session per graph."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .engines import find_engine
from .errors import BackendError, first_line

Array = NDArray[Any]

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "openvino", "onnxruntime")


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""


class Backend(Protocol):
    """Opens the graphs of a bundle."""

    name: str

    def session(self, graph: str) -> Session:
        """The session of a graph, opened at its first use."""


def open_backend(bundle: Bundle, name: str = "auto") -> Backend:
    """The backend of that name for `bundle`.

    Raises:
        BackendError: the name is unknown, or the backend is not in this release.
    """
    if name in ("auto", "onnxruntime"):
        return OnnxRuntimeBackend(bundle)
    if name in BACKENDS:
        raise BackendError(f"backend: {name!r} is not available in this release; allowed are auto, onnxruntime")
    raise BackendError(f"backend: {name!r} is unknown; allowed are auto, onnxruntime")


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU provider on the portable graphs, or on the engines that were built of them."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._sessions: dict[str, OnnxRuntimeSession] = {}

    def session(self, graph: str) -> "OnnxRuntimeSession":
        """The session of a graph; sessions stay open, so that the next request starts at once."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        return self._sessions[graph]

    def _open(self, graph: str) -> "OnnxRuntimeSession":
        import onnxruntime

        bundle, path = self._bundle, self._bundle.folder / self._bundle.graph(graph).path
        engine = find_engine(bundle.folder, bundle.manifest, graph, self.name, onnxruntime.__version__)
        return OnnxRuntimeSession(engine.path if engine else path, weights=path.parent)


class OnnxRuntimeSession:
    """One ONNX graph on the CPU, with its external weights in another folder."""

    def __init__(self, path: Path, weights: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if _shared_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own that share no public base
            raise BackendError(f"backend: ONNX Runtime cannot open {path.name}: {first_line(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""
        try:
            return [np.asarray(output) for output in self._session.run(None, dict(feeds))]
        except Exception as error:
            raise BackendError(f"backend: ONNX Runtime failed: {first_line(error)}") from error


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
