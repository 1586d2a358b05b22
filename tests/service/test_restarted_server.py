"""What a server that starts again finds and keeps."""

import time
from pathlib import Path

import pytest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import Outcome

from .stand_in import StandIn, ended, new, serving, until

pytestmark = pytest.mark.usefixtures("soon")


def test_runs_of_an_earlier_life_end(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        outcome = await ended(service, "run")
        assert (outcome.status, outcome.error_type) == (499, "client_disconnected")
        assert (await ended(service, "queued")).status == 200
        assert (await ended(service, "another's")).status == 200  # from a data folder that lost its name
        assert runner.order == ["another's", "queued"]

    def prepare(service: Service) -> None:
        service.store.submit(new("another's"), limit=9, key_limit=9)
        service.store.claim("another's", "another", time.time(), 1e9)
        service.store.submit(new("run", kind="run", home=service.board.owner), limit=9, key_limit=9)
        service.store.submit(new("queued"), limit=9, key_limit=9)

    serving(tmp_path, scenario, prepare)


def test_all_that_is_old_is_forgotten_at_once(tmp_path: Path) -> None:
    def prepare(service: Service) -> None:
        for place in range(501):
            service.store.submit(new(f"{place}", created_at=1.0), limit=9, key_limit=9, outcome=Outcome(422, {}, "x"))

    async def scenario(service: Service, _: StandIn) -> None:
        await until(lambda: service.store.get("0") is None and service.store.get("500") is None)

    serving(tmp_path, scenario, prepare)


def test_a_server_keeps_its_name(tmp_path: Path) -> None:
    def name() -> str:
        service = open_service(Settings(tmp_path), StandIn())
        service.store.close()
        return service.board.owner

    first = name()
    assert name() == first
    (tmp_path / "owner").write_text("")  # as a loss of power may leave it
    second = name()
    assert second not in ("", first)
    assert name() == second
