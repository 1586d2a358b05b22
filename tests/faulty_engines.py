"""Small bundles, and faults that are put into their engines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from sparsectrl_lcm.engine.engine_writer import SetBuild, engine_record, write_set
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec, graph_checksums
from sparsectrl_lcm.runtime.format.engine_sets import EngineSet, find_set, write_index

SIZE = ClipSize(width=32, height=32, frames=2)
Edit = Callable[[ir.Graph], None]


def small_bundle(folder: Path) -> Path:
    """A copy of the demo bundle whose clips have two frames of 32x32."""
    shutil.copytree(demo_bundle(), folder, ignore=shutil.ignore_patterns("engines"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sizes"] |= dict(SIZE)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def copy_of(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.load(Path(shutil.copytree(bundle.folder, folder)))


def engines_of(bundle: Bundle, backend: str) -> EngineSet:
    engines = find_set(bundle.folder, backend, "fp32")
    assert engines is not None
    return engines


def change(engines: EngineSet, graph: str, edit: Edit) -> None:
    """Changes the ONNX file of an engine, and its checksum in the index."""
    path = engines.folder / engines.index.engines[graph].path
    model = ir.load(path)
    edit(model.graph)
    ir.save(model, path)
    record = engines.index.engines[graph]
    beside = [engines.folder / name for name in record.files if name != record.path]
    record = engine_record(path, record.spec, {}, *beside)
    write_index(engines.folder, engines.index.model_copy(update={"engines": {**engines.index.engines, graph: record}}))


def transpose(name: str) -> Edit:
    """Swaps height and width of a graph's input."""

    def edit(graph: ir.Graph) -> None:
        value = next(value for value in graph.inputs if value.name == name)
        users = list(value.uses())
        turned = ir.node("Transpose", [value], {"perm": [0, 1, 3, 2]}, name="turned")
        turned.outputs[0].name = "turned"
        graph.insert_before(graph[0], turned)
        for use in users:
            use.node.replace_input_with(use.idx, turned.outputs[0])

    return edit


def scale(name: str, factor: float) -> Edit:
    """Multiplies a weight."""

    def edit(graph: ir.Graph) -> None:
        weight = graph.initializers[name]
        assert weight.const_value is not None
        weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(factor), name=name)

    return edit


def write_plans(bundle: Bundle, backend: str, version: str, device: str) -> None:
    """Writes files that stand for plans of every graph."""

    def spec(graph: str) -> EngineSpec:
        return EngineSpec(
            graph=graph,
            graph_sha256=graph_checksums(bundle.manifest, graph),
            shapes={},
            precision="fp32",
            flags={},
            backend=backend,
            version=version,
            device=device,
        )

    def make(graph: str, folder: Path, report: object) -> EngineRecord:
        (folder / f"{graph}.engine").write_bytes(b"plan")
        return engine_record(folder / f"{graph}.engine", spec(graph), {})

    index = EngineIndex(backend=backend, precision="fp32", size=SIZE, engines={})
    write_set(bundle, SetBuild(index, list(bundle.manifest.graphs), spec, make), BuildOptions(), lambda *_: None)
