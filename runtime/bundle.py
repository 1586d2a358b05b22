"""A bundle on disk: its manifest, and files that are what the manifest says."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .errors import BundleError
from .manifest import GraphRecord, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder with a manifest whose files were verified."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> "Bundle":
        """Reads and verifies a bundle; None is the demo bundle that ships with the package.

        Raises:
            BundleError: a file is missing or differs from its checksum, or the manifest is of another version.
        """
        folder = demo_bundle() if path is None else Path(path)
        if not folder.is_dir():
            raise BundleError(f"bundle: {str(folder)!r} is not a folder; name one that `sparsectrl-lcm export` wrote")
        manifest = read_manifest(folder)
        verify(folder, manifest)
        return cls(folder.resolve(), manifest)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json."""
        return self.folder / self.manifest.tokenizer

    def graph(self, name: str) -> GraphRecord:
        """The record of a graph.

        Raises:
            BundleError: the bundle was exported without it.
        """
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(f"bundle: {str(self.folder)!r} has no graph {name!r}; export the bundle again") from None


def demo_bundle() -> Path:
    """The folder of the demo bundle."""
    return Path(str(files(__package__) / "demo_bundle"))


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file with its size and checksum.

    What was verified once is remembered in the user's cache folder with the file's size, times and inode, so that a
    bundle of many gigabytes is read through once and not at every start.

    Raises:
        BundleError: names the first file that is missing or differs.
    """
    memory = _Memory(folder)
    changed: list[str] = []
    for name, record in manifest.files.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            raise BundleError(f"bundle: {name!r} is missing from {str(folder)!r}; export the bundle again") from None
        if stat.st_size != record.bytes:
            raise BundleError(_differs(folder, name))
        if not memory.knows(name, record.sha256, stat):
            changed.append(name)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(lambda name: _sha256(folder / name), changed)
        for name, digest in zip(changed, digests, strict=True):
            if digest != manifest.files[name].sha256:
                raise BundleError(_differs(folder, name))
    if changed:
        memory.save(manifest)


def _differs(folder: Path, name: str) -> str:
    return f"bundle: {name!r} in {str(folder)!r} differs from its checksum in manifest.json; export the bundle again"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"bundle: cannot read {str(path)!r}: {error.strerror}") from None


class _Memory:
    """Which files of a bundle were verified, with what they looked like then."""

    def __init__(self, folder: Path) -> None:
        from platformdirs import user_cache_path

        self._folder = folder.resolve()
        name = hashlib.sha256(str(self._folder).encode()).hexdigest()[:32]
        self._path = user_cache_path("sparsectrl-lcm") / "verified" / f"{name}.json"
        try:
            self._known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def knows(self, name: str, sha256: str, stat: os.stat_result) -> bool:
        return isinstance(self._known, dict) and self._known.get(name) == self._look(sha256, stat)

    def save(self, manifest: Manifest) -> None:
        known = {
            name: self._look(record.sha256, (self._folder / name).stat()) for name, record in manifest.files.items()
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(known), encoding="utf-8")
            part.replace(self._path)
        except OSError:  # without a cache the files are read through again next time
            return

    @staticmethod
    def _look(sha256: str, stat: os.stat_result) -> list[str | int]:
        return [sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
