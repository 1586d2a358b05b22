"""The backends: one record each, and which of them runs the requests of a bundle.

A record names a module that follows `Implementation`. To add a backend, write that module (and one in `engine/` if its
engines are built), and add a record to `BACKENDS`.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from .checked_request import CheckedRequest
from .cpu.sessions import Array
from .errors import BackendError, InvalidRequest, message
from .format.build_options import BuildOptions
from .format.bundle import Bundle
from .format.engine_keys import ANY_DEVICE, ClipSize, EngineSpec
from .format.engine_sets import EngineSet, find_set, parse_set_name, refusal, set_name, set_names
from .load_options import LoadOptions
from .progress import OnFrames, OnProgress

_logger = logging.getLogger("sparsectrl_lcm")
_DEFAULTS = LoadOptions()


class Executor(Protocol):
    """Runs requests, one at a time."""

    backend: str

    @property
    def precision(self) -> str | None:
        """Of its engines; None if it depends on the size of a request."""

    def run(
        self, request: CheckedRequest, on_progress: OnProgress | None, on_frames: OnFrames | None = None
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage; `on_frames` gets every frame once, before the result."""

    def refit(self, weights: Bundle | None) -> None:
        """Takes the weights of another bundle of the same architecture; None brings the base back."""

    def close(self) -> None:
        """Frees all memory; the next request takes it again."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on this machine: its version, or why it cannot and the command that helps."""

    backend: str
    version: str | None
    reason: str | None = None


class Implementation(Protocol):
    """What the module of a backend offers. `name` tells apart backends that share a module."""

    def find_version(self, name: str) -> str:
        """The version of the library.

        Raises:
            BackendError: it is missing or broken; the remedy is the command that installs it.
        """

    def open_executor(self, name: str, bundle: Bundle, options: LoadOptions) -> Executor:
        """What runs the requests of a bundle.

        Raises:
            BackendError: the backend cannot run here, or not with these options.
        """

    def engine_scope(self, name: str, spec: EngineSpec, version: str) -> tuple[str, str]:
        """The version and the device that an engine like `spec` has to be bound to, to be loaded here.

        Raises:
            BackendError: there is no such device here.
        """

    def computes_in(self, precision: str) -> bool:
        """Whether this machine is fast in a precision, so that it may be chosen unasked."""

    def notes(self, found: Availability) -> Iterable[str]:
        """What `doctor` adds."""


@dataclass(frozen=True, slots=True)
class Backend:
    """All that the package knows of a backend.

    Attributes:
        name: as users give it.
        on_gpu: whether it computes on an NVIDIA GPU.
        precisions: of its engines, in the order in which a set is chosen.
        install: the command that brings its libraries.
        module: the module of `runtime` that follows `Implementation`.
        builder: the module of `engine` that builds its engines.
        packages: the distributions that bring the library, for reports of versions.
        load_options: those of `LoadOptions` that only some backends take.
        portable: whether it runs the portable graphs too, in fp32, if no engines were built.
        built_at_export: whether `export` ends with its engines.
    """

    name: str
    on_gpu: bool
    precisions: tuple[str, ...]
    install: str
    module: str
    builder: str
    packages: tuple[str, ...]
    load_options: tuple[str, ...] = ()
    portable: bool = False
    built_at_export: bool = False

    @property
    def implementation(self) -> Implementation:
        """Its module."""
        return cast(Implementation, import_module(f".{self.module}", __package__))

    def order(self, precision: str | None = None) -> tuple[str, ...]:
        """The precisions to look for, in order: the one asked for, or all that this machine is fast in."""
        if precision is not None:
            return (precision,)
        return tuple(name for name in self.precisions if self.implementation.computes_in(name))

    def engine_set(self, bundle: Path, precision: str | None, size: ClipSize | None = None) -> EngineSet | None:
        """The set of engines to load: that of a precision, or the first in order that was built; None without any.

        Raises:
            BackendError: the backend has no such precision, or it was not built; the remedy is the command that
                builds it.
        """
        if precision not in (None, *self.precisions):
            allowed = ", ".join(sorted(self.precisions))
            raise BackendError("precision", f"{precision!r} is unknown to {self.name}", f"allowed are {allowed}")
        for name in self.order(precision):
            if (found := find_set(bundle, self.name, set_name(name, size))) is not None:
                return found
        if precision is not None:
            what = f"{precision} engines{f' for {size}' if size else ''} were not built"
            raise refusal(bundle, self.name, precision, size, what)
        return None

    def has_engines(self, bundle: Path, precision: str | None, size: ClipSize | None = None) -> bool:
        """Whether engines of a precision (any if None) and for a size (any if None) were built, for any machine."""
        return any(
            precision in (None, built) and (size is None or of in (None, size))
            for of, built in map(parse_set_name, set_names(bundle, self.name))
        )

    def loadable_sets(
        self, bundle: Path, version: str, precision: str | None, size: ClipSize | None = None
    ) -> list[EngineSet]:
        """The sets that would be chosen and may be loaded on this machine, by a library of this version."""
        sizes = {
            of for of, _ in map(parse_set_name, set_names(bundle, self.name)) if size is None or of in (None, size)
        }
        found = []
        for of in sizes:
            for name in self.order(precision):
                try:
                    engines = find_set(bundle, self.name, set_name(name, of))
                    if engines is not None and self._accepts(engines, version):
                        found.append(engines)
                except BackendError:  # an index that cannot be read, or no GPU
                    break
                if engines is not None:
                    break
        return found

    def _accepts(self, engines: EngineSet, version: str) -> bool:
        """Whether engines are of this version and device."""
        scopes = {
            graph: self.implementation.engine_scope(self.name, record.spec, version)
            for graph, record in engines.index.engines.items()
        }
        return all(engines.other_machine(graph, *scope) is None for graph, scope in scopes.items())


