"""TensorRT and TensorRT-RTX engines on the device."""

import mmap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..backend_interface import Availability
from ..backends import BACKENDS
from ..errors import BackendError
from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize
from ..format.engine_keys import EngineSpec
from ..format.engine_sets import EngineSet, parse_set_name, refusal, set_names
from ..format.refittable_engines import can_refit
from ..format.weights import WeightTable, check_files, weight_table_path
from ..load_options import LoadOptions
from . import device, tensorrt_library
from .cuda import Cuda
from .device import Device
from .engine_scope import device_scope, version_scope
from .executor import GpuExecutor
from .tensorrt_library import RTX, Library

_NOT_REFITTABLE = ("refit", "the engines were built without refit", "build them again with refit")


def find_version(name: str) -> str:
    """The version of TensorRT or TensorRT-RTX."""
    return tensorrt_library.load_library(name).version


def check_machine(name: str) -> None:
    """Raises BackendError if there is no GPU, or none that the library runs on."""
    usable_device(tensorrt_library.load_library(name))


def usable_device(library: Library) -> Device:
    """The GPU of this machine, found without an object of the library: some versions crash if there is no driver.

    Raises:
        BackendError: there is none, or the library would refuse to load an engine on it.
    """
    found = device.probe()
    if library.runs_on and found.compute_capability not in library.runs_on:
        listed = ", ".join(library.runs_on)
        reason = f"{library.backend} {library.version} runs on GPUs of compute capability {listed}, not on {found}"
        raise BackendError("backend", reason, "take another backend")
    return found


def open_executor(name: str, bundle: Bundle, options: LoadOptions) -> GpuExecutor:
    """Opens a bundle on this backend."""
    library = tensorrt_library.load_library(name)
    loader = TensorRtLoader(library, usable_device(library), options.precision)
    return GpuExecutor(bundle, loader, options.kept_bytes, cuda_graphs=options.cuda_graphs)


def engine_scope(name: str, spec: EngineSpec, version: str) -> tuple[str, str]:
    """The version and device that an engine like `spec` must be bound to in order to load here."""
    return version_scope(version, spec.flags, spec.version), device_scope(name, device.probe(), spec.flags)


def computes_in(precision: str) -> bool:
    """Whether this precision may be chosen if the user names none: fp8 only if the GPU computes in it."""
    try:
        return precision != "fp8" or device.computes_in_fp8(device.probe().compute_capability)
    except BackendError:  # no GPU: any engine may be listed
        return True


def notes(found: Availability) -> Iterable[str]:
    """The lines that `doctor` adds."""
    if found.backend == RTX and found.version and found.reason:
        yield "engines can be built here nevertheless"


class TensorRtLoader:
    """Opens the engines that `build` made for a size.

    Args:
        library: TensorRT or TensorRT-RTX.
        gpu: the GPU.
        precision: precision of the engines; None takes the first that was built.
    """

    def __init__(self, library: Library, gpu: Device, precision: str | None = None) -> None:
        self.backend = library.backend
        self.precision = precision
        self._library = library
        self._gpu = gpu
        self._runtime: Any = None

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        """The number of keyframes that the engines of a size were built for."""
        return self._set(bundle, size).check_keyframes(bundle.manifest, keyframes)

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> "TensorRtEngine":
        """Opens the engine of a graph, after checking its key."""
        engines = self._set(bundle, size)
        record = engines.index.engines.get(graph)
        flags = record.spec.flags if record else {}
        if engines.index.precision == "fp8" and not device.computes_in_fp8(self._gpu.compute_capability):
            raise BackendError("precision", f"{self._gpu} does not compute in fp8", "build and load fp16 engines")
        version = version_scope(self._library.version, flags, record.spec.version if record else None)
        inputs = {item.name: shapes[item.name] for item in bundle.graph(graph).inputs}
        bound_to = device_scope(self.backend, self._gpu, flags)
        path = engines.open(bundle.manifest, graph, version, bound_to, inputs)
        table = _weight_table(path)
        if self._runtime is None:
            self._runtime = self._library.module.Runtime(self._library.logger)
        if flags.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True
        engine = TensorRtEngine(self._library, self._runtime, path, cuda)
        if table.root and record is not None and (flags.get("strip_weights") or record.refit_at_load):
            check_files(bundle, {weight.path for weight in table.root.values()})
            engine.refit(table.root, lambda name: table.read(bundle, name))
        return engine

    def check_refit(self, bundle: Bundle) -> None:
        """Raises BackendError if none of the engines that this loader would choose can be refitted."""
        chosen = []
        for size in {parse_set_name(name)[0] for name in set_names(bundle.folder, self.backend)}:
            with suppress(BackendError):  # raised when a request needs that size
                chosen.append(BACKENDS[self.backend].engine_set(bundle.folder, self.precision, size))
        records = [record for found in chosen if found for record in found.index.engines.values()]
        if records and not any(map(can_refit, records)):
            raise BackendError(*_NOT_REFITTABLE)

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """The weights of an engine; empty if it was built without refit."""
        engines = self._set(bundle, size)
        record = engines.index.engines.get(graph)
        return WeightTable({}) if record is None else _weight_table(engines.folder / record.path)

    def _set(self, bundle: Bundle, size: ClipSize) -> EngineSet:
        if found := BACKENDS[self.backend].engine_set(bundle.folder, self.precision, size):
            return found
        raise refusal(bundle.folder, self.backend, None, size, f"engines for {size} were not built")


