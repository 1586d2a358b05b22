"""Stored objects and the hashes of keys: only their owner can read them."""

from pathlib import Path

import pytest
from sparsectrl_lcm.service.auth.api_keys import create_key
from sparsectrl_lcm.service.objects.object_stores import open_files
from sparsectrl_lcm.service.store import SqlStore


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_objects_in_a_folder_are_private(scheme: str, tmp_path: Path) -> None:
    files = open_files(f"{scheme}{tmp_path}/elsewhere/store")
    files.put("objects/one", b"1")
    written = [path for path in tmp_path.rglob("*") if path != tmp_path]
    assert {mode(path) for path in written if path.is_file()} == {0o600}
    assert {mode(path) for path in written if path.is_dir()} == {0o700}


def test_a_log_of_a_key_has_no_hash(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    create_key(store, "laptop")
    (row,) = store.all_keys()
    assert row.secret_hash not in repr(row)
    store.close()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777
