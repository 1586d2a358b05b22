"""Writes a complete set of engines, or nothing."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.errors import BackendError, reason_of
from ..runtime.format.bundle import Bundle
from ..runtime.format.checksums import sha256
from ..runtime.format.engine_keys import ANY_DEVICE, EngineIndex, EngineRecord, EngineSpec, graph_checksums
from ..runtime.format.engine_sets import set_name, writable_engine_folder, write_index
from ..runtime.format.manifest import FileRecord
from ..runtime.format.temporary_folders import clear_leftovers, staged_folder


@contextmanager
def staged(bundle: Path, index: EngineIndex) -> Iterator[Path]:
    """Yields a folder that replaces a set, with `index` in it, when the block ends. If the block fails, it is removed.

    Raises:
        BackendError: the folder cannot be written.
    """
    name = set_name(index.precision, index.size)
    try:
        parent = writable_engine_folder(bundle, index.backend)
        clear_leftovers(parent)
        with staged_folder(parent, name) as folder:
            yield folder
            write_index(folder, index)
            gc.collect()  # reference cycles keep weights mapped, and Windows cannot rename a folder with an open file
            replace_folder(folder, parent / name)
    except OSError as error:
        raise BackendError(
            "backend", f"the engines of {str(bundle)!r} cannot be written: {reason_of(error)}"
        ) from error


def replace_folder(source: Path, target: Path) -> None:
    """Moves `source` to `target` and deletes the old `target`."""
    if target.exists():
        old = source.with_name(f"{source.name}-old")
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
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
