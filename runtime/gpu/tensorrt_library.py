"""Finds and imports the TensorRT libraries."""

import ctypes
import importlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..backends import BACKENDS
from ..errors import BackendError, DeviceOutOfMemory
from ..operating_system import shared_library_pattern

_logger = logging.getLogger("sparsectrl_lcm.tensorrt")

RTX = "tensorrt-rtx"
_RTX_LIBRARIES = ("tensorrt_rtx", "tensorrt_onnxparser_rtx")


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX.

    Attributes:
        backend: tensorrt or tensorrt-rtx.
        module: its Python module.
        version: its version.
        logger: receives the library's messages; TensorRT requires one logger for all objects.
    """

    backend: str
    module: Any
    version: str
    logger: Any

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.backend == RTX

    @property
    def runs_on(self) -> list[str]:
        """The compute capabilities of the only GPUs that it loads engines on; empty if there is no such list."""
        return sorted(compute_capabilities(self.module), key=float) if self.is_rtx else []

    def call(self, failed: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one of the library's functions.

        Raises:
            BackendError: the function returned None or False; `failed` says what could not be done.
        """
        self.forget_errors()
        result = function(*arguments)
        if result is None or result is False:
            raise self.failure(failed)
        return result

    def forget_errors(self) -> None:
        """Drops the messages of earlier calls, such as of a kernel that did not fit, which TensorRT did without."""
        self.logger.errors.clear()

    def failure(self, what: str, of_a_build: bool = False) -> BackendError:
        """An error with the library's last message; a `DeviceOutOfMemory` if the device's memory has run out.

        It takes every message since `forget_errors` and the last failure, but in a build the last one alone: kernels
        that did not fit while they were tried are not why a build fails.
        """
        lines = [" ".join(line.split()) for line in self.logger.errors]
        self.forget_errors()
        kind = DeviceOutOfMemory if any(map(is_out_of_memory, lines[-1:] if of_a_build else lines)) else BackendError
        reason = lines[-1] if lines else "it gave no reason"
        return kind("backend", f"{self.backend} {self.version} {what}: {reason}")


def is_out_of_memory(text: str) -> bool:
    """Whether a library's message says that the device's memory has run out."""
    marks = (
        "out of memory",
        "outofmemory",
        "memoryallocation",
        "alloc_failed",
        "failed to allocate",
        "resource allocation failed",  # cuBLAS: its handles need memory too
    )
    return any(mark in text.lower() for mark in marks)


def compute_capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that TensorRT-RTX builds for and runs on, such as 8.9, with its constants for them."""
    listed = trt.ComputeCapability
    members = listed.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": constant for name, constant in members if name[2:].isdigit()}


@cache
def load_library(backend: str) -> Library:
    """Imports the library of a backend; needs no GPU.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    names = ("tensorrt_rtx", "tensorrt_rtx_bindings") if backend == RTX else ("tensorrt",)
    name = next((name for name in names if find_spec(name)), None)
    if name is None:
        raise BackendError("backend", f"{backend} is not installed", f"run: {BACKENDS[backend].install}")
    try:
        if name == "tensorrt_rtx_bindings":
            _load_rtx_libraries()
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError("backend", f"{backend} cannot be loaded: {error}") from error
    return open_library(backend, module)


def open_library(backend: str, module: Any) -> Library:
    """The library of an imported module."""
    return Library(backend, module, str(module.__version__), _make_logger(module))


def _load_rtx_libraries() -> None:
    """Loads the libraries by path: the bindings do not include them, but ONNX Runtime's plugin does."""
    spec = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for pattern in map(shared_library_pattern, _RTX_LIBRARIES):
        found = [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
        if found:  # if not, the system's loader may find them
            ctypes.CDLL(str(found[-1]), ctypes.RTLD_GLOBAL)


def _make_logger(trt: Any) -> Any:
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.INFO,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: 5,
    }

    class Logger(trt.ILogger):
        """Passes TensorRT's messages to Python's logging.

        Keeps errors until they are raised, and the last list of kernels, for the engine's report.
        """

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=20)
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.append(message)
                level = logging.DEBUG  # it will be raised
            elif message.startswith("Layers:"):
                self.layers = message
            _logger.log(level, message)

    return Logger()
