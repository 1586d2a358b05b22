"""Bundles in folders and object stores. From a store each machine fetches one once, into the cache of its user."""

import asyncio
import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeGuard, overload

from filelock import FileLock
from platformdirs import user_cache_path

from ...runtime.errors import BundleError
from ...runtime.format.bundle import bundle_folder, verify
from ...runtime.format.manifest import Manifest, read_manifest
from ..objects.object_stores import STORE_REMEDY, failure, time_limit, without_password

MANIFEST = "manifest.json"
UNUSED_SECONDS = 30 * 86_400.0
"""A version of a bundle that was last loaded so long ago is deleted when another one has been fetched, unless a process
still uses it."""
SILENT_SECONDS = 60.0
"""A fetch of which no byte arrives for so long is given up. Stores behind http hand over blocks of 5 MB."""
POLL_SECONDS = 0.5
"""How often a fetch is looked at."""

_in_use: dict[Path, IO[bytes]] = {}
"""The versions that this process has loaded. Each has a file beside it, which stays locked until the process ends."""


def is_url(bundle: Path | str | None) -> TypeGuard[str]:
    """Whether a bundle is the URL of an object store rather than a folder."""
    return isinstance(bundle, str) and "://" in bundle


def absolute_bundle(bundle: Path | str | None) -> str | None:
    """Returns a bundle as processes in other folders find it: Ray starts pipelines where `ray start` ran."""
    if bundle is None or is_url(bundle):
        return None if bundle is None else str(bundle)
    return str(Path(bundle).absolute())


@overload
def local_bundle(bundle: str) -> str: ...


@overload
def local_bundle(bundle: None) -> None: ...


def local_bundle(bundle: str | None) -> str | None:
    """Returns the folder of a bundle on this machine. A URL is fetched unless this version of it was fetched before.

    Args:
        bundle: a folder, None, or an fsspec URL such as s3://bucket/bundle.

    Raises:
        BundleError: the store cannot be read, a file differs from its checksum, or the bundle changes meanwhile.
    """
    if bundle is None or not is_url(bundle):
        return bundle
    bundle = bundle.rstrip("/")
    try:
        store, root = _open(bundle)
        version = _version(store, root, bundle)
        folder = Path(user_cache_path("sparsectrl-lcm"), "bundles", version)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _keep_while_running(folder)
        if folder.exists():
            with suppress(OSError):  # another user's
                os.utime(folder)  # when it was last loaded
            return str(folder)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                part = _fetch(store, root, folder)
                if _version(store, root, bundle) != version:
                    reason = without_password(f"{bundle} changed while it was fetched", bundle)
                    raise BundleError("bundle", reason, "start again")
                part.rename(folder)
                os.utime(folder)
                _delete_unused(folder.parent)
    except BundleError:
        raise
    except Exception as error:  # of the store's own library
        reason = without_password(f"{bundle} cannot be fetched: {failure(error)}", bundle)
        raise BundleError("bundle", reason, STORE_REMEDY) from None
    return str(folder)


def _keep_while_running(folder: Path) -> None:
    """Keeps a version from being deleted until this process ends. Waits while it is being deleted."""
    if sys.platform == "win32":  # deletes none
        return
    import fcntl

    with suppress(OSError):  # another user's, or a file system without locks
        file = _lock_file(folder).open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
        _in_use[folder] = file


def _delete_unused(bundles: Path) -> None:
    if sys.platform == "win32":  # has no locks that processes share
        return
    import fcntl

    for folder in bundles.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < time.time() - UNUSED_SECONDS:
            with suppress(OSError), _lock_file(folder).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: a process uses it
                shutil.rmtree(folder, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".used")


def bundle_manifest(bundle: Path | str | None) -> Manifest:
    """Returns the manifest of a bundle, of which it fetches nothing else. A process fetches that of a URL once.

    Args:
        bundle: a folder, the URL of an object store, or None for the demo bundle.

    Raises:
        BundleError: the folder or the store cannot be read, or it has no manifest.
    """
    return _remote_manifest(bundle) if is_url(bundle) else read_manifest(bundle_folder(bundle))


@cache
def _remote_manifest(bundle: str) -> Manifest:
    with TemporaryDirectory() as folder:
        try:
            store, root = _open(bundle)
            Path(folder, MANIFEST).write_bytes(store.cat_file(f"{root}/{MANIFEST}", **time_limit(store)))
        except Exception as error:  # of the store's own library
            reason = without_password(f"{bundle} cannot be read: {failure(error)}", bundle)
            raise BundleError("bundle", reason, STORE_REMEDY) from None
        return read_manifest(Path(folder))


def _open(bundle: str) -> tuple[Any, str]:
    import fsspec

    store, root = fsspec.core.url_to_fs(bundle.rstrip("/"), use_listings_cache=False)
    return store, root


def _version(store: Any, root: str, bundle: str) -> str:
    """Returns a checksum of the files that have the checksums of all others."""
    limit = time_limit(store)
    engines = sorted(path for path in store.find(f"{root}/engines", **limit) if path.endswith(".json"))
    indices = [store.cat_file(path, **limit) for path in (f"{root}/{MANIFEST}", *engines)]
    return hashlib.sha256(b"\0".join([bundle.encode(), *indices])).hexdigest()[:32]


def _fetch(store: Any, root: str, folder: Path) -> Path:
    """Fetches a bundle into a temporary folder beside `folder`, and checks it. Returns the temporary folder."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that died
    # by name: a pattern's characters may be in `root`, and "folders" of S3's console are objects that end in "/"
    remote = [path for path in store.find(root, **time_limit(store)) if not path.endswith("/")]
    local = [Path(part, os.path.relpath(path, root)) for path in remote]
    if any(".." in path.parts for path in local):
        raise BundleError("bundle", "a file of it has a name with '..'", "upload the folder that `export` wrote")
    for place in {path.parent for path in local}:
        place.mkdir(parents=True, exist_ok=True)
    _get(store, remote, local)
    verify(part, read_manifest(part))
    return part


def _get(store: Any, remote: list[str], local: list[Path]) -> None:
    """Fetches files into local ones, however long it takes, while bytes of a remote store arrive.

    Raises:
        TimeoutError: none arrived for `SILENT_SECONDS`.
    """
    paths = [str(path) for path in local]
    if not store.async_impl:
        store.get(remote, paths)
        return
    going = asyncio.run_coroutine_threadsafe(store._get(remote, paths), store.loop)
    arrived, since = 0, time.monotonic()
    while not going.done():
        wait((going,), timeout=POLL_SECONDS)
        size = sum(path.stat().st_size for path in local if path.exists())
        if size != arrived:
            arrived, since = size, time.monotonic()
        elif time.monotonic() - since > SILENT_SECONDS and going.cancel():
            raise TimeoutError
    going.result()
