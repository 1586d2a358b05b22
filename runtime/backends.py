"""Which backend runs the requests of a bundle."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .bundle import Bundle
from .engines import ANY_DEVICE, device_scope, find_set, set_names, version_scope
from .errors import BackendError
from .gpu.library import INSTALL
from .progress import OnProgress
from .request import Request
from .sessions import Array

_logger = logging.getLogger("sparsectrl_lcm")

PLANNED = ("openvino",)
"""Backends that a later release brings."""


class Executor(Protocol):
    """Runs requests, one at a time."""

    backend: str

    def run(self, request: Request, on_progress: OnProgress | None) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage."""

    def refit(self, weights: Bundle | None) -> None:
        """Takes the weights of another bundle of the same architecture; None brings the base back."""

    def close(self) -> None:
        """Frees all memory; the next request takes it again."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on this machine: its version, and else the reason and the command that mends it."""

    backend: str
    version: str | None
    reason: str | None = None


def open_executor(bundle: Bundle, backend: str, kept_bytes: int) -> Executor:
    """What runs the requests of `bundle`.

    Args:
        bundle: the bundle.
        backend: a name of `BACKENDS`, or auto: the first that can run here and has engines for this bundle.
        kept_bytes: memory for what later requests use again.

    Raises:
        BackendError: the name is unknown, or the backend cannot run here.
    """
    if backend == "auto":
        backend = choose_backend(bundle)
    if backend not in BACKENDS:
        reason = "is not available in this release" if backend in PLANNED else "is unknown"
        raise BackendError(f"backend: {backend!r} {reason}; allowed are auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](bundle, kept_bytes)


def choose_backend(bundle: Bundle) -> str:
    """The fastest backend that can run here and has engines for `bundle` that may be loaded."""
    for backend in BACKENDS:
        names = set_names(bundle.folder, backend)
        if backend == "onnxruntime" or (names and (found := availability(backend)).reason is None):
            if backend == "onnxruntime" or any(_fits(bundle, backend, name, found.version or "") for name in names):
                return backend
            _logger.warning(
                "%s engines of %s are of another version or device; run: sparsectrl-lcm build %s --backend %s",
                *(backend, bundle.folder, bundle.folder, backend),
            )
    raise AssertionError("the CPU is the last")


def _fits(bundle: Bundle, backend: str, name: str, version: str) -> bool:
    """Whether the engines of a set are of this version and device."""
    from .gpu.device import probe

    try:
        engines = find_set(bundle.folder, backend, name)
        device = probe()
    except BackendError:
        return False
    records = engines.index.engines.values() if engines else ()
    return all(
        record.spec.version == version_scope(version, record.spec.flags, record.spec.version)
        and record.spec.device in (ANY_DEVICE, device_scope(backend, device, record.spec.flags))
        for record in records
    )


def availability(backend: str) -> Availability:
    """Whether a backend can run on this machine; makes no object that needs a GPU."""
    version = None
    try:
        if backend in ("tensorrt", "tensorrt-rtx"):
            from .gpu.library import load_library

            version = load_library(backend).version
        else:
            version = _onnxruntime_version(cuda=backend == "onnxruntime-cuda")
        if backend != "onnxruntime":
            from .gpu.device import probe

            probe()
    except BackendError as error:
        return Availability(backend, version, str(error).removeprefix("backend: "))
    return Availability(backend, version)


def _onnxruntime_version(cuda: bool) -> str:
    """The version of onnxruntime.

    Raises:
        BackendError: its files are not whole, or it has no CUDA provider; names the command that mends it.
    """
    import onnxruntime

    gpu = _is_installed("onnxruntime-gpu")
    package = "onnxruntime-gpu" if gpu else "onnxruntime"
    if not hasattr(onnxruntime, "get_available_providers"):  # as where one of the two packages was removed
        raise BackendError(f"backend: onnxruntime is broken; run: pip install --force-reinstall --no-deps {package}")
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        if not gpu:
            raise BackendError(f"backend: onnxruntime-gpu is not installed; run: {INSTALL['onnxruntime-cuda']}")
        raise BackendError(
            "backend: onnxruntime lies in the place of onnxruntime-gpu; run: "
            "pip uninstall --yes onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
    return str(onnxruntime.__version__)


def _is_installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _tensorrt(backend: str) -> Callable[[Bundle, int], Executor]:
    def open_tensorrt(bundle: Bundle, kept_bytes: int) -> Executor:
        from .gpu.device import probe
        from .gpu.executor import GpuExecutor
        from .gpu.library import load_library
        from .gpu.tensorrt import TensorRtLoader

        library = load_library(backend)
        device = probe()  # some versions crash where an object is made without a driver
        return GpuExecutor(bundle, TensorRtLoader(library, device), kept_bytes)

    return open_tensorrt


def _onnxruntime_cuda(bundle: Bundle, kept_bytes: int) -> Executor:
    from .gpu.device import probe
    from .gpu.executor import GpuExecutor
    from .gpu.onnxruntime import OnnxRuntimeCudaLoader

    _onnxruntime_version(cuda=True)
    probe()
    return GpuExecutor(bundle, OnnxRuntimeCudaLoader(), kept_bytes)


def _onnxruntime(bundle: Bundle, kept_bytes: int) -> Executor:
    from .host import HostExecutor
    from .sessions import OnnxRuntimeSessions

    _onnxruntime_version(cuda=False)
    return HostExecutor(bundle, OnnxRuntimeSessions(bundle), kept_bytes)


BACKENDS: dict[str, Callable[[Bundle, int], Executor]] = {
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    "onnxruntime-cuda": _onnxruntime_cuda,
    "onnxruntime": _onnxruntime,
}
"""What opens each backend, from the fastest to the one that runs everywhere."""
