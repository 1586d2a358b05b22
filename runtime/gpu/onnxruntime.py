"""ONNX Runtime's CUDA provider: runs the same loop with bindings to fixed device addresses."""

import io
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ..backend_interface import every_precision, no_notes, unbound_scope
from ..backends import BACKENDS
from ..cpu import onnxruntime as onnxruntime_cpu
from ..errors import BackendError, DeviceOutOfMemory, first_line
from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize
from ..format.engine_sets import EngineSet, refusal
from ..format.weights import WeightTable
from ..load_options import LoadOptions
from ..operating_system import CUDNN, loading_error, shared_library_name
from . import device
from .cuda import Cuda
from .executor import GpuExecutor
from .one_thread import OneThread
from .tensorrt_library import is_out_of_memory

_logger = logging.getLogger("sparsectrl_lcm")

BACKEND = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
MAX_GRAPHS = 64
"""CUDA graphs of a session; runs with more sets of addresses do without a graph."""
_NO_GRAPH = -1
_GRAPH = "gpu_graph_id"
"""Option of a run: the number of the CUDA graph that it captures or replays."""
_NO_WAIT = "disable_synchronize_execution_providers"
"""Option of a run: returns once everything is enqueued, also if it replays a CUDA graph."""
_FATAL = 4
_ERROR = 3
_CANNOT_REFIT = ("refit", "ONNX Runtime cannot refit", "load the other bundle instead")
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}


engine_scope = unbound_scope
computes_in = every_precision
notes = no_notes


def find_version(name: str) -> str:
    """The version of onnxruntime-gpu.

    Raises:
        BackendError: it is missing, its installation is broken, or it has no CUDA provider.
    """
    version = onnxruntime_cpu.find_version(name)
    import onnxruntime

    if PROVIDER in onnxruntime.get_available_providers():
        return version
    if not onnxruntime_cpu.is_installed("onnxruntime-gpu"):
        raise BackendError("backend", "onnxruntime-gpu is not installed", f"run: {BACKENDS[name].install}")
    raise BackendError(
        "backend",
        "onnxruntime has overwritten onnxruntime-gpu",
        "run: pip uninstall --yes onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu",
    )


def check_machine(name: str) -> None:
    """Checks that there is a GPU and that ONNX Runtime can load its CUDA provider and cuDNN.

    `get_available_providers` does not tell: it lists what the package was built with. A session without the provider
    computes on the CPU instead.

    Raises:
        BackendError: with the sentence of the system's loader about what is missing.
    """
    device.probe()
    import onnxruntime

    _load_cuda_packages()
    provider = Path(onnxruntime.__file__).parent / "capi" / shared_library_name("onnxruntime_providers_cuda")
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, DEVICE, 0)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        # The provider crashes if it is loaded before ONNX Runtime has prepared for it, which the attempt above does.
        reason = loading_error(provider) or first_line(error)
    else:
        reason = loading_error(CUDNN) or ""  # ONNX Runtime loads it when the first convolution runs
    if reason:
        raise BackendError(
            "backend", f"ONNX Runtime's CUDA provider cannot be loaded: {reason}", f"run: {BACKENDS[name].install}"
        )


