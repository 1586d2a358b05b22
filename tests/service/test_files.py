"""Objects in a folder, in memory, and in a store behind fsspec."""

import errno
import io
import os
import threading
import time
from pathlib import Path
from random import Random
from typing import BinaryIO

import fsspec
import pytest
from sparsectrl_lcm.service.objects.object_stores import Files, FolderFiles, ObjectFiles, check_name, open_files

CONTENT = bytes(range(256)) * 40_000  # more than one block of any buffer


@pytest.fixture(params=["folder", "file", "memory", "local"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """Each kind of store; `local` is fsspec's own store of files, which is treated as any remote store."""
    fsspec.filesystem("memory").store.clear()
    urls = {"folder": "", "file": "file://", "local": "local://"}
    return open_files("memory://clips" if request.param == "memory" else f"{urls[request.param]}{tmp_path / 'x'}")


class Broken(io.RawIOBase):
    """Bytes that end in an error."""

    def __init__(self) -> None:
        self.left = 3

    def read(self, _: int = -1) -> bytes:
        self.left -= 1
        if not self.left:
            raise OSError(errno.EIO, "broken")
        return b"part"


def read(files: Files, name: str, start: int = 0) -> bytes:
    with files.open(name, start) as file:
        return file.read()


def test_kinds(tmp_path: Path) -> None:
    assert isinstance(open_files(str(tmp_path)), FolderFiles)
    assert isinstance(open_files(f"file://{tmp_path}"), FolderFiles)
    assert isinstance(open_files("memory://"), ObjectFiles)
    with pytest.raises(ValueError, match="nosuch"):
        open_files("nosuch://bucket")


def test_objects(files: Files, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    assert files.put("a/bytes", CONTENT) == len(CONTENT)
    assert files.put("a/path", source) == len(CONTENT)
    assert files.put("a/file", io.BytesIO(CONTENT)) == len(CONTENT)
    assert files.put("empty", b"") == 0
    for name in ("a/bytes", "a/path", "a/file"):
        assert read(files, name) == CONTENT
    assert read(files, "empty") == b""
    assert source.exists()


def test_reads_from_a_position(files: Files) -> None:
    files.put("object", CONTENT)
    for start in (0, 1, 255, 4 * 2**20, len(CONTENT) - 1, len(CONTENT), len(CONTENT) + 5):
        assert read(files, "object", start) == CONTENT[start:]
    with files.open("object", 10) as file:
        assert file.read(5) == CONTENT[10:15]
        assert file.read(5) == CONTENT[15:20]


def test_readers_do_not_disturb_each_other(files: Files) -> None:
    files.put("object", CONTENT)
    with files.open("object") as first, files.open("object", 100) as second:
        assert first.read(10) == CONTENT[:10]
        assert second.read(10) == CONTENT[100:110]
        assert first.read(10) == CONTENT[10:20]


def test_missing_objects(files: Files) -> None:
    for name in ("none", "none/at/all"):
        with pytest.raises(FileNotFoundError):
            files.open(name)
        files.delete(name)


def test_deletion(files: Files) -> None:
    for name in ("a/1", "a/12", "a/b/1"):
        files.put(name, b"x")
    files.delete("a/1")
    with pytest.raises(FileNotFoundError):
        files.open("a/1")
    assert read(files, "a/12") == read(files, "a/b/1") == b"x"


def test_an_object_is_there_whole_or_not_at_all(files: Files, tmp_path: Path) -> None:
    files.put("kept", b"old")
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="broken"):
            files.put(name, Broken())  # type: ignore[arg-type]
    assert read(files, "kept") == b"old"
    with pytest.raises(FileNotFoundError):
        files.open("new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["kept"])
    assert [path for path in fsspec.filesystem("memory").store if path != "/clips/kept"] == []


def test_a_reader_sees_the_old_object_or_the_new_one(files: Files) -> None:
    contents = [b"A" * 300_000, b"B" * 700_000]
    files.put("object", contents[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(12):
            files.put("object", contents[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        if isinstance(files, FolderFiles):
            assert read(files, "object") in contents
        else:  # several readers of one object
            with files.open("object") as file:
                assert file.read(100) in (b"A" * 100, b"B" * 100)
    writer.join()


REFUSED_NAMES = """
    /etc/passwd .. ../x a/../x a/.. ./a a//b a/ .hidden a/.b a:b a* a?b [a] ~ ~root/x a%2e%2e file://x
    a/b/c/d/e/f/g/h/i
"""


@pytest.mark.parametrize(
    "name",
    [
        *REFUSED_NAMES.split(),
        "",
        "a\\b",
        "C:\\x",
        "a\x00b",
        "a\nb",
        "a\x7fb",
        "a b",
        "ä",
        "x" * 201,
        "a\n",
    ],
)
def test_names_that_are_refused(name: str, files: Files) -> None:
    for call in (files.open, files.delete, lambda name: files.put(name, b"x")):
        with pytest.raises(ValueError, match="not the name of an object"):
            call(name)


def test_no_name_leads_out(tmp_path: Path) -> None:
    random = Random(7)
    root = os.path.normpath(tmp_path)
    for _ in range(20_000):
        name = "".join(random.choices("./\\a-_%0~:\n\0 é*", k=random.randint(0, 12)))
        try:
            check_name(name)
        except ValueError:
            continue
        resolved = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
        assert resolved == f"{root}/{name}"
        assert "/." not in resolved.removeprefix(root)


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(str(tmp_path / "x"))
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        events.append("file" if path.parent.name == ".parts" else path.name)
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the system does not show the paths of open files")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    files.put("folder/object", b"x")
    assert events == ["file", "x", "rename", "folder"]


def test_what_a_crash_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    open_files(str(tmp_path))
    old, new = tmp_path / ".parts" / "old", tmp_path / ".parts" / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    open_files(str(tmp_path))
    assert not old.exists()
    assert new.exists()


def test_object_stores_take_the_object_at_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an upload appears only when it is complete, nothing is moved."""
    files = open_files("memory://bucket")
    assert isinstance(files, ObjectFiles)
    monkeypatch.setattr(files, "_whole", True)
    monkeypatch.setattr(files._system, "mv", None)
    files.put("a/object", io.BytesIO(b"abc"))
    assert read(files, "a/object") == b"abc"


def test_no_empty_range_is_asked_of_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers it with an error."""
    files = open_files("memory://bucket")
    assert isinstance(files, ObjectFiles)
    files.put("object", b"abc")
    files.put("empty", b"")
    cat_file, ranges = files._system.cat_file, []

    def cat(path: str, start: int, end: int) -> bytes:
        ranges.append((start, end))
        return bytes(cat_file(path, start=start, end=end))

    monkeypatch.setattr(files._system, "cat_file", cat)
    assert (read(files, "object"), read(files, "empty")) == (b"abc", b"")
    assert ranges == [(0, 3)]


def test_binary_files_only(files: Files) -> None:
    files.put("object", b"a\r\nb\x1a")
    file: BinaryIO = files.open("object")
    with file:
        assert file.read() == b"a\r\nb\x1a"
