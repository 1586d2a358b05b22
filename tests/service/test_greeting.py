"""What `serve` prints: where it is, and the first key, which it shows once."""

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.cli.serve_greeting import Greeting
from sparsectrl_lcm.runtime.errors import BackendError, SparseCtrlLcmError
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.server import open_service, serve
from sparsectrl_lcm.service.settings import Settings

from .conftest import ports
from .serving_here import serving_here
from .stand_in import StandIn

KEY = re.compile(r"[0-9a-f]{16}:[\w-]{43}")


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_shows_the_first_key(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_service(Settings(tmp_path), StandIn())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    Greeting(Listener("127.0.0.1", 8000), False).loaded(service)
    told = capsys.readouterr().out
    if terminal:
        shown = KEY.findall(told)
        assert not (tmp_path / "first-key").exists()
    else:
        assert not KEY.search(told)
        assert str(tmp_path / "first-key") in told
        shown = KEY.findall((tmp_path / "first-key").read_text())
        assert (tmp_path / "first-key").stat().st_mode & 0o777 == 0o600
    assert {service.keyring.check(each) for each in shown} == {row.id for row in service.store.all_keys()} != set()
    service.store.close()


class Refused(StandIn):
    """A runner whose options no process can load."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 0

    async def refused(self) -> SparseCtrlLcmError:
        await asyncio.sleep(0.3)
        return BackendError("backend", "no", "take another")


def test_the_start_after_one_that_failed_shows_the_first_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, listener = Settings(tmp_path), Listener("127.0.0.1", ports()[0])
    greeting = Greeting(listener, False)

    async def scenario() -> None:
        with pytest.raises(BackendError):
            await serve(settings, [listener], [Refused()], greeting.opened, greeting.loaded)
        assert not (tmp_path / "first-key").exists()
        async with serving_here(settings, listener, on_open=greeting.opened, on_loaded=greeting.loaded):
            while "a first API key is in" not in (told := capsys.readouterr().out):
                assert told in ("", f"http://127.0.0.1:{listener.port}/ loads the model; a first API key follows\n" * 2)
                await asyncio.sleep(0.02)
        async with serving_here(settings, listener, on_open=greeting.opened, on_loaded=greeting.loaded):
            assert "another key: sparsectrl-lcm keys create --data" in capsys.readouterr().out

    asyncio.run(scenario())
    assert KEY.match((tmp_path / "first-key").read_text())


def test_what_was_asked_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(tmp_path, anonymous=True, docs=True, endpoints={"me/portraits": None})
    greeted: Any = SimpleNamespace(settings=settings)
    Greeting(Listener("127.0.0.1", 8000), False).opened(greeted)
    url = "http://127.0.0.1:8000"
    assert capsys.readouterr().out == f"{url}/\n{url}/docs has Swagger UI\nclients call me/portraits\n"


def test_the_hint_names_the_database_but_not_its_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(tmp_path, database="postgresql://me:secret@db/clips")
    service: Any = SimpleNamespace(settings=settings, store=SimpleNamespace(all_keys=lambda: ["one"]))
    Greeting(Listener("127.0.0.1", 8000), False).opened(service)
    command = f"sparsectrl-lcm keys create --data {tmp_path} --database 'postgresql://me:***@db/clips'"
    assert capsys.readouterr().out == f"http://127.0.0.1:8000/ (another key: {command})\n"


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("fd00::7", "[fd00::7]"),
        ("box.lan", "box.lan"),
    ],
)
def test_hosts_in_the_greeting(capsys: pytest.CaptureFixture[str], tmp_path: Path, host: str, shown: str) -> None:
    greeted: Any = SimpleNamespace(settings=Settings(tmp_path, anonymous=True))
    Greeting(Listener(host, 8397), False).opened(greeted)
    assert capsys.readouterr().out == f"http://{shown}:8397/\n"
    assert httpx.URL(f"http://{shown}:8397/").port == 8397
