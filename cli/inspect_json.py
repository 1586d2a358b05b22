"""What `inspect --json` prints."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.format.bundle import Bundle
    from ..runtime.format.engine_sets import EngineSet


def bundle_facts(bundle: "Bundle") -> dict[str, Any]:
    """A bundle, its graphs and its engines, as values of JSON. Names are those of the manifest; sizes are bytes."""
    from ..engine.unfinished_sets import unfinished_sets
    from ..runtime.backends import BACKENDS

    manifest = bundle.manifest
    facts = manifest.model_dump(mode="json", exclude={"format", "tokenizer", "graphs", "files"})
    return facts | {
        "bundle": str(bundle.folder),
        "controlnets": list(manifest.controlnets),
        "decoders": list(manifest.decoders),
        "graphs": {
            name: {
                "weights": sum(manifest.files[file].bytes for file in graph.weights),
                "inputs": [item.name for item in graph.inputs],
                "outputs": [item.name for item in graph.outputs],
                "max_error": graph.max_error,
                "unit": "levels" if graph.outputs[0].dtype == "uint8" else "relative",
            }
            for name, graph in manifest.graphs.items()
        },
        "engines": list(_engine_sets(bundle)),
        "unfinished": [
            {"backend": backend, "set": name, "graphs": list(graphs), "bytes": size}
            for backend in BACKENDS
            for name, graphs, size in unfinished_sets(bundle.folder, backend)
        ],
    }


def _engine_sets(bundle: "Bundle") -> Iterator[dict[str, Any]]:
    from ..runtime.backends import BACKENDS
    from ..runtime.errors import BackendError
    from ..runtime.format.engine_sets import find_set, set_names

    for backend in BACKENDS:
        for name in set_names(bundle.folder, backend):
            facts: dict[str, Any] = {"backend": backend, "set": name}
            try:
                found = find_set(bundle.folder, backend, name)
            except BackendError as error:
                yield facts | {"error": str(error)}
                continue
            if found is not None:
                yield facts | _engines(bundle, found)


def _engines(bundle: "Bundle", engines: "EngineSet") -> dict[str, Any]:
    graphs = bundle.manifest.graphs
    return {
        "folder": str(engines.folder),
        "keyframe_slots": engines.index.keyframe_slots,
        "engines": {
            graph: {
                "key": record.key,
                "bytes": sum(file.bytes for file in record.files.values()),
                "version": record.spec.version,
                "device": record.spec.device,
                "report": record.report,
                "fault": engines.fault(bundle.manifest, graph) if graph in graphs else None,
            }
            for graph, record in engines.index.engines.items()
        },
    }
