"""Requests inside a server with a stand-in runner and a store that fails on demand."""

import asyncio
import errno
import json
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.metrics import Metrics
from sparsectrl_lcm.service.protocol.errors import field_error
from sparsectrl_lcm.service.queue import dispatcher as dispatch
from sparsectrl_lcm.service.queue import job_preparation as preparation
from sparsectrl_lcm.service.queue import periodic_work, retries
from sparsectrl_lcm.service.queue.request_states import Board
from sparsectrl_lcm.service.queue.submission import accept
from sparsectrl_lcm.service.queue.views import View
from sparsectrl_lcm.service.runner import Job, JobFailed, Made, RunnerLost, RunnerStatus
from sparsectrl_lcm.service.runner.picture_reader import PictureReader
from sparsectrl_lcm.service.server import open_service, running
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, Outcome, SqlStore, tables
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from starlette.requests import Request
from starlette.types import Message

from .conftest import APP


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
        return Made(1, 0.1, {"total": 0.1})

    def cancel(self, job_id: str) -> None:
        pass

    async def refused(self) -> SparseCtrlLcmError:
        return await asyncio.Future()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic_work, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "READY_SECONDS", 0.02)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)


def serving(
    folder: Path,
    scenario: Callable[[Service, StandIn], Awaitable[None]],
    prepare: Callable[[Service], None] = id,
    **settings: Any,
) -> None:
    async def main() -> None:
        runner = StandIn()
        service = open_service(Settings(folder, drain_seconds=1.0, **settings), runner)
        prepare(service)
        async with asyncio.timeout(20), running(service):
            await scenario(service, runner)

    asyncio.run(main())


def new(request_id: str, **values: Any) -> NewRequest:
    given = {"key_id": "k", "input": {"prompt": "a"}, "created_at": time.time(), "base_url": "http://x"}
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


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", ["claim", "finish", "put_back", "given", "ahead", "renew", "give_back"])
def test_a_store_that_fails_strands_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, committed: bool
) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        failing(monkeypatch, service.store, name, 3, committed=committed)
        runner.lose = name == "put_back"
        again = retries.until_the_store_works
        for request_id in "ab":
            await again(lambda request_id=request_id: submit(service, request_id))
        for request_id in "ab":
            assert (await again(lambda request_id=request_id: ended(service, request_id))).status == 200
        if name != "finish" or not committed:  # otherwise the end was committed but not reported, so it is not counted
            assert counted(service) == {"200": 2}

    serving(tmp_path, scenario)


def test_an_error_that_is_not_the_stores_ends_in_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        finish, left = service.store.finish, [2]

        def broken(*arguments: Any) -> bool:
            if left[0]:
                left[0] -= 1
                raise ValueError("a surprise")
            return finish(*arguments)

        monkeypatch.setattr(service.store, "finish", broken)
        await submit(service, "a")
        assert (await ended(service, "a")).status == 200

    serving(tmp_path, scenario)


