"""A set of engines is written whole or not at all."""

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
    """A folder that takes the place of a set when the block ends, with `index` in it; gone where the block fails.

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
            gc.collect()  # mapped weights hang in cycles, and Windows renames no folder with an open file in it
            replace_folder(folder, parent / name)
    except OSError as error:
        raise BackendError(
            "backend", f"the engines of {str(bundle)!r} cannot be written: {reason_of(error)}"
        ) from error


def replace_folder(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`; what stood there goes."""
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
    """What an engine depends on that takes any size and runs on any device.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: what is to run the engine.
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
    """The record of an engine that was written to `path`, with the files that lie beside it."""
    files = {file.name: FileRecord(sha256=sha256(file), bytes=file.stat().st_size) for file in (path, *beside)}
    return EngineRecord(key=spec.key(), spec=spec, path=path.name, files=files, report=report)