def _load_cuda_packages() -> None:
    """Loads CUDA and cuDNN from the packages that onnxruntime-gpu's extras install: only this finds them."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)  # failures are raised; cuDNN's trials would flood the log
    printed = io.StringIO()
    with redirect_stdout(printed):
        onnxruntime.preload_dlls()
    _logger.debug("preload_dlls: %s", printed.getvalue())


def open_executor(name: str, bundle: Bundle, options: LoadOptions) -> GpuExecutor:
    """Opens a bundle on this backend."""
    find_version(name)
    check_machine(name)
    loader = OnnxRuntimeCudaLoader(options.precision, options.cuda_graphs)
    return GpuExecutor(bundle, loader, options.kept_bytes, cuda_graphs=options.cuda_graphs)


class OnnxRuntimeCudaLoader:
    """Opens the typed graphs that `build` made, and sets their shapes.

    Sessions are opened and run on one thread: ONNX Runtime keeps CUDA graphs, cuBLAS and cuDNN for each thread that
    runs a session, while any thread may call the pipeline.
    """

    backend = BACKEND

    def __init__(self, precision: str | None = None, cuda_graphs: bool = True) -> None:
        self.precision = precision
        self._cuda_graphs = cuda_graphs
        self._thread = OneThread(BACKEND)

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        """As many keyframes as wanted: the engines take any shape when they are opened."""
        self._set(bundle)
        return max(bundle.manifest.keyframe_slots, keyframes)

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> "OnnxRuntimeCudaEngine":
        """Opens the engine of a graph, after checking its key."""
        import onnxruntime

        engines = self._set(bundle)
        path = engines.open(bundle.manifest, graph, onnxruntime.__version__)
        record = bundle.graph(graph)
        dimensions = {
            dimension: length
            for item in (*record.inputs, *record.outputs)
            for dimension, length in zip(item.shape, shapes[item.name], strict=True)
            if isinstance(dimension, str)
        }
        return OnnxRuntimeCudaEngine(path, dimensions, shapes, cuda, self._thread, self._cuda_graphs)

    def check_refit(self, bundle: Bundle) -> None:
        """Raises BackendError: ONNX Runtime cannot refit."""
        raise BackendError(*_CANNOT_REFIT)

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """Raises BackendError: ONNX Runtime cannot refit."""
        raise BackendError(*_CANNOT_REFIT)

    def _set(self, bundle: Bundle) -> EngineSet:
        if found := BACKENDS[self.backend].engine_set(bundle.folder, self.precision):
            return found
        raise refusal(bundle.folder, self.backend, None, None, "engines were not built")


class OnnxRuntimeCudaEngine:
    """One session on the loop's stream, with a binding for each set of addresses.

    Its runs cannot be captured into the loop's CUDA graph: ONNX Runtime frees host memory within a run, which aborts or
    corrupts a capture from outside (microsoft/onnxruntime#32081). Instead, ONNX Runtime captures a graph of its own for
    each set of addresses. If a model has nodes that it leaves to the CPU, it runs without a CUDA graph.
    """

    activation_bytes = 0  # ONNX Runtime allocates its own
    capturable = False

    def __init__(
        self,
        path: Path,
        dimensions: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cuda: Cuda,
        thread: OneThread,
        cuda_graphs: bool = True,
    ) -> None:
        self._thread = thread
        self._shapes = shapes
        self._bindings: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._graphs = cuda_graphs
        try:
            self._session = self._open(path, dimensions, cuda)
        except BackendError as error:
            if not cuda_graphs:
                raise
            _logger.info("%s runs without a CUDA graph: %s", path.name, error)
            self._graphs = False
            self._session = self._open(path, dimensions, cuda)
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]
        tensors = (*self._session.get_inputs(), *self._session.get_outputs())
        self.dtypes = {item.name: _TYPES[item.type] for item in tensors}

    def _open(self, path: Path, dimensions: Mapping[str, int], cuda: Cuda) -> Any:
        return self._thread.call(_open_session, path, dimensions, provider_options(cuda, graphs=self._graphs))

    def use_activation(self, address: int, nbytes: int) -> None:
        """Does nothing: ONNX Runtime allocates its own activation memory."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueues a run on the stream.

        The first run with a set of addresses is waited for: a session with CUDA graphs warms up and captures in it, and
        frees page-locked memory at its end that copies on the stream may still read.
        """
        key = tuple(addresses[name] for name in (*self._inputs, *self._outputs))
        if first := key not in self._bindings:
            self._bindings[key] = self._bind(addresses), self._run_options(len(self._bindings) + 1)
        binding, options = self._bindings[key]
        try:
            self._thread.call(self._session.run_with_iobinding, binding, options)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise _failure("failed", error) from error
        if first and (not self._graphs or options.get_run_config_entry(_GRAPH) != str(_NO_GRAPH)):
            options.add_run_config_entry(_NO_WAIT, "1")

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Raises BackendError: ONNX Runtime cannot refit."""
        raise BackendError(*_CANNOT_REFIT)

    def close(self) -> None:
        """Frees the session."""
        self._bindings.clear()
        self._session = None

    def _bind(self, addresses: Mapping[str, int]) -> Any:
        binding = self._session.io_binding()
        for names, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name in names:
                bind(name, DEVICE, 0, np.dtype(self.dtypes[name]).type, self._shapes[name], addresses[name])
        return binding

    def _run_options(self, number: int) -> Any:
        """Options for runs with one set of addresses; they name the CUDA graph to replay, if any."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        graph = number if self._graphs and number <= MAX_GRAPHS else _NO_GRAPH
        options.add_run_config_entry(_GRAPH, str(graph))
        return options


def _open_session(path: Path, dimensions: Mapping[str, int], provider: dict[str, str]) -> Any:
    """Opens a session.

    Raises:
        BackendError: it cannot be opened, or only with other providers than these.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    for name, size in dimensions.items():
        options.add_free_dimension_override_by_name(name, size)
    wanted = {PROVIDER: provider, "CPUExecutionProvider": {}}  # the CPU computes shapes, if a graph has any
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(wanted.items()), enable_fallback=0)
    except Exception as error:
        raise _failure(f"cannot open {path.name}", error) from error
    if session.get_providers() != list(wanted):
        given = ", ".join(session.get_providers())
        raise BackendError("backend", f"ONNX Runtime opens {path.name} on {given} only", "see: sparsectrl-lcm doctor")
    return session


def provider_options(cuda: Cuda, graphs: bool) -> dict[str, str]:
    """Options to run on the loop's stream, with channels innermost, and to compute fp32 in fp32 instead of TF32."""
    return {
        "device_id": "0",
        "user_compute_stream": str(cuda.stream),
        "enable_cuda_graph": str(int(graphs)),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "1",
        "use_tf32": "0",
    }


def _failure(what: str, error: Exception) -> BackendError:
    text = first_line(error)
    return (DeviceOutOfMemory if is_out_of_memory(text) else BackendError)("backend", f"ONNX Runtime {what}: {text}")
