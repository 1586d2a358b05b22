"""A first start for which no model can be loaded leaves nothing, unless somebody has used the server meanwhile."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.service.auth.api_keys import create_key
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.data_folder import owner_name
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.http.local_authority import local_certificate
from sparsectrl_lcm.service.http.tls_certificates import Certificate
from sparsectrl_lcm.service.server import serve
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import SqlStore

from .conftest import ports
from .stand_in import new


def refused(settings: Settings, on_open: Callable[[Service], None] = lambda _: None) -> None:
    """Serves http and https on Ray, which is not installed."""
    port, tls_port, _ = ports()
    certificate = Certificate(lambda: local_certificate(settings.data / "tls")[1:])
    listeners = [Listener("127.0.0.1", port), Listener("127.0.0.1", tls_port, certificate)]
    with pytest.raises(BackendError, match="pool: Ray is not installed"):
        asyncio.run(serve(settings, listeners, on_open=on_open))


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


def test_a_first_start_without_ray_leaves_nothing(tmp_path: Path, database: str) -> None:
    for shared in (None, database):
        refused(Settings(tmp_path / "new/data", pool="ray", database=shared))
        assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_keeps_its_name(tmp_path: Path) -> None:
    """Requests that a server has begun are known by it."""
    names = set()
    for _ in range(2):
        refused(Settings(tmp_path, pool="ray"))
        names.add((tmp_path / "owner").read_text())
    assert len(names) == 1


@pytest.mark.parametrize(
    ("use", "kept"),
    [
        (lambda service: create_key(service.store, "mine"), "service.sqlite3"),
        (lambda service: service.store.submit(new("a"), limit=9, key_limit=9), "service.sqlite3"),
        (lambda service: service.files.put("a.png", b"an upload"), "files/a.png"),
    ],
    ids=["key", "request", "file"],
)
def test_what_somebody_has_done_meanwhile_is_kept(tmp_path: Path, use: Callable[[Service], object], kept: str) -> None:
    data, used = tmp_path / "data", []
    refused(Settings(data, pool="ray"), lambda service: used.append(use(service)))
    assert used and (data / kept).exists()


def test_a_request_in_a_shared_database_keeps_the_name_of_its_server(tmp_path: Path, database: str) -> None:
    def submitted(service: Service) -> None:
        service.store.submit(new("kept", home=owner_name(tmp_path / "data")), limit=9, key_limit=9)

    refused(Settings(tmp_path / "data", pool="ray", database=database), submitted)
    opened = SqlStore(database)
    opened.cancel("kept", time.time())  # no later server shall make it
    opened.close()
    assert (tmp_path / "data/owner").exists()
