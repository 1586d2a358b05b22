"""The input of a request in the store, and errors that are found once the request is prepared."""

from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.protocol.errors import field_error
from sparsectrl_lcm.service.queue import job_preparation as preparation
from sparsectrl_lcm.service.queue.submission import accept
from sparsectrl_lcm.service.runner import JobFailed
from sparsectrl_lcm.service.store import tables
from sqlalchemy import select

from .conftest import APP
from .stand_in import StandIn, counted, ended, new, posted, serving, submit

pytestmark = pytest.mark.usefixtures("soon")


def test_errors_name_fields_of_the_input(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.fails = JobFailed("invalid", "'rgb' is not in this bundle; allowed are x", field="controlnet")
        await submit(service, "a")
        (detail,) = (await ended(service, "a")).body["detail"]
        assert detail["loc"] == ["body", "controlnet_type"]
        assert detail["msg"] == "controlnet_type: 'rgb' is not in this bundle; allowed are x"

    serving(tmp_path, scenario)


def test_what_is_kept_of_an_input(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.capacity = 0
        given = {"prompt": "a", "seed": 1, "unknown": "x" * 10**6}
        await accept(service, service.endpoints[APP], posted("wrong", given | {"guidance_scale": 9}), "k", "queue")
        await accept(service, service.endpoints[APP], posted("a", given), "k", "queue")
        query = select(tables.requests.c.input).order_by(tables.requests.c.sequence)
        with service.store.engine.connect() as connection:
            assert connection.execute(query).scalars().all() == [None, {"prompt": "a", "seed": 1}]
        assert counted(service) == {"422": 1}

    serving(tmp_path, scenario)


def test_an_input_that_an_earlier_release_stored(tmp_path: Path) -> None:
    """Earlier releases stored what the client sent: in a GET's query every value is text."""
    query = {"prompt": "a", "num_inference_steps": "6", "guidance_scale": "2", "seed": "-1", "keyframe_0_index": "3"}

    async def scenario(service: Service, runner: StandIn) -> None:
        row = new("a", input=query)
        await service.store.write(service.store.submit, row, limit=9, key_limit=9)
        service.board.queues[APP].arrived.set()
        assert (await ended(service, "a")).status == 200
        (job,) = runner.jobs
        options = {"num_inference_steps": 6, "guidance_scale": 2, "seed": 2**64 - 1}
        assert {name: job.options[name] for name in options} == options
        assert job.options["prompt"] == "a"

    serving(tmp_path, scenario)


def test_a_wrong_keyframe_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(*_: Any) -> None:
        raise field_error("keyframe_1_image_url", "no", "file_download_error")

    async def scenario(service: Service, runner: StandIn) -> None:
        monkeypatch.setattr(preparation, "save_keyframe", wrong)
        runner.capacity = 0
        await submit(service, "a", input={"prompt": "a", "keyframe_1_image_url": "http://x"})
        outcome = await ended(service, "a")
        assert (outcome.status, outcome.error_type) == (422, "file_download_error")

    serving(tmp_path, scenario)
