"""Object stores, which hold the bytes of uploads and clips by name: a local folder, or a store behind fsspec."""

import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from ...runtime.errors import InvalidRequest, first_line, reason_of
from ..synced_files import sync_folder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COPY_BYTES = 2**20
BLOCK_BYTES = 4 * 2**20
"""How many bytes of a remote object one request reads."""
UPLOAD_BYTES = 8 * 2**20
"""Size of the parts of a large upload to S3. s3fs itself would hold up to 500 MB of it in memory."""
CALL_SECONDS, BYTES_A_SECOND = 20.0, 256 * 2**10
"""How long a call of a remote store may take, and how many bytes have to arrive in each further second."""
STORE_REMEDY = "check bucket, endpoint and credentials; docs/service.md says how they are given"
LEFT_SECONDS = 86_400.0
"""Part files older than this were left behind by a process that died."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}){0,7}")
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""Stores that show only complete objects. In other stores an object is written under another name and then moved."""


class FilesUnavailable(OSError):
    """An object store cannot be reached, or refuses a call that it should not."""


class Files(Protocol):
    """Objects by name. The server chooses the names: relative, with letters, digits, "_", "-", "." and "/".

    All methods block and may be called from several threads. They raise OSError if the store fails, FilesUnavailable
    if it is remote, and ValueError if a name is not allowed.
    """

    def put(self, name: str, source: BinaryIO | Path | bytes) -> int:
        """Writes or replaces an object and returns its size. Readers see the whole object or none."""
        ...

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """Opens an object at byte `start`; raises FileNotFoundError if there is none."""
        ...

    def delete(self, name: str) -> None:
        """Removes an object, if there is one."""
        ...


def on_every_machine(url: str) -> bool:
    """Whether a store is the same on every machine: an object store of the network rather than a folder or memory."""
    return url.partition("://")[0] in _WHOLE


def open_files(url: str) -> Files:
    """Opens the store at a path, a file:// URL or any URL that fsspec knows (memory://, s3://bucket/prefix).

    Raises:
        InvalidRequest: fsspec does not know the kind of URL, or the package for it is not installed.
    """
    if "://" not in url:
        return FolderFiles(Path(url).expanduser())
    if url.startswith("file://"):
        return FolderFiles(Path(url.removeprefix("file://")))
    return ObjectFiles(url)


def check_files(url: str, files: Files) -> None:
    """Writes, reads and deletes an object.

    Raises:
        InvalidRequest: the store at `url` cannot be reached, or refuses one of these.
    """
    name = f"probe-{token_hex(8)}"
    try:
        files.put(name, b"probe")
        with files.open(name) as file:
            file.read()
        files.delete(name)
    except OSError as error:
        reason = without_password(f"{url} cannot be used ({failure(error)})", url)
        raise InvalidRequest("files", reason, STORE_REMEDY) from None


def without_password(text: str, url: str) -> str:
    """Returns a text about a store without the user and password that its URL may have."""
    found = re.search("//([^/]*@)", url)
    return text.replace(found[1], "") if found else text


def failure(error: Exception) -> str:
    """Why a store's library failed, in one line."""
    if isinstance(error, TimeoutError) and not str(error):
        return "it does not answer"
    missing = "not found: " if isinstance(error, FileNotFoundError) else ""
    return missing + reason_of(error)


def time_limit(system: Any, size: int = 0) -> dict[str, float]:
    """Returns the keyword that bounds a call of fsspec's system that moves `size` bytes, if it is a remote one."""
    return {"timeout": CALL_SECONDS + size / BYTES_A_SECOND} if system.async_impl else {}


