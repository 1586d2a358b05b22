"""Bundles in an object store: each machine fetches one once, into the cache of its user."""

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from ...runtime.errors import BundleError, first_line
from ...runtime.format.bundle import verify
from ...runtime.format.manifest import read_manifest

MANIFEST = "manifest.json"
UNUSED_SECONDS = 30 * 86_400.0
"""A version of a bundle that nobody has loaded for so long is deleted when another one has been fetched."""


def is_url(bundle: Path | str | None) -> bool:
    """Whether a bundle is the URL of an object store rather than a folder."""
    return isinstance(bundle, str) and "://" in bundle


def absolute_bundle(bundle: Path | str | None) -> str | None:
    """Returns a bundle as processes in other folders find it: Ray starts pipelines where `ray start` ran."""
    if bundle is None or is_url(bundle):
        return None if bundle is None else str(bundle)
    return str(Path(bundle).absolute())


def local_bundle(bundle: str | None) -> str | None:
    """Returns the folder of a bundle on this machine. A URL is fetched unless this version of it was fetched before.

    Args:
        bundle: a folder, None, or an fsspec URL such as s3://bucket/bundle.

    Raises:
        BundleError: the store cannot be read, a file differs from its checksum, or the bundle changes meanwhile.
    """
    if bundle is None or not is_url(bundle):
        return bundle
    try:
        store, root = _open(bundle)
        version = _version(store, root, bundle)
        folder = Path(user_cache_path("sparsectrl-lcm"), "bundles", version)
        if folder.exists():
            with suppress(OSError):  # another user's
                os.utime(folder)  # when it was last loaded
            return str(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                part = _fetch(store, root, folder)
                if _version(store, root, bundle) != version:
                    raise BundleError("bundle", f"{bundle} changed while it was fetched", "start again")
                part.rename(folder)
                os.utime(folder)
                _delete_unused(folder.parent)
    except BundleError:
        raise
    except Exception as error:  # of the store's own library
        raise BundleError("bundle", f"{bundle} cannot be fetched: {first_line(error)}") from None
    return str(folder)


def _delete_unused(bundles: Path) -> None:
    for folder in bundles.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < time.time() - UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def read_remote_manifest(bundle: str, folder: Path) -> Path:
    """Copies the manifest of a bundle at a URL into a folder and returns the folder.

    Raises:
        BundleError: the store cannot be read.
    """
    try:
        store, root = _open(bundle)
        (folder / MANIFEST).write_bytes(store.cat_file(f"{root}/{MANIFEST}"))
    except Exception as error:
        raise BundleError("bundle", f"{bundle} cannot be read: {first_line(error)}") from None
    return folder


def _open(bundle: str) -> tuple[Any, str]:
    import fsspec

    store, root = fsspec.core.url_to_fs(bundle.rstrip("/"), use_listings_cache=False)
    return store, root


def _version(store: Any, root: str, bundle: str) -> str:
    """Returns a checksum of the files that have the checksums of all others."""
    indices = [f"{root}/{MANIFEST}", *sorted(store.glob(f"{root}/engines/**/*.json"))]
    return hashlib.sha256(b"\0".join([bundle.encode(), *map(store.cat_file, indices)])).hexdigest()[:32]


def _fetch(store: Any, root: str, folder: Path) -> Path:
    """Fetches a bundle into a temporary folder beside `folder`, and checks it. Returns the temporary folder."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that died
    store.get(f"{root}/", f"{part}/", recursive=True)
    verify(part, read_manifest(part))
    return part
