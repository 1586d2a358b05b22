"""A bundle on disk: its manifest and its verified files."""

import os
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from ..errors import BundleError, reason_of
from .checksums import first_difference
from .linked_files import without_links
from .manifest import GraphRecord, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle's folder and manifest, after its files were verified."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> "Bundle":
        """Reads and verifies a bundle; None loads the demo bundle that ships with the package.

        Raises:
            BundleError: a file is missing or differs from its checksum, or the manifest has another version.
        """
        folder = bundle_folder(path)
        manifest = read_manifest(folder)
        verify(folder, manifest)
        return cls(folder.resolve(), manifest)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json."""
        return self.folder / self.manifest.tokenizer

    def with_keyframe_slots(self, slots: int | None) -> "Bundle":
        """The bundle for engines that take `slots` keyframes; None keeps the number in the manifest."""
        if slots in (None, self.manifest.keyframe_slots):
            return self
        return replace(self, manifest=self.manifest.model_copy(update={"keyframe_slots": slots}))

    def graph(self, name: str) -> GraphRecord:
        """The record of a graph.

        Raises:
            BundleError: the bundle was exported without this graph.
        """
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(
                "bundle", f"{str(self.folder)!r} has no graph {name!r}", "export the bundle again"
            ) from None


def bundle_folder(path: str | os.PathLike[str] | None) -> Path:
    """The folder of a bundle; None gives that of the demo bundle. For links into a hub's cache, see `linked_files`.

    Raises:
        BundleError: `path` is not a path, or its links lead out of it and the user's cache cannot be written.
    """
    try:
        return demo_bundle() if path is None else without_links(Path(path))
    except TypeError:
        raise BundleError("bundle", f"{path!r} is not a path") from None
    except OSError as error:
        raise BundleError("bundle", f"links of {str(path)!r} cannot be followed: {reason_of(error)}") from None


def demo_bundle() -> Path:
    """The folder of the demo bundle."""
    return Path(str(files("sparsectrl_lcm.runtime") / "demo_bundle"))


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file of a bundle with its checksum.

    Raises:
        BundleError: a file is missing or differs; the message names the first one.
    """
    if difference := first_difference(folder, manifest.files):
        name, what = difference
        raise BundleError("bundle", f"{name!r} in {str(folder)!r} {what}", "export the bundle again")
