"""Runs a graph with tensors between its nodes as further outputs: the portable graph, and that of a backend."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ...runtime.backends import open_executor
from ...runtime.cpu.sessions import Array
from ...runtime.format.build_options import BuildOptions, Flags, options_of_engine
from ...runtime.format.bundle import Bundle
from ...runtime.format.checksums import clear_user_cache, sha256
from ...runtime.format.clip_layout import ClipSize
from ...runtime.format.engine_keys import EngineIndex
from ...runtime.format.engine_sets import EngineSet, engine_folders, write_index
from ...runtime.format.manifest import FileRecord, TensorRecord
from ...runtime.load_options import LoadOptions
from ..build import build
from ..check import run_portable
from ..comparison import measure
from .saved_results import link_or_copy

ONNX = ".onnx"
"""Suffix of engines that are graphs themselves."""
_OBSERVED = ".observed"


@dataclass(frozen=True, slots=True)
class Suspect:
    """The graph to look into: what it is fed, and how it runs.

    Attributes:
        bundle: the bundle.
        backend: runs the graph.
        precision: whose bounds hold for the graph.
        size: of the clips.
        engines: the backend's engines; None if it runs the portable graphs.
        graph: name of the graph.
        feeds: its inputs.
    """

    bundle: Bundle
    backend: str
    precision: str
    size: ClipSize
    engines: EngineSet | None
    graph: str
    feeds: Mapping[str, Array]

    def portable(self) -> ir.Model:
        """The portable graph, weights unread."""
        return ir.load(self.bundle.folder / self.bundle.graph(self.graph).path)

    def engine_path(self) -> Path | None:
        """The graph's engine; None if it runs as exported."""
        if self.engines is None or self.graph not in self.engines.index.engines:
            return None
        return self.engines.folder / self.engines.index.engines[self.graph].path


def tensor_errors(suspect: Suspect, marks: Sequence[str]) -> dict[str, float]:
    """The error of tensors between the nodes; without those that have another shape in the backend's graph.

    Args:
        suspect: the graph and what it is fed.
        marks: the names of the tensors.

    Raises:
        BackendError: the backend cannot run the graph with these outputs.
    """
    with tempfile.TemporaryDirectory(prefix="sparsectrl-lcm-") as text:
        folder = Path(text).resolve()
        try:
            expected, bundle = _marked_bundle(suspect, marks, folder)
            outputs = _run(suspect, bundle, _marked_engines(suspect, marks, bundle))
        finally:
            clear_user_cache(folder)
    actual = dict(zip([item.name for item in bundle.graph(suspect.graph).outputs], outputs, strict=True))
    pairs = {name: (actual[name + _OBSERVED], expected[name + _OBSERVED]) for name in marks}
    return {name: measure(*pair).largest for name, pair in pairs.items() if pair[0].shape == pair[1].shape}


def _run(suspect: Suspect, bundle: Bundle, precision: str) -> list[Array]:
    """Runs the graph of a marked bundle on the backend."""
    with ExitStack() as stack:
        executor = open_executor(bundle, suspect.backend, LoadOptions(precision=precision))
        stack.callback(executor.close)
        opened = executor.open_graph(suspect.graph, suspect.size)
        stack.callback(opened.close)
        return opened.run(suspect.feeds)


def _marked_bundle(suspect: Suspect, marks: Sequence[str], folder: Path) -> tuple[Mapping[str, Array], Bundle]:
    """A bundle of one graph with more outputs, and what it gives on ONNX Runtime."""
    record, path = suspect.bundle.graph(suspect.graph), suspect.engine_path()
    built_again = path is not None and path.suffix != ONNX
    for name in (*record.weights, suspect.bundle.manifest.tokenizer):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        place = shutil.copyfile if built_again else link_or_copy  # a build refuses weights with a second hard link
        place(suspect.bundle.folder / name, folder / name)
    model = suspect.portable()
    _mark(model, marks)
    ir.save(model, folder / record.path)  # its weights lie beside it
    (expected,) = run_portable(folder / record.path, dict(suspect.feeds))
    added = [
        TensorRecord(name=name + _OBSERVED, dtype="float32", shape=expected[name + _OBSERVED].shape) for name in marks
    ]
    record = record.model_copy(update={"outputs": (*record.outputs, *added)})
    manifest = suspect.bundle.manifest.model_copy(update={"graphs": {suspect.graph: record}})
    return expected, Bundle(folder, manifest)


def _marked_engines(suspect: Suspect, marks: Sequence[str], bundle: Bundle) -> str:
    """Adds the outputs to the engine, or builds it again with them; returns the precision to load."""
    path, engines = suspect.engine_path(), suspect.engines
    if path is None or engines is None:
        return "fp32"
    index, engine = engines.index, engines.index.engines[suspect.graph]
    if path.suffix != ONNX:
        build(bundle, suspect.backend, _build_options(engine.spec.flags, index))
        return index.precision
    folder = engine_folders(bundle.folder, suspect.backend)[0] / engines.folder.name
    folder.mkdir(parents=True)
    files = dict(engine.files)
    for name in files.keys() - {engine.path}:
        link_or_copy(engines.folder / name, folder / name)
    model = ir.load(path)
    _mark(model, marks)
    ir.save(model, folder / engine.path)
    files[engine.path] = FileRecord(sha256=sha256(folder / engine.path), bytes=(folder / engine.path).stat().st_size)
    marked = engine.model_copy(update={"files": files})
    write_index(folder, index.model_copy(update={"engines": {suspect.graph: marked}}))
    return index.precision


def _build_options(flags: Flags, index: EngineIndex) -> BuildOptions:
    """The options that an engine was built with, except that its weights cannot be replaced."""
    options = options_of_engine(index.precision, index.size, flags, index.keyframe_slots)
    if "workspace" in options:
        options["workspace"] = float(options["workspace"])
    if "compute_capabilities" in options:
        options["compute_capabilities"] = tuple(options["compute_capabilities"])
    return replace(BuildOptions(**options), check=False, refit=False, strip_weights=False)


def _mark(model: ir.Model, names: Sequence[str]) -> None:
    """Adds the negative of each tensor as an output.

    Not the tensor itself: OpenVINO 2026.4 cannot compile a convolution whose result is an output and is reshaped too.
    """
    values = {output.name: output for node in model.graph for output in node.outputs}
    for name in names:
        producer = values[name].producer()
        node = ir.node("Neg", [values[name]], name=f"{producer.name if producer else name}{_OBSERVED}")
        node.outputs[0].name = name + _OBSERVED
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
