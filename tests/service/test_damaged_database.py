"""A SQLite file that is damaged while the server runs: calls get 503, and the log has one line."""

import asyncio
from pathlib import Path

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import STORE_FAILURES

from .conftest import APP
from .stand_in import StandIn, warnings_in


def damaged(folder: Path, first: int) -> Service:
    """An open service whose database is rubbish from a byte on."""
    service = open_service(Settings(folder, anonymous=True), StandIn())
    service.store.engine.dispose()  # now no connection has pages of it in memory
    path = folder / "service.sqlite3"
    with path.open("r+b") as file:
        file.seek(first)
        file.write(b"x" * (path.stat().st_size - first))
    return service


@pytest.mark.parametrize(("first", "told"), [(0, "file is not a database"), (4096, "database disk image is malformed")])
def test_calls_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int, told: str) -> None:
    service = damaged(tmp_path, first)

    async def scenario() -> None:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://x/queue/{APP}") as client:
            for answer in (await client.get("/requests/a/status"), await client.post("", json={"prompt": "a"})):
                assert (answer.status_code, answer.json()["error_type"]) == (503, "runner_scheduling_failure")

    asyncio.run(scenario())
    service.store.close()
    assert warnings_in(caplog) == [f"the database failed: {told}"]


def test_the_sweep_takes_it_as_an_outage(tmp_path: Path) -> None:
    service = damaged(tmp_path, 0)
    with pytest.raises(STORE_FAILURES):
        service.store.shrink()
    service.store.close()
