"""Engines beside a bundle's portable graphs: where they lie, and the key without which none is loaded."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .bundle import user_cache
from .errors import BackendError
from .manifest import Manifest

INDEX = "engines.json"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine of a graph."""

    path: Path
    key: str


def engine_key(manifest: Manifest, graph: str, backend: str, version: str) -> str:
    """SHA-256 over the graph with its external data, and the backend's name and version."""
    record = manifest.graphs[graph]
    files = [manifest.files[name].sha256 for name in (record.path, *record.weights)]
    return hashlib.sha256(json.dumps([files, backend, version]).encode()).hexdigest()


def engine_folders(bundle: Path, backend: str) -> tuple[Path, Path]:
    """Where engines may lie: in the bundle, or, where that is read-only, in the user's cache folder."""
    return bundle / "engines" / backend, user_cache(bundle, "engines") / backend


def writable_engine_folder(bundle: Path, backend: str) -> Path:
    """The first of `engine_folders` that can be written; it is made."""
    inside, outside = engine_folders(bundle, backend)
    try:
        inside.mkdir(parents=True, exist_ok=True)
        writable = os.access(inside, os.W_OK)
    except OSError:
        writable = False
    folder = inside if writable else outside
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_index(folder: Path, keys: dict[str, str]) -> None:
    """Writes which engines lie in `folder`: the key and checksum of each graph's `<graph>.onnx`."""
    entries = {
        graph: {"key": key, "sha256": hashlib.sha256((folder / f"{graph}.onnx").read_bytes()).hexdigest()}
        for graph, key in keys.items()
    }
    part = folder / f"{INDEX}.part"
    part.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / INDEX)


def find_engine(bundle: Path, manifest: Manifest, graph: str, backend: str, version: str) -> Engine | None:
    """The engine of a graph, or None where none was built.

    Raises:
        BackendError: it was built for another bundle, or by another version of the backend, or is damaged.
    """
    for folder in engine_folders(bundle, backend):
        try:
            entry = json.loads((folder / INDEX).read_text(encoding="utf-8")).get(graph)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, AttributeError):
            raise _stale(bundle, graph, backend, "cannot be read") from None
        if entry is None:
            continue
        path, key = folder / f"{graph}.onnx", engine_key(manifest, graph, backend, version)
        if not isinstance(entry, dict) or entry.get("key") != key:
            raise _stale(bundle, graph, backend, f"was built for another bundle or another version than {version}")
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry.get("sha256"):
            raise _stale(bundle, graph, backend, "is missing or damaged")
        return Engine(path, key)
    return None


def _stale(bundle: Path, graph: str, backend: str, reason: str) -> BackendError:
    return BackendError(
        f"backend: the {backend} engine of {graph!r} {reason}; run: sparsectrl-lcm build {bundle} --backend {backend}"
    )
