"""ONNX Runtime's CPU provider in the host's memory, on the portable graphs or on engines."""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np

from ..backends import BACKENDS, Availability, unbound_scope
from ..errors import BackendError, first_line
from ..format.bundle import Bundle
from ..format.engine_sets import find_set, set_name
from ..load_options import LoadOptions
from .executor import HostExecutor
from .sessions import Array

engine_scope = unbound_scope


def find_version(name: str) -> str:
    """The version of onnxruntime.

    Raises:
        BackendError: it is missing, or its files are not whole.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "backend", f"onnxruntime cannot be loaded ({first_line(error)})", f"run: {BACKENDS[name].install}"
        ) from None
    if not hasattr(onnxruntime, "get_available_providers"):  # as after one of the two packages was removed
        package = "onnxruntime-gpu" if is_installed("onnxruntime-gpu") else "onnxruntime"
        raise BackendError(
            "backend", "onnxruntime is broken", f"run: pip install --force-reinstall --no-deps {package}"
        )
    return str(onnxruntime.__version__)


def is_installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        installed_version(package)
    except PackageNotFoundError:
        return False
    return True


def open_executor(name: str, bundle: Bundle, options: LoadOptions) -> HostExecutor:
    """What runs the requests of a bundle."""
    find_version(name)
    if options.precision not in (None, *BACKENDS[name].precisions):
        raise BackendError("precision", f"{name} computes in fp32 on the CPU", f"{options.precision!r} is for openvino")
    return HostExecutor(bundle, OnnxRuntimeSessions(bundle, options.threads), options.kept_bytes)


def computes_in(precision: str) -> bool:
    """Whether a set of engines may be chosen unasked."""
    return True


def notes(found: Availability) -> Iterable[str]:
    """What `doctor` adds."""
    return ()


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
