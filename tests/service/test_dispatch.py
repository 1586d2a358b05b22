"""Which requests a dispatcher begins, and when: with a stand-in for the runner."""

import asyncio
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.queue import dispatcher as dispatch
from sparsectrl_lcm.service.queue import job_preparation as preparation
from sparsectrl_lcm.service.runner.picture_reader import PictureReader

from .stand_in import StandIn, counted, ended, serving, submit, until
from .waiting import SECONDS

pytestmark = pytest.mark.usefixtures("soon")


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


def test_only_what_runs_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one clip is made, the next request still waits: a later one of normal priority passes a low one."""

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.hold.clear()
        await submit(service, "first")
        await until(lambda: runner.order == ["first"])
        await submit(service, "low", priority=1)
        await submit(service, "late", start_by=time.time() + SECONDS)
        await asyncio.sleep(0.15)
        states = [(await service.board.view(name, "k")).row.state for name in ("first", "low", "late")]
        assert states == ["running", "queued", "queued"]
        await submit(service, "normal")
        now = clock.now
        monkeypatch.setattr(clock, "now", lambda: now() + SECONDS)
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

    def written(service: Service) -> int:
        return sum(path.stat().st_size for path in service.settings.work.glob("job-*/keyframe-*"))

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
        await until(lambda: written(service) > 20 * 2**20 and tracemalloc.get_traced_memory()[0] < 4 * 2**20)
        assert await service.board.cancel("slow")
        server.close()

    try:
        serving(tmp_path, scenario, allow_private=("127.0.0.1",))
    finally:
        tracemalloc.stop()