def check_name(name: str) -> str:
    """Returns the name if it is allowed.

    Raises:
        ValueError: the name is not allowed, for instance because of "..", a leading "/" or ".", "\\" or a control
            character.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an object; allowed are letters, digits, '_', '-', '.' and '/'")
    return name


class FolderFiles:
    """Objects as files in a local folder, which only their owner can read. An existing folder keeps its mode."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._parts = self._root / ".parts"  # no name begins with a dot
        _make_folder(self._parts)
        for path in self._parts.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - LEFT_SECONDS:
                    path.unlink()

    def put(self, name: str, source: BinaryIO | Path | bytes) -> int:
        """See `Files.put`. The bytes are on the disk before the name appears."""
        target = self._path(name)
        part = self._parts / token_hex(8)
        try:
            with open(part, "xb", opener=_private) as file:
                _copy(source, file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            _make_folder(target.parent)
            part.replace(target)
            sync_folder(target.parent)
        finally:
            part.unlink(missing_ok=True)
        return size

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """See `Files.open`."""
        file = self._path(name).open("rb")
        file.seek(start)
        return file

    def delete(self, name: str) -> None:
        """See `Files.delete`."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)


class ObjectFiles:
    """Objects in a store behind fsspec."""

    def __init__(self, url: str) -> None:
        self._system: Any
        self._system, root = _system(url)
        self._root = root.rstrip("/")
        protocols = {self._system.protocol} if isinstance(self._system.protocol, str) else set(self._system.protocol)
        self._whole = bool(protocols & _WHOLE)
        self._parts = {"chunksize": UPLOAD_BYTES, "max_concurrency": 2} if "s3" in protocols else {}

    def put(self, name: str, source: BinaryIO | Path | bytes) -> int:
        """See `Files.put`."""
        target = self._path(name)
        with tempfile.TemporaryDirectory() as folder:
            if not isinstance(source, Path):
                local = Path(folder) / "object"
                with local.open("xb") as file:
                    _copy(source, file)
                source = local
            size = source.stat().st_size
            with _unavailable(target):
                if self._whole:
                    self._system.put_file(str(source), target, **self._parts, **time_limit(self._system, size))
                else:
                    self._put_and_move(source, target)
        return size

    def _put_and_move(self, source: Path, target: str) -> None:
        part = f"{self._root}/.parts/{token_hex(8)}"
        for path in (part, target):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self._system.put_file(str(source), part)
            self._system.mv(part, target)
        finally:
            with suppress(FileNotFoundError):
                self._system.rm_file(part)

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """See `Files.open`."""
        path = self._path(name)
        with _unavailable(path, may_be_missing=True):
            about = self._system.info(path, **time_limit(self._system))
        if about["type"] != "file":
            raise FileNotFoundError(name)
        return cast(BinaryIO, io.BufferedReader(_Remote(self._system, path, start, int(about["size"])), BLOCK_BYTES))

    def delete(self, name: str) -> None:
        """See `Files.delete`."""
        path = self._path(name)
        with suppress(FileNotFoundError), _unavailable(path, may_be_missing=True):
            self._system.rm_file(path, **time_limit(self._system))

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"


class _Remote(io.RawIOBase):
    """Reads an object in ranges. fsspec's own files share one position in a memory:// store."""

    def __init__(self, system: Any, path: str, start: int, size: int) -> None:
        self._system, self._path, self._at, self._size = system, path, start, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        limit = time_limit(self._system, end - self._at)
        with _unavailable(self._path, may_be_missing=True):
            data = self._system.cat_file(self._path, start=self._at, end=end, **limit)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _unavailable(path: str, *, may_be_missing: bool = False) -> Iterator[None]:
    """Turns an error of a store's library into FilesUnavailable, except that of an object that may be missing.

    The text of botocore's errors has the object's name, by which anybody can fetch the file; it stays out of the log.
    """
    try:
        yield
    except Exception as error:  # those of botocore, for instance, are no OSError
        if may_be_missing and isinstance(error, FileNotFoundError):
            raise
        name = path.rpartition("/")[2]
        raise FilesUnavailable(failure(error).replace(f"/{name}", "/...")) from error


def _system(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.registry import known_implementations

    try:
        # a cached listing would hide objects that another machine has written since
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        kind = url.partition("://")[0]
        package = known_implementations.get(kind, {}).get("class", "").partition(".")[0]
        remedy = f"run: pip install {package}" if isinstance(error, ImportError) and package != "fsspec" else ""
        raise InvalidRequest("files", f"{kind}:// cannot be opened ({first_line(error)})", remedy) from None
    return system, str(root)


def _copy(source: BinaryIO | Path | bytes, target: BinaryIO) -> None:
    if isinstance(source, bytes):
        target.write(source)
    elif isinstance(source, Path):
        with source.open("rb") as file:
            shutil.copyfileobj(file, target, COPY_BYTES)
    else:
        shutil.copyfileobj(source, target, COPY_BYTES)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _make_folder(folder: Path) -> None:
    """Creates a folder and syncs it, so that it survives a crash of the machine."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make_folder(folder.parent)
        folder.mkdir(0o700, exist_ok=True)
        sync_folder(folder.parent)