class TensorRtEngine:
    """One engine with one execution context."""

    def __init__(self, library: Library, runtime: Any, path: Path, cuda: Cuda) -> None:
        trt = library.module
        self._library = library
        self._cuda = cuda
        self._bound: dict[str, int] = {}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = library.call(f"cannot load {path.name}", runtime.deserialize_cuda_engine, plan)
        self._path = path
        self._context: Any = None
        self._runtime_cache: _RuntimeCache | None = None
        self.activation_bytes = int(self._engine.device_memory_size_v2)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.dtypes = {name: _dtype(trt, self._engine.get_tensor_dtype(name)) for name in names}

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured. TensorRT-RTX reports this; TensorRT fails in the capture."""
        return self._runtime_cache is None or bool(self._context.is_stream_capturable(self._cuda.stream))

    def use_activation(self, address: int, nbytes: int) -> None:
        """Sets the engine's activation memory."""
        if self._context is None:
            self._context = self._open_context()
        self._context.set_device_memory(address, nbytes)

    def _open_context(self) -> Any:
        """Creates the execution context. A stripped engine must have its weights by then."""
        strategy: Any = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        cache = None
        if self._library.is_rtx:
            cache = _RuntimeCache(self._engine, strategy, self._path)
        failed = f"cannot create a context for {self._path.name}"
        given = cache.config if cache else strategy
        context = self._library.call(failed, self._engine.create_execution_context, given)
        self._runtime_cache = cache
        return context

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueues a run on the stream."""
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                self._library.call(f"refuses the address of {name}", self._context.set_tensor_address, name, address)
                self._bound[name] = address
        self._library.call("cannot run an engine", self._context.execute_async_v3, self._cuda.stream)
        if self._runtime_cache:
            self._runtime_cache.save()

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Replaces the named weights, and those that the builder merged with them."""
        trt = self._library.module
        if not self._engine.refittable:
            raise BackendError(*_NOT_REFITTABLE)
        self._cuda.synchronize()
        refitter = trt.Refitter(self._engine, self._library.logger)
        known = set(refitter.get_all_weights())
        held = []  # keeps the arrays alive: a refitter does not copy them
        given: set[str] = set()
        pending = list(names)
        while pending:
            given.update(pending)
            for name in pending:
                if name not in known:
                    raise BackendError(
                        "refit", f"the engine has no weight {name!r}", "build it again from the other bundle"
                    )
                held.append(read(name))
                self._library.call(
                    f"refuses the weight {name}", refitter.set_named_weights, name, _weights(trt, held[-1])
                )
            pending = [name for name in refitter.get_missing_weights() if name not in given]
        self._library.call("cannot refit an engine", refitter.refit_cuda_engine)

    def close(self) -> None:
        """Frees the engine, after its context."""
        self._context = None
        self._runtime_cache = None
        self._engine = None


class _RuntimeCache:
    """Kernels that TensorRT-RTX compiles for the device at their first run; stored beside the engine."""

    def __init__(self, engine: Any, strategy: Any, path: Path) -> None:
        self.config = engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(strategy)
        self._cache = self.config.create_runtime_cache()
        self._path: Path | None = path.with_suffix(".kernels")
        with suppress(OSError):
            if self._cache.deserialize(self._path.read_bytes()):  # else they are for another device or driver
                self._path = None
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the kernels after the first run. If that fails, they are compiled again next time."""
        if self._path is None:
            return
        path, self._path = self._path, None
        part = path.with_suffix(".kernels.part")
        try:
            part.write_bytes(memoryview(self._cache.serialize()))
            part.replace(path)
        except OSError:
            with suppress(OSError):  # such as on a read-only file system
                part.unlink()


def _weight_table(engine: Path) -> WeightTable:
    path = weight_table_path(engine)
    try:
        return WeightTable.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return WeightTable({})
    except (OSError, UnicodeDecodeError, ValidationError):
        raise BackendError("backend", f"{str(path)!r} cannot be read", "build the engines again") from None


def _weights(trt: Any, values: Any) -> Any:
    """`values` for a refitter, which does not copy them; uint16 holds bfloat16."""
    if values.dtype == "uint16":
        return trt.Weights(trt.DataType.BF16, values.ctypes.data, values.size)
    return trt.Weights(values)


def _dtype(trt: Any, kind: Any) -> str:
    """numpy's name of a type, or bfloat16."""
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT64: "int64",
        trt.DataType.INT32: "int32",
        trt.DataType.UINT8: "uint8",
        trt.DataType.BOOL: "bool",
    }
    return names.get(kind, str(kind))
