"""A fake TensorRT that parses, builds and loads. Its plans are JSON with the parsed graph and the configuration."""

import gc
import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import onnx_ir as ir
import pytest
from fakes.tensorrt_fakes import FakeModule, fake_tensorrt
from sparsectrl_lcm.engine.tensorrt.builder import build
from sparsectrl_lcm.engine.unfinished_sets import read_finished
from sparsectrl_lcm.runtime.format.build_options import BuildOptions, OnBuildProgress
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import set_name
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.gpu.tensorrt_library import Library, open_library

RELEASES = {"10.16": "tensorrt", "11.4": "tensorrt", "rtx-1.7": "tensorrt-rtx"}
TENSORRT = [release for release, backend in RELEASES.items() if backend == "tensorrt"]
H200 = Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05")
RTX_4090 = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, "580.95.05")
SIZE = ClipSize(width=64, height=64, frames=4)
ACTIVATION_BYTES = 4096
_ROWS = {"Dimensions": [2, 8], "Format/Datatype": "Row major linear FP16 format"}
LAYERS = [
    {"Name": "stem", "LayerType": "CaskConvolution", "Inputs": [_ROWS], "Outputs": [_ROWS]},
    {"Name": "head", "LayerType": "gemm", "Inputs": [_ROWS], "Outputs": [_ROWS]},
]
"""The inspector's layers of every engine of `tensorrt`."""
BYTES_MOVED = 2 * 2 * 2 * 8 * 2
_ROW = "{ Name: x, Dimensions: [2,8], Strides: [8,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major }"
LAYER_LOG = "Layers:\n" + "".join(
    f"Name: {layer['Name']}, LayerType: {layer['LayerType']}, Inputs: [ {_ROW}], Constants: [], Outputs: [ {_ROW}], "
    f"TacticName: x, StreamId: 0, Metadata: [ONNX Layer: {layer['Name']}]\n"
    for layer in LAYERS
)
"""What the builder of `tensorrt-rtx` logs: the same layers."""

Event = tuple[str, tuple[Any, ...]]
"""A method of a progress monitor, and its arguments."""


def start(name: str, parent: str | None, count: int) -> Event:
    """Returns the event that starts a phase."""
    return "phase_start", (name, parent, count)


def steps(name: str, *places: int) -> list[Event]:
    """Returns the events of some steps of a phase."""
    return [("step_complete", (name, place)) for place in places]


def finish(name: str) -> Event:
    """Returns the event that ends a phase."""
    return "phase_finish", (name,)


def phase(name: str, parent: str, count: int) -> list[Event]:
    """Returns the events of a phase with all its steps."""
    return [start(name, parent, count), *steps(name, *range(count)), finish(name)]


def report(monitor: Any, events: Iterable[Event]) -> bool:
    """Sends events to a progress monitor until it stops the build; returns False if it did."""
    return all(getattr(monitor, method)(*values) is not False for method, values in events)


_ENGINE, _SUBGRAPH, _COSTS = "Building engine", "Building engine from subgraph", "Computing profile costs"
_TACTICS, _REFORMATS, _REFIT = "Timing tactics", "Timing tensor reformats", "Determining refit engines"
PHASES = (
    start(_ENGINE, None, 6),
    *phase("Cloning network graph", _ENGINE, 194),
    *steps(_ENGINE, 0, 1),
    *phase("Preparing graph for optimization", _ENGINE, 4),
    *steps(_ENGINE, 2, 3),
    start(_SUBGRAPH, _ENGINE, 1),
    *phase("Optimizing graph", _SUBGRAPH, 30),
    start(_COSTS, _SUBGRAPH, 5),
    start(_TACTICS, _COSTS, 3),
    *phase("Timing graph nodes", _TACTICS, 9),
    *steps(_TACTICS, 0),
    start(_REFORMATS, _TACTICS, 2),
    *phase("Computing reformatting costs", _REFORMATS, 1),
    *steps(_REFORMATS, 0, 1),
    finish(_REFORMATS),
    *steps(_TACTICS, 1),
    finish(_TACTICS),
    *steps(_COSTS, 0, 1, 2),
    start(_REFIT, _COSTS, 1),
    *steps(_REFIT, 0),
    *steps(_COSTS, 3, 4),
    finish(_REFIT),
    finish(_COSTS),
    *steps(_SUBGRAPH, 0),
    finish(_SUBGRAPH),
    *steps(_ENGINE, 4),
    finish(_ENGINE),
)
"""The events of TensorRT-RTX 1.7 for a small graph: some phases share a step of their parent, some steps have none."""

_TYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64", "UINT8": "UINT8"}
"""TensorRT's names for ONNX's types."""
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


def fake(release: str) -> FakeModule:
    """Creates a fake; skips the test if the package it is made from is not installed."""
    try:
        return fake_tensorrt(release)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def demo_copy(folder: Path) -> Path:
    """Copies the demo bundle to a place where tests may write."""
    return Path(shutil.copytree(demo_bundle(), folder / "bundle"))