def test_nothing_is_begun_without_a_model(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.capacity = 0
        await submit(service, "late", start_by=time.time() + 0.3)
        await submit(service, "a")
        await asyncio.sleep(0.15)
        assert (await service.board.view("a", "k")).row.state == "queued"
        late = await ended(service, "late")
        assert (late.status, late.error_type) == (504, "startup_timeout")
        assert (await service.board.view("a", "k")).row.started_at is None
        runner.capacity = 1
        assert (await ended(service, "a")).status == 200
        assert runner.order == ["a"]
        assert counted(service) == {"504": 1, "200": 1}

    serving(tmp_path, scenario)


def test_only_what_runs_has_begun(tmp_path: Path) -> None:
    """While one clip is made, the next request still waits: a later one of normal priority passes a low one."""

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.hold.clear()
        await submit(service, "first")
        await until(lambda: runner.order == ["first"])
        await submit(service, "low", priority=1)
        await submit(service, "late", start_by=time.time() + 1)
        await asyncio.sleep(0.15)
        states = [(await service.board.view(name, "k")).row.state for name in ("first", "low", "late")]
        assert states == ["running", "queued", "queued"]
        await submit(service, "normal")
        assert (await ended(service, "late")).status == 504
        runner.hold.set()
        for name in ("first", "normal", "low"):
            assert (await ended(service, name)).status == 200
        assert runner.order == ["first", "normal", "low"]

    serving(tmp_path, scenario)


def test_a_slow_keyframe_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    async def never(_: Service, url: str, *__: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            left.append(url)

    async def scenario(service: Service, runner: StandIn) -> None:
        monkeypatch.setattr(preparation, "save_keyframe", never)
        await submit(service, "slow", input={"prompt": "a", "keyframe_1_image_url": "http://slow"})
        await submit(service, "next")
        assert (await ended(service, "next")).status == 200
        assert runner.order == ["next"]
        assert await service.board.cancel("slow")
        assert (await ended(service, "slow")).status == 499
        await until(lambda: left == ["http://slow"])
        assert counted(service) == {"200": 1, "499": 1}
        await until(lambda: not list(service.settings.work.glob("job-*")))

    serving(tmp_path, scenario)


def test_many_slow_keyframes_hold_up_no_other_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are prepared ahead, and more than one key may have."""

    async def never(*_: Any) -> None:
        await asyncio.sleep(3600)

    async def scenario(service: Service, runner: StandIn) -> None:
        monkeypatch.setattr(preparation, "save_keyframe", never)
        for place in range(40):
            await submit(service, f"slow {place}", input={"prompt": "a", "keyframe_1_image_url": "http://slow"})
        await submit(service, "next", key_id="other")
        assert (await ended(service, "next", "other")).status == 200
        assert runner.order == ["next"]
        assert len(list(service.settings.work.glob("job-*"))) <= dispatch.AHEAD + dispatch.SLOW_OF_KEY

    serving(tmp_path, scenario)


@pytest.mark.parametrize("data_uris", [0, 2])
def test_slow_keyframes_are_not_held_in_memory(tmp_path: Path, data_uris: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds neither the bytes that have arrived nor the data URIs of the same input."""

    async def read(*_: Any) -> None:
        """The files are no pictures."""

    monkeypatch.setattr(PictureReader, "read", read)
    large, sent = 16 * 2**20, 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        size = 1 if b"small" in await reader.readuntil(b"\r\n\r\n") else large
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % size)
        for _ in range(size // 2**16 - 1):  # the last part of a large answer does not come
            writer.write(b"x" * 2**16)
            await writer.drain()
        sent += 1
        await reader.read()
        writer.close()

    async def scenario(service: Service, _: StandIn) -> None:
        def given(path: str) -> dict[str, Any]:
            uri = "data:;base64," + "A" * (10 * 2**20 - 16)
            urls = [uri] * data_uris + [f"http://127.0.0.1:{port}/{path}"] * (3 - data_uris)
            places = {f"keyframe_{slot}_index": slot for slot in range(3)}
            return {"prompt": "a"} | places | {f"keyframe_{slot}_image_url": url for slot, url in enumerate(urls)}

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await submit(service, "small", input=given("small"))  # warms up what is loaded only once
        assert (await ended(service, "small")).status == 200
        tracemalloc.start()
        await submit(service, "slow", input=given("large"))
        await until(lambda: sent == 2 * (3 - data_uris))
        await asyncio.sleep(0.3)
        assert tracemalloc.get_traced_memory()[0] < 4 * 2**20
        written = [path.stat().st_size for path in service.settings.work.glob("job-*/keyframe-*")]
        assert sum(written) > 20 * 2**20
        assert await service.board.cancel("slow")
        server.close()

    try:
        serving(tmp_path, scenario, allow_private=("127.0.0.1",))
    finally:
        tracemalloc.stop()


def test_what_was_cancelled_as_its_clip_was_stored_ends_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        loop = asyncio.get_running_loop()
        put = service.files.put

        def cancelled_meanwhile(*given: Any) -> int:
            assert asyncio.run_coroutine_threadsafe(service.board.cancel("a"), loop).result(10)
            return put(*given)

        monkeypatch.setattr(service.files, "put", cancelled_meanwhile)
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, outcome.error_type) == (499, "client_cancelled")
        assert counted(service) == {"499": 1}

    serving(tmp_path, scenario)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("the object store is away"),
    ],
    ids=["full", "objects"],
)
def test_a_clip_is_stored_once_the_object_store_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        real, left = service.files.put, [3]

        def fails(*given: Any, **named: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise failure
            return real(*given, **named)

        monkeypatch.setattr(service.files, "put", fails)
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, left, runner.order) == (200, [0], ["a"])  # and the clip is made once
        objects = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
        assert [path.read_bytes() for path in objects] == [b"clip"]

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


# The board alone


@pytest.fixture
def store(tmp_path: Path) -> SqlStore:
    return SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")


def boarding(store: SqlStore, scenario: Callable[[Board], Awaitable[None]]) -> None:
    async def main() -> None:
        board = Board(store, "me", Metrics(), [APP])
        async with asyncio.timeout(20):
            await scenario(board)

    store.submit(new("a"), limit=9, key_limit=9)
    asyncio.run(main())
    store.close()


def test_a_change_while_a_view_is_loaded_is_seen(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = store.logs

    async def scenario(board: Board) -> None:
        loop, calls = asyncio.get_running_loop(), []

        def slow(request_id: str) -> Any:
            if not calls:
                calls.append(asyncio.run_coroutine_threadsafe(board.cancel("a"), loop).result())
            return logs(request_id)

        monkeypatch.setattr(store, "logs", slow)
        assert (await board.view("a", "k")).row.state == "done"
        known = board.known("a")
        assert known is not None and known.row.state == "done"

    boarding(store, scenario)


def test_lines_of_logs_are_written_once(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, begun, go_on = store.renew, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        go_on.wait()
        return renew(*arguments)

    async def scenario(board: Board) -> None:
        view = await board.claim("a", 30.0)
        assert isinstance(view, View)
        for line in ("one", "two"):
            board.log(view, line)
        renewing = asyncio.create_task(board.renew(30.0))
        await asyncio.to_thread(begun.wait)
        board.log(view, "three")
        finishing = asyncio.create_task(board.finish(view, Outcome(200, {})))
        await asyncio.sleep(0.05)
        go_on.set()
        assert (await renewing, await finishing) == ([], 200)
        assert [line.message for line in store.logs("a")] == ["one", "two", "three"]
        assert not await board.finish(view, Outcome(200, {}))

    monkeypatch.setattr(store, "renew", slow)
    boarding(store, scenario)
