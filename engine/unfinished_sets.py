"""Keeps the finished engines of a build that was stopped, so that the next build goes on with the missing ones.

A build writes into a hidden folder beside the sets. After each engine it updates a list there of the finished ones.
If the build ends early, even by SIGKILL, the folder stays; it has no index of a set, so that nothing loads from it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..runtime.format.checksums import first_difference
from ..runtime.format.engine_keys import EngineRecord, EngineSpec
from ..runtime.format.engine_sets import EngineSet, engine_folders
from ..runtime.format.temporary_folders import leftovers

FINISHED = "finished.json"


_LIST = TypeAdapter(dict[str, EngineRecord])


def fingerprint(spec: EngineSpec, made_with: Mapping[str, object]) -> str:
    """SHA-256 over an engine's key and what else a build of it depends on, such as whether it was checked.

    An engine serves only a build with the same fingerprint.
    """
    return hashlib.sha256(json.dumps([spec.key(), made_with], sort_keys=True).encode()).hexdigest()


def read_finished(folder: Path) -> dict[str, EngineRecord]:
    """The finished engines in the folder of a build whose files are all there, by graph; empty if there are none."""
    try:
        found = _LIST.validate_json((folder / FINISHED).read_bytes())
    except (OSError, ValidationError):
        return {}
    return {graph: engine for graph, engine in found.items() if all((folder / name).is_file() for name in engine.files)}


def write_finished(folder: Path, engines: Mapping[str, EngineRecord]) -> None:
    """Replaces the list of finished engines in the folder of a build at once."""
    part = folder / f"{FINISHED}.part"
    part.write_bytes(_LIST.dump_json(dict(engines)))
    part.replace(folder / FINISHED)


def keep_finished(folder: Path) -> bool:
    """Removes all but the finished engines from the folder of a build; returns whether there are any."""
    engines = read_finished(folder)
    for path in folder.glob("*") if engines else ():
        if path.name.partition(".")[0] not in engines and path.name != FINISHED:
            with suppress(OSError):
                path.unlink()
    return bool(engines)


def take_finished(parent: Path, name: str, folder: Path, wanted: Mapping[str, str]) -> dict[str, EngineRecord]:
    """Moves the finished engines of stopped builds of a set into the folder of a new one, and lists them there.

    In the old folders it leaves only engines with other fingerprints. It removes folders without any.

    Args:
        parent: the folder of the backend's sets.
        name: of the set.
        folder: of the new build.
        wanted: the fingerprint of each graph's engine.

    Returns:
        The moved engines by graph.
    """
    taken: dict[str, EngineRecord] = {}
    for left in leftovers(parent, name):
        others: dict[str, EngineRecord] = {}
        for graph, engine in read_finished(left).items():
            if engine.made_from != wanted.get(graph):
                others[graph] = engine
            elif graph not in taken and not first_difference(left, engine.files):
                taken[graph] = engine
                write_finished(folder, taken)  # first: only the folder that has the files counts
                for path in left.glob(f"{graph}.*"):
                    path.rename(folder / path.name)
        if others:
            write_finished(left, others)
            keep_finished(left)
        else:
            shutil.rmtree(left, ignore_errors=True)
    return taken


def copy_engine(engines: EngineSet, graph: str, folder: Path) -> EngineRecord:
    """Copies a graph's engine of a complete set into the folder of a build.

    Hard links would save the copy, but onnx_ir refuses weights that have several, and a killed build may leave both.
    """
    record = engines.index.engines[graph]
    for path in engines.folder.glob(f"{graph}.*"):
        shutil.copy2(path, folder / path.name)
    return record


def unfinished_sets(bundle: Path, backend: str) -> Iterator[tuple[str, list[str], int]]:
    """What stopped builds have left: the name of the set, the finished graphs and the bytes of their engines."""
    for parent in engine_folders(bundle, backend):
        with suppress(OSError):
            for folder in leftovers(parent):
                if engines := read_finished(folder):
                    files = (file for engine in engines.values() for file in engine.files.values())
                    yield folder.name[1:].rsplit("-", 2)[0], list(engines), sum(file.bytes for file in files)