def small_copy(folder: Path, *others: str, decoder: str = "vae_decoder_tiny") -> Path:
    """Writes a bundle that builds fast: a decoder is its UNet, too, and the only other graphs are small or `others`."""
    bundle, manifest = folder / "bundle", read_manifest(demo_bundle())
    graphs = {name: manifest.graphs[name] for name in ("text_encoder", "unet", "lcm_update", "vae_decoder", *others)}
    graphs["unet"] = graphs["vae_decoder"] = manifest.graphs[decoder]
    needed = {manifest.tokenizer}.union(*((graph.path, *graph.weights) for graph in graphs.values()))
    for name in needed:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo_bundle() / name, bundle / name)
    files = {name: record for name, record in manifest.files.items() if name in needed}
    manifest.model_copy(update={"graphs": graphs, "files": files}).write(bundle)
    return bundle


def plan_of(engine: Path) -> dict[str, Any]:
    """Reads the plan in an engine file of `Workshop.build`."""
    plan: dict[str, Any] = json.loads(engine.read_bytes())
    return plan


class Workshop:
    """One release of TensorRT, as one process sees it.

    Attributes:
        release: a key of `RELEASES`.
        trt: the fake; tests replace its answers to make calls fail.
        library: the fake in the form that product code takes.
        version: the version that the fake reports.
    """

    def __init__(self, release: str, version: str | None = None) -> None:
        self.release = release
        self.trt = fake(release)
        if version is not None:
            self.trt.__version__ = version
        self.backend = RELEASES[release]
        self.library: Library = open_library(self.backend, self.trt)
        self.version = self.library.version
        self._graph = ""
        self._model: ir.Model | None = None
        self._inputs: list[Any] = []
        self._marked: list[str] = []  # weights of the last parsed network
        self._flags: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # of configurations
        self._caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of configurations
        self._measured: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()  # in timing caches
        self._given: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # weights of refitters
        self._plans: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # of engines
        self._answer_the_builder()
        self._answer_the_runtime()

    def build(
        self,
        bundle: Path,
        size: ClipSize = SIZE,
        device: Device | None = H200,
        on_progress: OnBuildProgress = lambda text, fraction: None,
        **options: Any,
    ) -> EngineIndex:
        """Calls the product's `build` without the comparison with fp32."""
        given = BuildOptions(width=size.width, height=size.height, frames=size.frames, check=False, **options)
        with patch.object(gc, "collect"):  # it takes longer than a build of demo weights
            return build(Bundle.load(bundle), self.backend, given, on_progress, self.library, device)

    def folder(self, bundle: Path, precision: str = "fp16", size: ClipSize = SIZE) -> Path:
        """Returns the folder of a set of engines."""
        return bundle / "engines" / self.backend / set_name(precision, size)

    def left(self, bundle: Path) -> tuple[list[str], str | None]:
        """Returns the names in the backend's folder except the timing cache, and that cache's content or None.

        A folder with finished engines of a stopped build appears as `unfinished: ` and their graphs.
        """
        folder = bundle / "engines" / self.backend
        names = sorted(
            f"unfinished: {', '.join(read_finished(path))}" if read_finished(path) else path.name
            for path in folder.iterdir()
        )
        caches = [name for name in names if name.startswith("timing-") and name.endswith(".cache")]
        assert len(caches) <= 1
        known = (bundle / "engines" / self.backend / caches[0]).read_text() if caches else None
        return [name for name in names if name not in caches], known

    def timings(self, *graphs: str) -> str | None:
        """Returns the content of the timing cache after builds of these graphs, successful or not."""
        return "".join(f"{graph};" for graph in graphs) if self.backend == "tensorrt" else None

    def measure(self, config: Any) -> None:
        """Adds the measurements of the parsed graph's build to the configuration's timing cache."""
        if (cache := self._caches.get(config)) is not None:
            self._measured[cache] += f"{self._graph};".encode()

    def complain(self, text: str) -> None:
        """Logs an error, as TensorRT does before it returns None or False."""
        self.library.logger.log(self.trt.ILogger.Severity.ERROR, text)

    def calls(self, *names: str) -> list[tuple[Any, ...]]:
        """Returns the arguments of all calls with these names, in order."""
        return [(*args, *kwargs.values()) for name, args, kwargs in self.trt.calls if name in names]

    def fail(self, name: str, complaint: str, result: Any = None) -> None:
        """Makes `name` log an error and return `result` from now on."""

        def answer(*_: Any) -> Any:
            self.complain(complaint)
            return result

        self.trt.answers[name] = answer

    def _answer_the_builder(self) -> None:
        answers = self.trt.answers
        answers["OnnxParser.parse_from_file"] = self._parse
        answers["INetworkDefinition.num_inputs"] = lambda _: len(self._inputs)
        answers["INetworkDefinition.get_input"] = lambda _, index: self._inputs[index]
        answers["INetworkDefinition.mark_weights_refittable"] = self._mark
        answers["IBuilderConfig.set_flag"] = lambda config, flag: self._flags_of(config).add(flag.name)
        answers["IBuilderConfig.clear_flag"] = lambda config, flag: self._flags_of(config).discard(flag.name)
        answers["Builder.build_serialized_network"] = self._build
        answers["IBuilderConfig.create_timing_cache"] = self._create_timing_cache
        answers["IBuilderConfig.set_timing_cache"] = self._set_timing_cache
        answers["IBuilderConfig.get_timing_cache"] = self._caches.get
        answers["ITimingCache.serialize"] = lambda cache: self._measured[cache]

    def _answer_the_runtime(self) -> None:
        answers = self.trt.answers
        answers["Runtime.deserialize_cuda_engine"] = self._load
        answers["ICudaEngine.get_tensor_name"] = lambda engine, index: list(self._plans[engine]["types"])[index]
        answers["ICudaEngine.get_tensor_dtype"] = lambda engine, name: getattr(
            self.trt.DataType, self._plans[engine]["types"][name]
        )
        answers["EngineInspector.get_engine_information"] = lambda *_: json.dumps({"Layers": LAYERS})
        answers["Refitter.get_all_weights"] = lambda _: list(self._refitted["refittable"])
        answers["Refitter.get_missing_weights"] = self._missing
        answers["Refitter.set_named_weights"] = self._give
        answers["IRuntimeCache.serialize"] = lambda _: b"kernels"

    @property
    def _refitted(self) -> dict[str, Any]:
        """The plan of the last refitter's engine."""
        return self._plans[self.calls("Refitter")[-1][0]]

    def _give(self, refitter: Any, name: str, _: Any) -> bool:
        self._given.setdefault(refitter, set()).add(name)
        return name in self._refitted["refittable"]

    def _missing(self, refitter: Any) -> list[str]:
        """Returns the weights that a stripped engine still lacks."""
        plan, given = self._refitted, self._given.get(refitter, set())
        return [name for name in plan["refittable"] if "STRIP_PLAN" in plan["flags"] and name not in given]

    def _flags_of(self, config: Any) -> set[str]:
        return self._flags.setdefault(config, {"TF32"})

    def _parse(self, _: Any, path: str) -> bool:
        self._graph, self._model = Path(path).stem, ir.load(path)
        self._inputs = [self.trt.new("ITensor", name=value.name) for value in self._model.graph.inputs]
        self._marked = []
        return True

    def _mark(self, _: Any, name: str) -> bool:
        assert self._model is not None, "names are known only after the graph is parsed"
        if known := name in self._model.graph.initializers:
            self._marked.append(name)
        return known

    def _build(self, _: Any, __: Any, config: Any) -> bytes | None:
        assert self._model is not None
        self.measure(config)
        if not report(config.progress_monitor, PHASES):
            return self.complain("the build was canceled")
        if self.backend == "tensorrt-rtx":
            self.library.logger.log(self.trt.ILogger.Severity.VERBOSE, LAYER_LOG)
        graph = self._model.graph
        plan = {
            "version": self.version,
            "graph": self._graph,
            "flags": sorted(self._flags_of(config)),
            "shapes": {tensor.name: tuple(tensor.shape) for tensor in self._inputs},
            "types": {value.name: _TYPES[value.dtype.name] for value in (*graph.inputs, *graph.outputs)},
            "weights": _checkpoint_weights(graph.initializers.values()),
            "refittable": self._marked,
            "decomposable": ["TRT_decomposable" in node.attributes for node in graph if node.op_type == "Attention"],
        }
        return json.dumps(plan).encode()

    def _create_timing_cache(self, _: Any, known: bytes) -> Any:
        cache = self.trt.new("ITimingCache")
        self._measured[cache] = bytes(known)
        return cache

    def _set_timing_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._caches[config] = cache
        return True

    def _load(self, _: Any, plan: Any) -> Any:
        """Loads a plan; refuses other versions, and host code unless allowed, as TensorRT does."""
        read = json.loads(bytes(plan))
        movable = "VERSION_COMPATIBLE" in read["flags"]
        if movable and not self._host_code_allowed():
            return self.complain("the engine contains host code, which is not allowed")
        if not movable and read["version"] != self.version:
            return self.complain(f"the engine is of version {read['version']}")
        engine = self.trt.new(
            "ICudaEngine",
            name=read["graph"],
            num_io_tensors=len(read["types"]),
            device_memory_size_v2=ACTIVATION_BYTES,
            refittable="REFIT_INDIVIDUAL" in read["flags"],
        )
        self._plans[engine] = read
        return engine

    def _host_code_allowed(self) -> bool:
        """Returns whether the last created runtime may run an engine's host code; False by default."""
        allowed = False
        for name, args, _ in self.trt.calls:
            if name in ("Runtime", "Runtime.engine_host_code_allowed="):
                allowed = name != "Runtime" and args[0]
        return allowed


def _checkpoint_weights(values: Iterable[ir.Value]) -> dict[str, int]:
    """Returns the CRC-32 of each weight with a checkpoint name; the other constants are folded."""
    named = {value.name or "": value.const_value for value in values}
    return {
        name: zlib.crc32(tensor.tobytes())
        for name, tensor in named.items()
        if tensor is not None and "." in name and not name.endswith(".float") and tensor.dtype.name in _FLOATS
    }
