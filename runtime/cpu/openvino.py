"""OpenVINO: each graph is compiled for the sizes of a request and kept for the next request."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend_interface import Availability, any_machine, unbound_scope
from ..backends import BACKENDS
from ..errors import BackendError, first_line
from ..format.bundle import Bundle
from ..format.clip_layout import ONE_PROMPT, ClipLayout, ClipSize
from ..format.engine_sets import EngineSet, find_set, set_name
from ..format.manifest import FileRecord, GraphRecord, resolve_shape
from ..format.weights import check_files
from ..load_options import LoadOptions
from .compiled_cache import CompiledGraph, cache_folder, trim
from .executor import HostExecutor
from .graph_runs import RUNS
from .integer_products import multiplies_int8
from .openvino_compile import CHANGES, compiled_model, core
from .openvino_library import load_openvino
from .sessions import Array, split_feeds

BACKEND = "openvino"
CACHED_WITH_WEIGHTS = 256 * 1024**2
"""Up to this many bytes of a graph, the cache holds its weights, too. OpenVINO's own cache keeps larger graphs."""


class OpenVinoSessions:
    """OpenVINO on built engines or on the portable graphs.

    Args:
        bundle: the bundle.
        precision: bf16, fp32 or int8; None takes the first that was built and that the processor computes in.
        device: OpenVINO's name of a device, such as CPU, GPU or NPU.
        threads: threads on the CPU; None takes one per core.

    Raises:
        BackendError: OpenVINO or the device is missing, or the precision was not built.
    """

    backend = BACKEND

    def __init__(
        self, bundle: Bundle, precision: str | None = None, device: str = "CPU", threads: int | None = None
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._threads = threads
        check_device(device)
        self._engines = _choose(bundle, precision, device)
        self.precision = self._engines.index.precision if self._engines else "fp32"
        self._sessions: dict[str, OpenVinoSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Compiles a graph for these sizes. This replaces the one compiled for other sizes."""
        record, shapes = self._bundle.graph(graph), self._shapes(graph, dimensions)
        if graph in self._sessions and self._sessions[graph].shapes == shapes:
            return
        self._sessions.pop(graph, None)
        source = self._source(graph)
        options = compile_options(self._device, source.precision, self._threads)
        compiled = self._compiled(source, shapes)
        if compiled is None and (folder := cache_folder(BACKEND)) is not None:
            trim(folder)
            options |= {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE"}
        self._sessions[graph] = OpenVinoSession(source.path, record, shapes, self._device, options, compiled)

    def session(self, graph: str) -> "OpenVinoSession":
        """The session of an open graph."""
        return self._sessions[graph]

    def is_compiled(self, graph: str, dimensions: Mapping[str, int]) -> bool:
        """Whether the cache has a graph for these sizes."""
        compiled = self._compiled(self._source(graph), self._shapes(graph, dimensions))
        return compiled is not None and compiled.path.exists()

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()

    def _shapes(self, graph: str, dimensions: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of a graph's inputs."""
        sizes = {**dimensions, **ONE_PROMPT}
        return {item.name: resolve_shape(item.shape, sizes) for item in self._bundle.graph(graph).inputs}

    def _compiled(self, source: "_Source", shapes: Mapping[str, tuple[int, ...]]) -> CompiledGraph | None:
        """Where a compiled graph is kept; None if OpenVINO's own cache keeps it, or if none can be written."""
        if self._device != "CPU" or source.bytes > CACHED_WITH_WEIGHTS or (folder := cache_folder(BACKEND)) is None:
            return None
        trim(folder)
        return CompiledGraph(folder, _key(source, shapes, compile_options(self._device, source.precision)))

    def _source(self, graph: str) -> "_Source":
        """What a graph is compiled from."""
        if self._engines is not None and (engine := self._engines.index.engines.get(graph)):
            path = self._engines.open(self._bundle.manifest, graph, version())
            return _Source(path, self.precision, tuple(engine.files.values()))
        record = self._bundle.graph(graph)
        names = (record.path, *record.weights)
        check_files(self._bundle, names, "bundle")
        files = tuple(self._bundle.manifest.files[name] for name in names)
        return _Source(self._bundle.folder / record.path, "fp32", files)


@dataclass(frozen=True, slots=True)
class _Source:
    """An ONNX graph, its precision, and the records of its file and of its weights."""

    path: Path
    precision: str
    files: tuple[FileRecord, ...]

    @property
    def bytes(self) -> int:
        """The size of graph and weights."""
        return sum(file.bytes for file in self.files)


class OpenVinoSession:
    """One graph, compiled for one set of shapes.

    Args:
        path: an ONNX graph, portable or typed.
        record: its inputs and outputs.
        shapes: shapes of the inputs.
        device: OpenVINO's name of a device.
        options: from `compile_options`.
        compiled: where the compiled graph is kept; None keeps none.

    Raises:
        BackendError: OpenVINO cannot read or compile the graph.
    """

    def __init__(
        self,
        path: Path,
        record: GraphRecord,
        shapes: Mapping[str, tuple[int, ...]],
        device: str,
        options: dict[str, Any],
        compiled: CompiledGraph | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self._outputs = [item.name for item in record.outputs]
        try:
            model = compiled_model(path, shapes, device, options, compiled)
            self._request = model.create_infer_request()
        except (RuntimeError, load_openvino().exceptions.UserInputError) as error:
            raise BackendError("backend", f"OpenVINO cannot compile {path.name}: {_reason(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph, several prompts one by one; returns its outputs in order."""
        parts = [self._infer(part) for part in split_feeds(feeds, self.shapes)]
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _infer(self, feeds: Mapping[str, Array]) -> list[Array]:
        arrays = {
            name: np.ascontiguousarray(np.broadcast_to(array, self.shapes[name])) for name, array in feeds.items()
        }
        with RUNS.cancellable(self._request.cancel):
            try:
                self._run(arrays)
                return [np.array(self._request.get_tensor(name).data) for name in self._outputs]
            except RuntimeError as error:
                raise BackendError("backend", f"OpenVINO failed: {_reason(error)}") from error

    def _run(self, arrays: dict[str, Array]) -> None:
        """Runs as `infer` does, which cannot be cancelled on a single thread."""
        try:
            self._request.start_async(arrays, share_inputs=True)
            self._request.wait()
        except BaseException:  # also of a signal before the wait: the run reads the arrays until it has ended
            with suppress(RuntimeError):
                self._request.cancel()
                self._request.wait()
            raise


def version() -> str:
    """The version of OpenVINO.

    Raises:
        BackendError: it is not installed; the remedy is the command that installs it.
    """
    try:
        openvino = load_openvino()
    except ImportError as error:
        raise BackendError("backend", "OpenVINO is not installed", f"run: {BACKENDS[BACKEND].install}") from error
    return str(openvino.__version__).split("-", maxsplit=1)[0]


def check_device(device: str) -> None:
    """Raises BackendError if OpenVINO does not find the device here; the remedy lists those it finds."""
    version()
    devices = core().available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in devices}:
        raise BackendError("device", f"OpenVINO finds no {device!r} here", f"available are {', '.join(devices)}")


def capabilities(device: str = "CPU") -> list[str]:
    """The types that a device computes in, by OpenVINO's names: FP32, BF16, INT8, ..."""
    named = map(str, core().get_property(device, "OPTIMIZATION_CAPABILITIES"))  # also other features, such as WINOGRAD
    return [name for name in named if name[-1:].isdigit()]


def best_precision() -> str:
    """The fastest precision on this processor whose frames stay close to those of fp32."""
    return "bf16" if "BF16" in capabilities() else "fp32"


def computes_in(precision: str) -> bool:
    """Whether this precision may be chosen if the user names none: bf16 only if the processor computes in it."""
    return precision != "bf16" or best_precision() == precision


def find_version(name: str) -> str:
    """The version of OpenVINO."""
    return version()


check_machine = any_machine
engine_scope = unbound_scope


def open_executor(name: str, bundle: Bundle, options: LoadOptions) -> HostExecutor:
    """Opens a bundle on this backend."""
    sessions = OpenVinoSessions(bundle, options.precision, options.device or "CPU", options.threads)
    return HostExecutor(bundle, sessions, options.kept_bytes)


def is_compiled(bundle: Bundle, options: LoadOptions, size: ClipSize) -> bool:
    """Whether the cache has the UNet, which takes the longest, for clips of a size."""
    sessions = OpenVinoSessions(bundle, options.precision, options.device or "CPU")
    return sessions.is_compiled("unet", ClipLayout(bundle.manifest.sizes, size).dimensions("unet"))


def notes(found: Availability) -> Iterable[str]:
    """The types that OpenVINO computes in on this processor, and the precision that `build` takes."""
    if found.reason is not None:
        return
    summary = f"the processor computes in {', '.join(capabilities())}; build takes {best_precision()}"
    yield summary if multiplies_int8() else f"{summary}; int8 is no faster than fp32 without VNNI or AMX"


def compile_options(device: str, precision: str, threads: int | None = None) -> dict[str, Any]:
    """OpenVINO's options for the lowest latency of one request.

    Args:
        device: OpenVINO's name of a device.
        precision: precision of the graph. The CPU uses the types in a typed graph; other devices choose their own.
        threads: threads on the CPU; None takes one per core.
    """
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        options |= {"NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "dynamic"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if threads == 1:
            options["ENABLE_CPU_PINNING"] = False  # to the first core, which other processes would get as well
    return options


def _key(source: _Source, shapes: Mapping[str, tuple[int, ...]], options: dict[str, Any]) -> str:
    """A checksum of all that a compiled graph depends on. The number of threads is not among it."""
    from ..machine import instruction_sets

    processor = [str(core().get_property("CPU", "FULL_DEVICE_NAME")), *capabilities(), *sorted(instruction_sets())]
    files = [file.sha256 for file in source.files]
    facts = [CHANGES, load_openvino().__version__, processor, files, shapes, options]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _choose(bundle: Bundle, precision: str | None, device: str) -> EngineSet | None:
    """The engines to run; None for the portable graphs."""
    if device != "CPU":
        if precision not in (None, "fp32"):
            raise BackendError("precision", f"{precision!r} is only for OpenVINO's CPU", f"leave it out for {device!r}")
        return None
    if precision == "fp32" and not find_set(bundle.folder, BACKEND, set_name("fp32")):
        return None
    return BACKENDS[BACKEND].engine_set(bundle.folder, precision)


def _reason(error: BaseException) -> str:
    """The line of OpenVINO's message that names the cause; the first lines name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return causes[0] if causes else first_line(error)
