"""Files of kernels: what the kernels of each engine compute and move, without TensorRT to read them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import engine_layout
from sparsectrl_lcm.runtime.format.decoders import DECODERS
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import find_set
from sparsectrl_lcm.runtime.format.layer_report import KernelGroup, LayerReport

COLUMNS = ("count", "operation", "precision", "flops", "head", "bytes")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of a set of engines.

    Attributes:
        label: what distinguishes these engines, such as fp16.
        size: width, height and frames, such as 512x512x16.
        decoder_runs: how often the decoder runs for a clip.
        graphs: the groups of equal kernels of each engine.
    """

    label: str
    size: str
    decoder_runs: int
    graphs: Mapping[str, tuple[KernelGroup, ...]]


def of_engines(folder: Path, backend: str, name: str) -> Kernels:
    """The kernels of a set of engines in a bundle, from the reports in their records.

    Raises:
        BackendError: there is no such set, or no engine of it has a report of its kernels.
    """
    bundle = Bundle.load(folder)
    engines = find_set(bundle.folder, backend, name)
    kernels = of_index(bundle, engines.index, name) if engines else None
    if kernels is None or not kernels.graphs:
        raise BackendError("engines", f"{backend}/{name} has no reports of kernels", "build the engines again")
    return kernels


def of_index(bundle: Bundle, index: EngineIndex, label: str) -> Kernels:
    """The kernels of a bundle's engines, as far as their records have reports."""
    reports = {graph: LayerReport.of(record.report) for graph, record in index.engines.items()}
    graphs = {graph: report.work for graph, report in reports.items() if report and report.work}
    size = index.size
    runs = engine_layout(bundle.manifest, size).decoder_runs(DECODERS["full"])
    return Kernels(label, f"{size.width}x{size.height}x{size.frames}", runs, graphs)


def write(path: Path, kernels: Kernels, head: dict[str, Any]) -> None:
    """Writes kernels as JSON, one group in a line. `head` has machine, versions and commit."""
    facts = head | {"label": kernels.label, "size": kernels.size, "decoder_runs": kernels.decoder_runs}
    facts["columns"] = COLUMNS
    lines = [json.dumps(facts, indent=1)[:-2] + ',\n "graphs": {']
    for place, (graph, groups) in enumerate(kernels.graphs.items()):
        rows = ",\n   ".join(json.dumps([getattr(group, name) for name in COLUMNS]) for group in groups)
        lines.append(f"{',' if place else ''}\n  {json.dumps(graph)}: [\n   {rows}\n  ]")
    path.write_text("".join(lines) + "\n }\n}\n", encoding="utf-8")


def read(path: Path) -> Kernels:
    """Reads a file of `write`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    graphs = {
        graph: tuple(KernelGroup(**dict(zip(found["columns"], row, strict=True))) for row in rows)
        for graph, rows in found["graphs"].items()
    }
    return Kernels(found["label"], found["size"], found["decoder_runs"], graphs)
