"""The first key and the stored objects: only their owner can read them."""

import re
import sys
from pathlib import Path

import pytest
from sparsectrl_lcm.cli.serve import _greet
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.objects.object_stores import open_files
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings

from .test_dispatch import StandIn


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_shows_the_first_key(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_service(Settings(tmp_path), StandIn())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _greet(Listener("127.0.0.1", 8000), None, service)
    told = capsys.readouterr().out
    key = re.compile(r"[0-9a-f]{16}:[\w-]{43}")
    if terminal:
        shown = key.findall(told)
        assert not (tmp_path / "first-key").exists()
    else:
        assert not key.search(told)
        assert str(tmp_path / "first-key") in told
        shown = key.findall((tmp_path / "first-key").read_text())
        assert mode(tmp_path / "first-key") == 0o600
    assert {service.keyring.check(each) for each in shown} == {row.id for row in service.store.all_keys()}
    service.store.close()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_objects_in_a_folder_are_private(scheme: str, tmp_path: Path) -> None:
    files = open_files(f"{scheme}{tmp_path}/elsewhere/store")
    files.put("objects/one", b"1")
    written = [path for path in tmp_path.rglob("*") if path != tmp_path]
    assert {mode(path) for path in written if path.is_file()} == {0o600}
    assert {mode(path) for path in written if path.is_dir()} == {0o700}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777