def unbound_scope(name: str, spec: EngineSpec, version: str) -> tuple[str, str]:
    """`Implementation.engine_scope` of backends whose engines run on any device, in one version of the library."""
    return version, ANY_DEVICE


_RECORDS = (
    Backend(
        name="tensorrt",
        on_gpu=True,
        precisions=("fp16", "bf16", "fp32"),
        install="pip install 'tensorrt>=10.16,<12' cuda-bindings onnx-ir",
        module="gpu.tensorrt",
        builder="tensorrt.builder",
        packages=("tensorrt",),
    ),
    Backend(
        name="tensorrt-rtx",
        on_gpu=True,
        precisions=("fp16", "bf16", "fp32"),
        install="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116 cuda-bindings onnx-ir",
        module="gpu.tensorrt",
        builder="tensorrt.builder",
        packages=("tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
    ),
    Backend(
        name="onnxruntime-cuda",
        on_gpu=True,
        precisions=("fp16", "fp32"),
        install="pip uninstall --yes onnxruntime && "
        "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31' cuda-bindings onnx-ir",
        module="gpu.onnxruntime",
        builder="onnxruntime_cuda",
        packages=("onnxruntime-gpu",),
    ),
    Backend(
        name="openvino",
        on_gpu=False,
        precisions=("bf16", "fp32", "int8"),
        install="pip install 'sparsectrl-lcm[openvino]'",
        module="cpu.openvino",
        builder="openvino",
        packages=("openvino",),
        load_options=("device", "threads"),
        portable=True,
    ),
    Backend(
        name="onnxruntime",
        on_gpu=False,
        precisions=("fp32",),
        install="pip install onnxruntime",
        module="cpu.onnxruntime",
        builder="onnxruntime",
        packages=("onnxruntime",),
        load_options=("threads",),
        portable=True,
        built_at_export=True,
    ),
)

BACKENDS: dict[str, Backend] = {record.name: record for record in _RECORDS}
"""The backends by name, from the fastest to the one that runs everywhere."""


def find_backend(name: str) -> Backend:
    """The record of a backend.

    Raises:
        InvalidRequest: the name is unknown.
    """
    if name not in BACKENDS:
        raise InvalidRequest("backend", f"{name!r} is unknown", f"allowed are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def check_backend(backend: str) -> None:
    """Raises BackendError if a name is neither auto nor one of `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError("backend", f"{backend!r} is unknown", f"allowed are auto, {', '.join(BACKENDS)}")


def availability(backend: str) -> Availability:
    """Whether a backend can run on this machine; makes no object that needs a GPU."""
    record, version = BACKENDS[backend], None
    try:
        version = record.implementation.find_version(backend)
        if record.on_gpu:
            from .gpu.device import probe

            probe()
    except BackendError as error:
        return Availability(backend, version, message("", error.reason, error.remedy))
    return Availability(backend, version)


def open_executor(bundle: Bundle, backend: str, options: LoadOptions) -> Executor:
    """What runs the requests of `bundle`.

    Args:
        bundle: the bundle.
        backend: a name of `BACKENDS`, or auto: the first that can run here and has what it needs of this bundle.
        options: how it runs it.

    Raises:
        BackendError: the name is unknown, the backend cannot run here, or it has no such option.
    """
    if backend == "auto":
        backend = choose_backend(bundle, options)
    check_backend(backend)
    record = BACKENDS[backend]
    if options.device is not None and "device" not in record.load_options:
        others = ", ".join(_takers("device"))
        raise BackendError("device", f"{options.device!r} is for {others}", f"{backend} takes none")
    if options.threads is not None and "threads" not in record.load_options:
        raise BackendError(
            "threads", f"{backend} {'computes on the GPU' if record.on_gpu else 'takes none'}", "leave them out"
        )
    return record.implementation.open_executor(backend, bundle, options)


def choose_backend(bundle: Bundle, options: LoadOptions = _DEFAULTS) -> str:
    """The fastest backend that can run here and has engines in the precision that may be loaded; a CPU needs none.

    If no backend has the precision, it is the first that could build it here, whose refusal names the command.
    """
    if options.device is not None:
        return _takers("device")[0]
    *faster, last = BACKENDS
    for backend in faster:
        if can_run(bundle, backend, options.precision):
            return backend
    if options.precision not in (None, "fp32"):
        for backend in faster:
            record = BACKENDS[backend]
            if record.portable and options.precision in record.precisions and availability(backend).reason is None:
                return backend
    return last


def can_run(bundle: Bundle, backend: str, precision: str | None = None, size: ClipSize | None = None) -> bool:
    """Whether a backend can run here with what a bundle has.

    Engines that were built for another version or device do not count, which a warning tells.

    Args:
        bundle: the bundle.
        backend: a name of `BACKENDS`.
        precision: of the engines; None takes any.
        size: of the clip; None takes any.
    """
    record = BACKENDS[backend]
    built = record.has_engines(bundle.folder, precision, size)
    if not built and not (record.portable and precision in (None, "fp32")):
        return False
    found = availability(backend)
    if found.reason is not None:
        return False
    if not built or record.loadable_sets(bundle.folder, found.version or "", precision, size):
        return True
    command = BuildOptions(precision=precision).command(bundle.folder, backend)
    _logger.warning("%s engines of %s are of another version or device; run: %s", backend, bundle.folder, command)
    return False


def _takers(option: str) -> list[str]:
    """The backends that take a load option."""
    return [name for name, record in BACKENDS.items() if option in record.load_options]
