"""An object store whose library fails, not only with OSError: clips and keyframes are tried again, callers are told."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from sparsectrl_lcm.runtime import InvalidRequest
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.auth.api_keys import create_key
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.objects import object_stores
from sparsectrl_lcm.service.objects.object_stores import FilesUnavailable, check_files, open_files
from sparsectrl_lcm.service.objects.stored_files import file_url, keep_file, remove_expired_files
from sparsectrl_lcm.service.settings import DAY

from .stand_in import StandIn, ended, serving, submit, until
from .waiting import SECONDS

pytestmark = pytest.mark.usefixtures("soon")

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


class LibraryError(Exception):
    """As botocore's errors: no OSError."""


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets the next calls of a method of the memory store fail; returns the paths of these calls."""
    system = type(fsspec.filesystem("memory"))

    def let_fail(method: str, times: float = 1) -> list[str]:
        calls: list[str] = []
        works = getattr(system, method)

        def failing(self: Any, *given: Any, **named: Any) -> Any:
            if len(calls) >= times:
                return works(self, *given, **named)
            calls.append(str(given[-1]))
            raise LibraryError("no route to the store\nand more")

        monkeypatch.setattr(system, method, failing)
        return calls

    return let_fail


def test_errors_of_a_library_are_those_of_a_store(fail: Callable[..., list[str]]) -> None:
    files = open_files("memory://errors")
    files.put("a", b"a")
    file = files.open("a")
    calls: dict[str, Callable[[], object]] = {
        "mv": lambda: files.put("b", b"b"),
        "info": lambda: files.open("a"),
        "cat_file": file.read,
        "rm_file": lambda: files.delete("a"),
    }
    for method, call in calls.items():
        fail(method)
        with pytest.raises(FilesUnavailable, match="^no route to the store and more$"):
            call()


def test_a_clip_is_stored_once_the_store_works_again(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        calls = fail("put_file", 3)
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, len(calls), runner.order) == (200, 3, ["a"])
        assert service.metrics.unstored._value.get() == 0

    serving(tmp_path, scenario, files="memory://clips-retried")


def test_a_keyframe_is_read_once_the_store_works_again(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        kept = {"key_id": "k", "name": "a.png", "content_type": "image/png", "seconds": None}
        row = keep_file(service, PNG, **kept)
        calls = fail("cat_file", 2)
        await submit(service, "a", input={"prompt": "a", "keyframe_0_image_url": file_url("http://x", row)})
        assert (await ended(service, "a")).status == 200
        assert len(calls) == 2

    serving(tmp_path, scenario, files="memory://keyframes-retried")


def test_callers_are_told_to_try_again(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        row = keep_file(service, b"a", key_id="k", name="a.png", content_type="image/png", seconds=None)
        path, headers = file_url("", row), {"Authorization": f"Key {create_key(service.store, 'test')}"}
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            fail("put_file")
            fail("info")
            answers = await client.post("/files/upload", content=b"a", headers=headers), await client.get(path)
            for answer in answers:
                told = (answer.status_code, answer.json()["detail"])
                assert told == (503, "The object store does not answer; try again")
                assert int(answer.headers["Retry-After"]) > 0
            assert (await client.get(path)).content == b"a"

    serving(tmp_path, scenario, files="memory://told")


def test_a_cancelled_request_does_not_wait_for_the_store(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        for request_id, cancel in (("a", service.board.cancel), ("b", cancelled_elsewhere)):
            calls = fail("put_file", math.inf)
            await submit(service, request_id)
            await until(lambda: bool(calls))  # noqa: B023 (called at once)
            assert await cancel(request_id)
            assert (await ended(service, request_id)).status == 499

    async def cancelled_elsewhere(request_id: str) -> bool:
        return services[0].store.cancel(request_id, time.time()) is not None

    services: list[Service] = []
    serving(tmp_path, scenario, services.append, files="memory://cancelled")


def test_a_sweep_ends_with_the_first_failure(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    """Each call may take long; the next sweep deletes the rest."""

    async def scenario(service: Service, _: StandIn) -> None:
        for _ in range(3):
            keep_file(service, b"a", key_id="k", name="a.png", content_type="image/png", seconds=1.0)
        calls = fail("rm_file")
        assert (remove_expired_files(service, clock.now() + DAY), len(calls)) == (0, 1)
        assert remove_expired_files(service, clock.now() + DAY) == 3

    serving(tmp_path, scenario, files="memory://swept")


def test_a_store_that_cannot_be_used_is_told_at_the_start(tmp_path: Path, fail: Callable[..., list[str]]) -> None:
    url = "memory://user:secret@place"
    fail("put_file")
    with pytest.raises(InvalidRequest) as told:
        serving(tmp_path, lambda *_: pytest.fail("it started"), files=url)
    assert str(told.value) == (
        "files: memory://place cannot be used (no route to the store and more); "
        "check bucket, endpoint and credentials; docs/service.md says how they are given"
    )
    check_files(url, open_files(url))
    assert not fsspec.filesystem("memory").find("/user:secret@place")


def test_a_silent_store_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its library would wait for minutes."""
    import asyncio

    from fsspec.asyn import AsyncFileSystem

    class Silent(AsyncFileSystem):
        protocol = "silent"

        async def _wait(self, *_: Any, **__: Any) -> None:
            await asyncio.sleep(SECONDS)

        _put_file = _cat_file = _info = _rm_file = _wait  # type: ignore[assignment]

    monkeypatch.setattr(object_stores, "CALL_SECONDS", 0.1)
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr(object_stores, "_WHOLE", {"silent"})
    files = open_files("silent://a")
    begun = time.monotonic()
    for call in (lambda: files.put("b", b"b"), lambda: files.open("a"), lambda: files.delete("a")):
        with pytest.raises(FilesUnavailable, match="it does not answer"):
            call()
    assert time.monotonic() - begun < SECONDS / 2
