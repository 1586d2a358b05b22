"""A service on the event loop of a test, with a stand-in for its runner, and what such tests share."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.runner import Job, JobFailed, Made, RunnerLost, RunnerStatus
from sparsectrl_lcm.service.server import open_service, running
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, Outcome, SqlStore
from sqlalchemy.exc import OperationalError
from starlette.requests import Request
from starlette.types import Message

from .conftest import APP
from .waiting import SECONDS


class StandIn:
    """A runner that makes empty clips. `hold` keeps jobs from ending; the next `lose` jobs end in a crash."""

    def __init__(self) -> None:
        self.capacity = 1
        self.runners: list[RunnerStatus] = []
        self.about: dict[str, Any] = {}
        self.problem: str | None = None
        self.order: list[str] = []
        self.jobs: list[Job] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.lose = 0
        self.fails: JobFailed | None = None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def run(self, job: Job, _: Any) -> Made:
        self.order.append(job.id)
        self.jobs.append(job)
        await self.hold.wait()
        if self.fails is not None:
            raise self.fails
        if self.lose:
            self.lose -= 1
            raise RunnerLost("crashed", "the stand-in died")
        job.output.write_bytes(b"clip")
        return Made(1, 0.1, {"total": 0.1}, job.options.get("num_frames", self.about.get("frames", 16)))

    def cancel(self, job_id: str) -> None:
        pass

    async def refused(self) -> SparseCtrlLcmError:
        return await asyncio.Future()


def serving(
    folder: Path,
    scenario: Callable[[Service, StandIn], Awaitable[None]],
    prepare: Callable[[Service], None] = id,
    **settings: Any,
) -> None:
    async def main() -> None:
        runner = StandIn()
        service = open_service(Settings(folder, drain_seconds=1.0, image_seconds=SECONDS, **settings), runner)
        prepare(service)
        async with asyncio.timeout(SECONDS), running(service):
            await scenario(service, runner)

    asyncio.run(main())


def new(request_id: str, **values: Any) -> NewRequest:
    given = {
        "key_id": "k",
        "endpoint": APP,
        "input": {"prompt": "a"},
        "created_at": time.time(),
        "base_url": "http://x",
    }
    return NewRequest(**({"id": request_id} | given | values))


async def submit(service: Service, request_id: str, outcome: Outcome | None = None, **values: Any) -> None:
    await service.board.submit(new(request_id, **values), limit=99, key_limit=99, outcome=outcome)


def posted(request_id: str, given: dict[str, Any]) -> Request:
    """A POST to the endpoint as the middlewares pass it on."""

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(given).encode()}

    scope = {
        "type": "http",
        "method": "POST",
        "scheme": "http",
        "server": ("x", 80),
        "headers": [],
        "query_string": b"",
    }
    return Request(scope | {"state": {"request_id": request_id}}, receive)


async def ended(service: Service, request_id: str, key_id: str = "k") -> Outcome:
    while (view := await service.board.view(request_id, key_id)).row.outcome is None:
        await service.board.change(view, 0.05)
    return view.row.outcome


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def periodic_work_done(service: Service) -> None:
    """Waits until the periodic work has been done once more, from its beginning."""
    for _ in range(2):  # one round may have begun before
        since = service.answered_at
        while service.answered_at == since:
            await asyncio.sleep(0.01)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors of the service. Libraries may have others: of what tests before have left to collect."""
    own = [record for record in caplog.records if record.name.startswith("sparsectrl_lcm")]
    return [record.getMessage() for record in own if record.levelno >= logging.WARNING]


def counted(service: Service) -> dict[str, float]:
    (metric,) = service.metrics.ended.collect()
    return {sample.labels["status"]: sample.value for sample in metric.samples if sample.name.endswith("_total")}


def failing(monkeypatch: pytest.MonkeyPatch, store: SqlStore, name: str, times: int, *, committed: bool) -> None:
    """Makes a method of the store fail `times` times; with `committed` it fails after it has done its work."""
    method, left = getattr(store, name), [times]

    def broken(*arguments: Any, **keywords: Any) -> Any:
        result = method(*arguments, **keywords) if committed or not left[0] else None
        if not left[0]:
            return result
        left[0] -= 1
        raise OperationalError(name, {}, Exception("database or disk is full"))

    monkeypatch.setattr(store, name, broken)
