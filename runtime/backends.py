"""The backends, one record each, and the choice of the one that runs a bundle.

A record names a module with the functions of `Implementation` in backend_interface.py. To add a backend, write that
module (and one in `engine/` if its engines are built), and add a record to `BACKENDS`.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import cast

from .backend_interface import Availability, Executor, Implementation
from .errors import BackendError, UnknownBackend, message
from .format.build_options import COMMON_OPTIONS, BuildOptions
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .format.engine_sets import EngineSet, find_set, parse_set_name, refusal, set_name, set_names
from .load_options import LoadOptions

_logger = logging.getLogger("sparsectrl_lcm")
_DEFAULTS = LoadOptions()


@dataclass(frozen=True, slots=True)
class Backend:
    """Everything the package knows about a backend.

    Attributes:
        name: the name that users give.
        on_gpu: whether it computes on an NVIDIA GPU.
        precisions: of its engines, in the order in which a set is chosen.
        install: the command that installs its libraries.
        module: the module of `runtime` that follows `Implementation`.
        builder: the module of `engine` that builds its engines.
        packages: the distributions of the library, for version reports.
        build_options: the options in `BuildOptions` that its builder takes besides `COMMON_OPTIONS`.
        load_options: the options in `LoadOptions` that this backend takes but not every backend.
        portable: whether it can run the portable graphs, in fp32, if no engines were built.
        build_needs_library: whether its library has to be installed for a build; other builders check what they need.
        compiles: whether it compiles graphs for seconds when they are first opened. Its module then has `is_compiled`.
        built_at_export: whether `export` builds its engines.
        library_runner: the module of `engine` that runs its engines without this runtime, for `verify`.
        emulation: the module of `engine` that emulates its engines on the CPU (`Emulation` in emulated_sessions.py).
    """

    name: str
    on_gpu: bool
    precisions: tuple[str, ...]
    install: str
    module: str
    builder: str
    packages: tuple[str, ...]
    build_options: tuple[str, ...] = ()
    load_options: tuple[str, ...] = ()
    portable: bool = False
    build_needs_library: bool = False
    compiles: bool = False
    built_at_export: bool = False
    library_runner: str | None = None
    emulation: str | None = None

    @property
    def implementation(self) -> Implementation:
        """The backend's module."""
        return cast(Implementation, import_module(f".{self.module}", __package__))

    def order(self, precision: str | None = None) -> tuple[str, ...]:
        """The precisions to look for, in order: the given one, or all that this machine is fast in."""
        if precision is not None:
            return (precision,)
        return tuple(name for name in self.precisions if self.implementation.computes_in(name))

    def engine_set(self, bundle: Path, precision: str | None, size: ClipSize | None = None) -> EngineSet | None:
        """The set of engines to load: the given precision, or the first built one in order; None if none was built.

        Raises:
            BackendError: the backend does not have the precision, or it was not built; the remedy is the command
                that builds it.
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
        """Whether engines of a precision and for a size (None means any) were built, no matter for which machine."""
        return any(
            precision in (None, built) and (size is None or of in (None, size))
            for of, built in map(parse_set_name, set_names(bundle, self.name))
        )

    def chosen_sets(
        self, bundle: Path, precision: str | None, size: ClipSize | None = None
    ) -> Iterator[EngineSet | None]:
        """For each size (only `size` if one is given) the set that `engine_set` would choose.

        None stands for a set whose index cannot be read.
        """
        names = set_names(bundle, self.name)
        sizes = {of for of, _ in map(parse_set_name, names)}
        for of in sizes if size is None else sizes & {None, size}:
            wanted = (set_name(name, of) for name in self.order(precision))
            if (chosen := next((name for name in wanted if name in names), None)) is not None:
                try:
                    yield find_set(bundle, self.name, chosen)
                except BackendError:
                    yield None

    def loadable_sets(
        self, bundle: Path, version: str, precision: str | None, size: ClipSize | None = None
    ) -> Iterator[EngineSet]:
        """Those of `chosen_sets` that a library of this version may load on this machine."""
        return (
            engines
            for engines in self.chosen_sets(bundle, precision, size)
            if engines is not None and self.accepts(engines, version)
        )

    def accepts(self, engines: EngineSet, version: str) -> bool:
        """Whether engines were built for this version and device."""
        try:
            return all(
                engines.other_machine(graph, *self.implementation.engine_scope(self.name, record.spec, version)) is None
                for graph, record in engines.index.engines.items()
            )
        except BackendError:  # no GPU
            return False


TENSORRT_OPTIONS = tuple(item.name for item in fields(BuildOptions) if item.name not in COMMON_OPTIONS)

_RECORDS = (
    Backend(
        name="tensorrt",
        on_gpu=True,
        precisions=("fp16", "bf16", "fp32", "fp8"),
        install="pip install 'tensorrt>=10.16,<12' cuda-bindings onnx-ir",
        module="gpu.tensorrt",
        builder="tensorrt.builder",
        packages=("tensorrt",),
        build_options=TENSORRT_OPTIONS,
        load_options=("cuda_graphs",),
        library_runner="tensorrt.plan_runner",
        emulation="tensorrt.emulation",
    ),
    Backend(
        name="tensorrt-rtx",
        on_gpu=True,
        precisions=("fp16", "bf16", "fp32", "fp8"),
        install="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116 cuda-bindings onnx-ir",
        module="gpu.tensorrt",
        builder="tensorrt.builder",
        packages=("tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
        build_options=TENSORRT_OPTIONS,
        load_options=("cuda_graphs",),
        library_runner="tensorrt.plan_runner",
        emulation="tensorrt.emulation",
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
        load_options=("cuda_graphs",),
        emulation="onnxruntime_cuda",
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
        build_needs_library=True,
        compiles=True,
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
        build_needs_library=True,
        built_at_export=True,
    ),
)

REFERENCE = "onnxruntime"
"""The backend that runs everywhere. Builds are compared with it."""

BACKENDS: dict[str, Backend] = {record.name: record for record in _RECORDS}
"""The backends by name, the fastest first."""


def find_backend(name: str, *others: str) -> Backend:
    """The record of a backend.

    Args:
        name: its name.
        others: what the caller allows besides, such as auto, for the message.

    Raises:
        UnknownBackend: there is none of this name.
    """
    if name not in BACKENDS:
        raise UnknownBackend("backend", f"{name!r} is unknown", f"allowed are {', '.join((*others, *BACKENDS))}")
    return BACKENDS[name]


def availability(backend: str) -> Availability:
    """Whether a backend can run on this machine."""
    implementation, version = BACKENDS[backend].implementation, None
    try:
        version = implementation.find_version(backend)
        implementation.check_machine(backend)
    except BackendError as error:
        return Availability(backend, version, message("", error.reason, error.remedy), error)
    return Availability(backend, version)


def open_executor(bundle: Bundle, backend: str, options: LoadOptions) -> Executor:
    """Opens a bundle on a backend.

    Args:
        bundle: the bundle.
        backend: a name in `BACKENDS`, or auto: the first that can run here and has the engines that it needs.
        options: how the backend runs the bundle.

    Raises:
        BackendError: the name is unknown, the backend cannot run here, or it does not take an option.
    """
    if backend == "auto":
        backend = choose_backend(bundle, options)
    record = find_backend(backend, "auto")
    for name in ("device", "threads", "cuda_graphs"):
        if getattr(options, name) != getattr(_DEFAULTS, name) and name not in record.load_options:
            raise BackendError(name, f"only for {', '.join(_takers(name))}", f"leave it out for {backend}")
    return record.implementation.open_executor(backend, bundle, options)


def choose_backend(bundle: Bundle, options: LoadOptions = _DEFAULTS, without: Collection[str] = ()) -> str:
    """The fastest backend that can run here and has loadable engines in the precision. CPU backends need no engines.

    If none has engines in the precision, it is a CPU backend that could build them, whose error names the command, or
    `REFERENCE`, whose error names the backends with that precision. Backends in `without` are left out.
    """
    if options.device is not None:
        return _takers("device")[0]
    faster = [backend for backend in BACKENDS if backend not in (REFERENCE, *without)]
    for backend in faster:
        if can_run(bundle, backend, options.precision):
            return backend
    if options.precision not in (None, "fp32"):
        for backend in faster:
            record = BACKENDS[backend]
            if record.portable and options.precision in record.precisions and availability(backend).reason is None:
                return backend
    return REFERENCE


def can_run(bundle: Bundle, backend: str, precision: str | None = None, size: ClipSize | None = None) -> bool:
    """Whether a backend can run a bundle here.

    Engines that were built for another version or device do not count; a warning is logged.

    Args:
        bundle: the bundle.
        backend: a name in `BACKENDS`.
        precision: precision of the engines; None takes any.
        size: size of the clip; None takes any.
    """
    record = BACKENDS[backend]
    without_engines = record.portable and precision in (None, "fp32")
    if not without_engines and not record.has_engines(bundle.folder, precision, size):
        return False
    found = availability(backend)
    if found.reason is not None:
        return False
    chosen = list(record.chosen_sets(bundle.folder, precision, size))
    if not chosen:
        return without_engines
    if any(engines is not None and record.accepts(engines, found.version or "") for engines in chosen):
        return True
    command = BuildOptions(precision=precision).command(bundle.folder, backend)
    _logger.warning(
        "%s engines of %s were built for another version or device; run: %s", backend, bundle.folder, command
    )
    return False


def _takers(option: str) -> list[str]:
    """The backends that take a load option."""
    return [name for name, record in BACKENDS.items() if option in record.load_options]
