"""ONNX Runtime's CPU provider, on the portable graphs or on engines."""

from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np

from ..backend_interface import any_machine, every_precision, no_notes, unbound_scope
from ..backends import BACKENDS
from ..errors import BackendError, first_line
from ..format.bundle import Bundle
from ..format.engine_sets import find_set, set_name
from ..format.weights import check_files
from ..load_options import LoadOptions
from .executor import HostExecutor
from .graph_runs import RUNS
from .sessions import Array

check_machine = any_machine
engine_scope = unbound_scope
computes_in = every_precision
notes = no_notes


def find_version(name: str) -> str:
    """The version of onnxruntime.

    Raises:
        BackendError: it is missing, or its installation is broken.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "backend", f"onnxruntime cannot be loaded ({first_line(error)})", f"run: {BACKENDS[name].install}"
        ) from None
    if not hasattr(onnxruntime, "get_available_providers"):  # such as after one of its two packages was uninstalled
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
    """Opens a bundle on this backend."""
    find_version(name)
    if options.precision not in (None, *BACKENDS[name].precisions):
        others = [other for other, record in BACKENDS.items() if options.precision in record.precisions]
        remedy = f"{options.precision!r} is for {', '.join(others)}" if others else "leave it out"
        raise BackendError("precision", f"{name} computes in fp32 on the CPU", remedy)
    return HostExecutor(bundle, OnnxRuntimeSessions(bundle, options.threads), options.kept_bytes)


class OnnxRuntimeSessions:
    """ONNX Runtime's CPU provider on the portable graphs, or on the engines built from them."""

    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = threads
        self._sessions: dict[str, OnnxRuntimeSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph for any size. It stays open for later requests."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)

    def session(self, graph: str) -> "OnnxRuntimeSession":
        """The session of an open graph."""
        return self._sessions[graph]

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()

    def _open(self, graph: str) -> "OnnxRuntimeSession":
        import onnxruntime

        bundle, record = self._bundle, self._bundle.graph(graph)
        path = bundle.folder / record.path
        check_files(bundle, record.weights, "bundle")
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
        options.enable_mem_reuse = False  # planning takes 4 s for a deep UNet, saves nothing at symbolic sizes
        if _shared_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise BackendError("backend", f"ONNX Runtime cannot open {path.name}: {first_line(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph; returns its outputs in order."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        with RUNS.cancellable(partial(setattr, options, "terminate", True)):
            try:
                return [np.asarray(output) for output in self._session.run(None, dict(feeds), options)]
            except Exception as error:
                raise BackendError("backend", f"ONNX Runtime failed: {first_line(error)}") from error


@cache
def _shared_arena() -> bool:
    """Shares one arena for activations among all sessions, which never run at once: saves 3 of 13 GB at full size."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    same_as_requested = 1
    try:
        onnxruntime.create_and_register_allocator(
            memory, onnxruntime.OrtArenaCfg({"arena_extend_strategy": same_as_requested})
        )
    except RuntimeError:  # the host program has registered its own
        return False
    return True
