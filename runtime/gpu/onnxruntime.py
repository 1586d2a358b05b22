"""ONNX Runtime's CUDA provider on the device: the same loop, with bindings to fixed addresses."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engines import ClipSize, EngineSet, find_set, refusal, set_name
from ..errors import BackendError, DeviceOutOfMemory, first_line
from ..weights import WeightTable
from .cuda import Cuda
from .library import is_out_of_memory

BACKEND = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
PRECISIONS = ("fp16", "fp32")
"""In the order in which a set of engines is chosen."""
_CANNOT_REFIT = "refit: ONNX Runtime cannot refit; load the other bundle instead"
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}


class OnnxRuntimeCudaLoader:
    """Opens the typed graphs that `build` made; their shapes are set here."""

    backend = BACKEND

    def check(self, bundle: Bundle, size: ClipSize) -> None:
        """Raises BackendError where no engines were built."""
        self._set(bundle)

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> "OnnxRuntimeCudaEngine":
        """The engine of a graph, after its key was compared."""
        import onnxruntime

        engines = self._set(bundle)
        path = engines.open(bundle.manifest, graph, onnxruntime.__version__)
        record = bundle.graph(graph)
        dimensions = {
            dimension: size
            for item in (*record.inputs, *record.outputs)
            for dimension, size in zip(item.shape, shapes[item.name], strict=True)
            if isinstance(dimension, str)
        }
        return OnnxRuntimeCudaEngine(path, dimensions, shapes, cuda, tf32=engines.index.precision != "fp32")

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """Raises BackendError: ONNX Runtime cannot refit."""
        raise BackendError(_CANNOT_REFIT)

    def _set(self, bundle: Bundle) -> EngineSet:
        for precision in PRECISIONS:
            if found := find_set(bundle.folder, self.backend, set_name(precision)):
                return found
        raise refusal(bundle.folder, self.backend, None, None, "engines were not built")


class OnnxRuntimeCudaEngine:
    """One session on the loop's stream, with a binding for each set of addresses."""

    activation_bytes = 0  # ONNX Runtime takes its own

    def __init__(
        self,
        path: Path,
        dimensions: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cuda: Cuda,
        tf32: bool,
    ) -> None:
        import onnxruntime

        self._cuda = cuda
        self._shapes = shapes
        self._bindings: dict[tuple[int, ...], Any] = {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, size in dimensions.items():
            options.add_free_dimension_override_by_name(name, size)
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=[(PROVIDER, provider_options(cuda, tf32)), "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises classes of its own that share no public base
            raise _failure(f"cannot open {path.name}", error) from error
        if PROVIDER not in self._session.get_providers():
            raise BackendError("backend: ONNX Runtime has no working CUDA provider here; see: sparsectrl-lcm doctor")
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]
        tensors = (*self._session.get_inputs(), *self._session.get_outputs())
        self.dtypes = {item.name: _TYPES[item.type] for item in tensors}

    def use_activation(self, address: int, nbytes: int) -> None:
        """ONNX Runtime takes its own activation memory."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Puts a run on the stream."""
        key = tuple(addresses[name] for name in (*self._inputs, *self._outputs))
        if key not in self._bindings:
            self._bindings[key] = self._bind(addresses)
        try:
            self._session.run_with_iobinding(self._bindings[key], self._run_options)
        except Exception as error:
            raise _failure("failed", error) from error

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Raises BackendError: ONNX Runtime cannot."""
        raise BackendError(_CANNOT_REFIT)

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


def provider_options(cuda: Cuda, tf32: bool) -> dict[str, str]:
    """Runs go on the loop's stream, where they can be captured into its graph."""
    return {
        "device_id": "0",
        "user_compute_stream": str(cuda.stream),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),
    }


def _failure(what: str, error: Exception) -> BackendError:
    text = first_line(error)
    return (DeviceOutOfMemory if is_out_of_memory(text) else BackendError)(f"backend: ONNX Runtime {what}: {text}")
