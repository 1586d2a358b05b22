"""Engines after a bundle got other weights: those that can be refitted stay, the others are stale."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import BackendError
from .build_options import build_command, options_of_engine
from .engine_keys import EngineIndex, EngineRecord, graph_checksums
from .engine_sets import EngineSet, find_set, set_names, write_index
from .manifest import Manifest


def keep_refittable(bundle: Path, before: Manifest, now: Manifest, backends: Iterable[str]) -> Iterator[str]:
    """Binds the engines that can be refitted to the new weights of a bundle; they get these when they are loaded.

    Args:
        bundle: the bundle's folder.
        before: the manifest that it had with the old weights.
        now: its manifest.
        backends: names of the backends whose engines to look at.

    Yields:
        A line for each set of engines that the old weights concern: what becomes of it, or how to build it again.
    """
    for backend in backends:
        for name in set_names(bundle, backend):
            with suppress(BackendError):  # its index cannot be read
                engines = find_set(bundle, backend, name)
                if engines is not None and (line := _keep(engines, before, now)):
                    yield f"{backend} engines {name}: {line}"


def _keep(engines: EngineSet, before: Manifest, now: Manifest) -> str | None:
    """Returns what becomes of a set; None if its engines do not depend on weights that have changed."""
    index = engines.index
    changed = {
        graph: record
        for graph, record in index.engines.items()
        if graph in before.graphs
        and record.spec.graph_sha256 == graph_checksums(before, graph) != graph_checksums(now, graph)
    }
    if not changed:
        return None
    kept = {graph: _rebound(record, now) for graph, record in changed.items() if can_refit(record)}
    if kept:
        write_index(engines.folder, index.model_copy(update={"engines": index.engines | kept}))
    if len(kept) == len(changed):
        return "they get the new weights when they are loaded"
    return f"stale; run: {_command(engines, index, next(graph for graph in changed if graph not in kept))}"


def can_refit(record: EngineRecord) -> bool:
    """Whether the weights of an engine can be replaced."""
    return bool(record.spec.flags.get("refit") or record.spec.flags.get("strip_weights"))


def _rebound(record: EngineRecord, manifest: Manifest) -> EngineRecord:
    """Returns the record of an engine that reads its weights from the bundle when it is loaded."""
    spec = record.spec.model_copy(update={"graph_sha256": graph_checksums(manifest, record.spec.graph)})
    return record.model_copy(update={"spec": spec, "key": spec.key(), "refit_at_load": True, "made_from": None})


def _command(engines: EngineSet, index: EngineIndex, graph: str) -> str:
    options = options_of_engine(index.precision, index.size, index.engines[graph].spec.flags)
    return build_command(engines.bundle, index.backend, options)
