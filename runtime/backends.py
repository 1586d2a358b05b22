"""Which backend runs the requests of a bundle."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

from .cpu.sessions import Array
from .errors import BackendError, InvalidRequest, first_line, shown
from .format.bundle import Bundle
from .format.engine_sets import ANY_DEVICE, device_scope, find_set, parse_set_name, set_names, version_scope
from .gpu.tensorrt_library import INSTALL
from .loop.conditioning import KEPT_BYTES
from .progress import OnFrames, OnProgress
from .request import Request

_logger = logging.getLogger("sparsectrl_lcm")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a backend is to run a bundle.

    Attributes:
        precision: of the engines; None takes the first that was built, in the backend's order.
        device: OpenVINO's name of a device; None takes the CPU.
        threads: of a backend that computes on the CPU; None takes one per core.
        kept_bytes: memory for what later requests use again.

    Raises:
        InvalidRequest: a number is not allowed.
    """

    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    kept_bytes: int = KEPT_BYTES

    def __post_init__(self) -> None:
        for name, value, low in (("threads", self.threads, 1), ("kept_bytes", self.kept_bytes, 0)):
            if name == "threads" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise InvalidRequest(name, f"{shown(value)} is not allowed", f"give a whole number from {low} on")


class Executor(Protocol):
    """Runs requests, one at a time."""

    backend: str

    @property
    def precision(self) -> str | None:
        """Of its engines; None where that is chosen by the size of a request."""

    def run(
        self, request: Request, on_progress: OnProgress | None, on_frames: OnFrames | None = None
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage; `on_frames` gets every frame once, ahead of the result."""

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


def check_backend(backend: str) -> None:
    """Raises BackendError where a name is neither auto nor one of `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError("backend", f"{backend!r} is unknown", f"allowed are auto, {', '.join(BACKENDS)}")


def open_executor(bundle: Bundle, backend: str, options: LoadOptions) -> Executor:
    """What runs the requests of `bundle`.

    Args:
        bundle: the bundle.
        backend: a name of `BACKENDS`, or auto: the first that can run here and has what it needs of this bundle.
        options: how it is to run it.

    Raises:
        BackendError: the name is unknown, the backend cannot run here, or it has no such option.
    """
    if backend == "auto":
        backend = choose_backend(bundle, options)
    check_backend(backend)
    if options.device is not None and backend != OPENVINO:
        raise BackendError("device", f"{options.device!r} is for openvino", f"{backend} takes none")
    if options.threads is not None and backend not in ON_CPU:
        raise BackendError("threads", f"{backend} computes on the GPU", "leave them out")
    return BACKENDS[backend](bundle, options)


def choose_backend(bundle: Bundle, options: LoadOptions = LoadOptions()) -> str:
    """The fastest backend that can run here and has engines in the precision that may be loaded; a CPU needs none.

    Of OpenVINO's sets it has to be the one that would be loaded. Where no backend has the precision it is OpenVINO too,
    if it is there, which tells how to build it.
    """
    if options.device is not None:
        return OPENVINO
    for backend in BACKENDS:
        on_cpu = backend in ON_CPU
        names = [name for name in set_names(bundle.folder, backend) if _has(name, options.precision)]
        if not names and not (on_cpu and options.precision in (None, "fp32")):
            continue
        if (found := availability(backend)).reason is not None:
            continue
        if backend == OPENVINO and names:
            from .cpu.openvino import precisions

            names = [name for name in precisions(options.precision) if name in names][:1]
        version = found.version or ""
        if not names or backend == "onnxruntime" or any(_fits(bundle, backend, name, version) for name in names):
            return backend
        _logger.warning(
            "%s engines of %s are of another version or device; run: sparsectrl-lcm build %s --backend %s%s",
            *(backend, bundle.folder, bundle.folder, backend),
            f" --precision {options.precision}" if options.precision else "",
        )
    if options.precision not in (None, "fp32") and availability(OPENVINO).reason is None:
        return OPENVINO
    return "onnxruntime"


def _has(name: str, precision: str | None) -> bool:
    return precision is None or parse_set_name(name)[1] == precision


def _fits(bundle: Bundle, backend: str, name: str, version: str) -> bool:
    """Whether the engines of a set are of this version and device."""
    from .gpu.device import probe

    try:
        engines = find_set(bundle.folder, backend, name)
        device = None if backend in ON_CPU else probe()
    except BackendError:
        return False
    records = engines.index.engines.values() if engines else ()
    return all(
        record.spec.version == version_scope(version, record.spec.flags, record.spec.version)
        and (record.spec.device == ANY_DEVICE or record.spec.device == device_scope(backend, device, record.spec.flags))
        for record in records
    )


def availability(backend: str) -> Availability:
    """Whether a backend can run on this machine; makes no object that needs a GPU."""
    version = None
    try:
        if backend in ("tensorrt", "tensorrt-rtx"):
            from .gpu.tensorrt_library import load_library

            version = load_library(backend).version
        elif backend == OPENVINO:
            from .cpu.openvino import version as openvino_version

            version = openvino_version()
        else:
            version = _onnxruntime_version(cuda=backend == "onnxruntime-cuda")
        if backend not in ON_CPU:
            from .gpu.device import probe

            probe()
    except BackendError as error:
        return Availability(backend, version, str(error).removeprefix("backend: "))
    return Availability(backend, version)


def _onnxruntime_version(cuda: bool) -> str:
    """The version of onnxruntime.

    Raises:
        BackendError: it is missing, its files are not whole, or it has no CUDA provider; names the command that
            mends it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        mend = INSTALL["onnxruntime-cuda"] if cuda else "pip install onnxruntime"
        raise BackendError("backend", f"onnxruntime cannot be loaded ({first_line(error)})", f"run: {mend}") from None

    gpu = _is_installed("onnxruntime-gpu")
    package = "onnxruntime-gpu" if gpu else "onnxruntime"
    if not hasattr(onnxruntime, "get_available_providers"):  # as where one of the two packages was removed
        raise BackendError(
            "backend", "onnxruntime is broken", f"run: pip install --force-reinstall --no-deps {package}"
        )
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        if not gpu:
            raise BackendError("backend", "onnxruntime-gpu is not installed", f"run: {INSTALL['onnxruntime-cuda']}")
        raise BackendError(
            "backend",
            "onnxruntime lies in the place of onnxruntime-gpu",
            "run: pip uninstall --yes onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu",
        )
    return str(onnxruntime.__version__)


def _is_installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _tensorrt(backend: str) -> Callable[[Bundle, LoadOptions], Executor]:
    def open_tensorrt(bundle: Bundle, options: LoadOptions) -> Executor:
        from .gpu.device import probe
        from .gpu.executor import GpuExecutor
        from .gpu.tensorrt import TensorRtLoader
        from .gpu.tensorrt_library import load_library

        library = load_library(backend)
        device = probe()  # some versions crash where an object is made without a driver
        return GpuExecutor(bundle, TensorRtLoader(library, device, options.precision), options.kept_bytes)

    return open_tensorrt


def _onnxruntime_cuda(bundle: Bundle, options: LoadOptions) -> Executor:
    from .gpu.device import probe
    from .gpu.executor import GpuExecutor
    from .gpu.onnxruntime import OnnxRuntimeCudaLoader

    _onnxruntime_version(cuda=True)
    probe()
    return GpuExecutor(bundle, OnnxRuntimeCudaLoader(options.precision), options.kept_bytes)


def _openvino(bundle: Bundle, options: LoadOptions) -> Executor:
    from .cpu.executor import HostExecutor
    from .cpu.openvino import OpenVinoSessions

    sessions = OpenVinoSessions(bundle, options.precision, options.device or "CPU", options.threads)
    return HostExecutor(bundle, sessions, options.kept_bytes)


def _onnxruntime(bundle: Bundle, options: LoadOptions) -> Executor:
    from .cpu.executor import HostExecutor
    from .cpu.sessions import OnnxRuntimeSessions

    _onnxruntime_version(cuda=False)
    if options.precision not in (None, "fp32"):
        raise BackendError(
            "precision", "onnxruntime computes in fp32 on the CPU", f"{options.precision!r} is for openvino"
        )
    return HostExecutor(bundle, OnnxRuntimeSessions(bundle, options.threads), options.kept_bytes)


OPENVINO = "openvino"
ON_CPU = (OPENVINO, "onnxruntime")
"""Backends that need no GPU, and no engines either."""

BACKENDS: dict[str, Callable[[Bundle, LoadOptions], Executor]] = {
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    "onnxruntime-cuda": _onnxruntime_cuda,
    OPENVINO: _openvino,
    "onnxruntime": _onnxruntime,
}
"""What opens each backend, from the fastest to the one that runs everywhere."""
