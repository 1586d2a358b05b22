"""Writes a complete set of engines. A build that is stopped keeps its finished engines for the next one."""

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.errors import BackendError, InvalidRequest, reason_of
from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.checksums import first_difference, sha256
from ..runtime.format.engine_keys import ANY_DEVICE, EngineIndex, EngineRecord, EngineSpec, graph_checksums
from ..runtime.format.engine_sets import find_set, set_name, writable_engine_folder, write_index
from ..runtime.format.manifest import FileRecord
from ..runtime.format.temporary_folders import clear_leftovers, staged_folder
from .unfinished_sets import (
    FINISHED,
    copy_engine,
    fingerprint,
    keep_finished,
    take_finished,
    write_finished,
)


@dataclass(frozen=True, slots=True)
class SetBuild:
    """How a backend builds a set.

    Attributes:
        index: of the set, without engines.
        graphs: the graphs that get an engine, in the order of the build.
        spec: gives the spec of a graph's engine.
        make: builds a graph's engine in a folder; returns its record. It reports progress as a text and a fraction.
        made_with: what the engines depend on besides their specs and whether they are checked, as JSON values.
    """

    index: EngineIndex
    graphs: Sequence[str]
    spec: Callable[[str], EngineSpec]
    make: Callable[[str, Path, OnBuildProgress], EngineRecord]
    made_with: Mapping[str, object] = field(default_factory=dict)


def write_set(bundle: Bundle, build: SetBuild, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Builds the engines of a set that a stopped build has not finished; then the set replaces that of the same name.

    With `options.graphs` it builds those alone. The others come from a stopped build or from the set that is to be
    replaced, if they were built with the same options.

    Returns:
        The index. If it misses engines, they are named in `missing`, and the set is not replaced: the finished engines
        are kept for the next build.

    Raises:
        InvalidRequest: a graph of `options.graphs` has no engine.
        BackendError: the engines cannot be written.
    """
    check_graphs(build, options)
    name = set_name(build.index.precision, build.index.size)
    try:
        parent = writable_engine_folder(bundle.folder, build.index.backend)
        clear_leftovers(parent, keep=keep_finished)
        with staged_folder(parent, name, keep_finished) as folder:
            engines = _finish(bundle, build, options, on_progress, folder)
            missing = tuple(graph for graph in build.graphs if graph not in engines)
            found = {graph: engines[graph] for graph in build.graphs if graph in engines}
            index = build.index.model_copy(update={"engines": found, "missing": missing})
            if not missing:
                _publish(folder, parent / name, index)
        if not missing:
            clear_leftovers(parent, name)
    except OSError as error:
        raise BackendError(
            "backend", f"the engines of {str(bundle.folder)!r} cannot be written: {reason_of(error)}"
        ) from error
    return index


def check_graphs(build: SetBuild, options: BuildOptions) -> None:
    """Raises InvalidRequest if a graph of the options gets no engine."""
    if unknown := [graph for graph in options.graphs if graph not in build.graphs]:
        backend = build.index.backend
        raise InvalidRequest(
            "graphs", f"{backend} builds no {unknown[0]!r} of this bundle", f"allowed are {', '.join(build.graphs)}"
        )


def _finish(
    bundle: Bundle, build: SetBuild, options: BuildOptions, on_progress: OnBuildProgress, folder: Path
) -> dict[str, EngineRecord]:
    """Gathers the finished engines of a set in `folder` and builds the missing ones; returns their records."""
    name = set_name(build.index.precision, build.index.size)
    made_with = {"check": options.check, "keep_source": options.keep_source, **build.made_with}
    prints = {graph: fingerprint(build.spec(graph), made_with) for graph in build.graphs}
    records = take_finished(folder.parent, name, folder, prints)
    wanted = [graph for graph in build.graphs if not options.graphs or graph in options.graphs]
    for done, graph in enumerate(wanted):

        def report(what: str, fraction: float, graph: str = graph, done: int = done) -> None:
            on_progress(f"{graph} ({done + 1}/{len(wanted)}): {what}", (done + fraction) / len(wanted))

        if graph in records:
            report("finished by an earlier build", 0.0)
            continue
        records[graph] = build.make(graph, folder, report).model_copy(update={"made_from": prints[graph]})
        write_finished(folder, records)
    others = {graph: prints[graph] for graph in build.graphs if graph not in records}
    return records | _from_the_set(bundle, build.index, folder, others)


def _from_the_set(bundle: Bundle, index: EngineIndex, folder: Path, prints: dict[str, str]) -> dict[str, EngineRecord]:
    """Takes the engines with these fingerprints, by graph, from the existing set, if it has all of them."""
    engines = None
    with suppress(BackendError):  # its index cannot be read
        engines = find_set(bundle.folder, index.backend, set_name(index.precision, index.size)) if prints else None
    if engines is None:
        return {}
    for graph, made_from in prints.items():
        record = engines.index.engines.get(graph)
        if record is None or record.made_from != made_from or first_difference(engines.folder, record.files):
            return {}
    return {graph: copy_engine(engines, graph, folder) for graph in prints}


def _publish(folder: Path, target: Path, index: EngineIndex) -> None:
    """Moves the folder of a build to the place of its set."""
    write_index(folder, index)
    gc.collect()  # reference cycles keep weights mapped, and Windows cannot rename a folder with an open file
    replace_folder(folder, target)
    (target / FINISHED).unlink(missing_ok=True)  # last: until here a stopped build can be finished


def replace_folder(source: Path, target: Path) -> None:
    """Moves `source` to `target` and deletes the old `target`. If it is stopped before, the old `target` stays."""
    if target.exists():
        old = source.with_name(f"{source.name}-old")
        try:
            target.rename(old)
            source.rename(target)
        except BaseException:  # Ctrl-C may come between the two, or just after either
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)


def any_size_spec(bundle: Bundle, graph: str, backend: str, precision: str, version: str) -> EngineSpec:
    """Returns the spec of an engine that takes any size and runs on any device.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: runs the engine.
        precision: of the engine.
        version: of the backend.
    """
    return EngineSpec(
        graph=graph,
        graph_sha256=graph_checksums(bundle.manifest, graph),
        shapes={},
        precision=precision,
        flags={},
        backend=backend,
        version=version,
        device=ANY_DEVICE,
    )


def engine_record(path: Path, spec: EngineSpec, report: dict[str, Any], *beside: Path) -> EngineRecord:
    """Returns the record of the engine file `path` and the files beside it."""
    files = {file.name: FileRecord(sha256=sha256(file), bytes=file.stat().st_size) for file in (path, *beside)}
    return EngineRecord(key=spec.key(), spec=spec, path=path.name, files=files, report=report)
