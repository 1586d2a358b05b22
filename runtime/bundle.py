"""A bundle on disk: its manifest, and files that are what the manifest says."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def user_cache(bundle: Path, part: str) -> Path:
    """Where the user's cache folder holds `part` of what is known of a bundle."""
    from platformdirs import user_cache_path

    name = hashlib.sha256(str(bundle.resolve()).encode()).hexdigest()[:32]
    return user_cache_path("sparsectrl-lcm") / part / name


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file with its size and checksum.

    What was verified once is remembered in the user's cache folder with the file's size, times and inode, so that a
    bundle of many gigabytes is read through once and not at every start.

    Raises:
        BundleError: names the first file that is missing or differs.
    """
    memory = _Memory(folder)
    looks: dict[str, list[str | int]] = {}
    for name, record in manifest.files.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            raise BundleError(f"bundle: {name!r} is missing from {str(folder)!r}; export the bundle again") from None
        if stat.st_size != record.bytes:
            raise BundleError(_differs(folder, name))
        looks[name] = [record.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    unknown = [name for name, look in looks.items() if memory.known.get(name) != look]
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        digests = pool.map(lambda name: _sha256(folder / name), unknown)
        for name, digest in zip(unknown, digests, strict=True):
            if digest != manifest.files[name].sha256:
                raise BundleError(_differs(folder, name))
    finally:
        pool.shutdown(cancel_futures=True)
    if unknown:
        memory.save(looks)


def _differs(folder: Path, name: str) -> str:
    return f"bundle: {name!r} in {str(folder)!r} differs from its checksum in manifest.json; export the bundle again"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"bundle: cannot read {str(path)!r}: {error.strerror}") from None


class _Memory:
    """Which files of a bundle were verified, with what they looked like before they were read."""

    def __init__(self, folder: Path) -> None:
        self._path = user_cache(folder, "verified").with_suffix(".json")
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, list[str | int]] = known if isinstance(known, dict) else {}

    def save(self, looks: dict[str, list[str | int]]) -> None:
        """Writes what the files looked like; without a cache they are read through again next time."""
        part = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(looks), encoding="utf-8")
            part.replace(self._path)
