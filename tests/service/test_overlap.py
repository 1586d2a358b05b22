"""A runner makes the next clip while the one before is encoded and stored."""

import asyncio
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.stub_pipeline import StubPipeline
from sparsectrl_lcm.runtime.output import video
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.queue import next_requests
from sparsectrl_lcm.service.runner import Encoding, Job, Made, OnEvent, RunnerLost, RunnerPool
from sparsectrl_lcm.service.runner.clip_jobs import ClipOrder, Jobs
from sparsectrl_lcm.service.store import tables
from sqlalchemy import func, select

from .runner_jobs import ignore, job
from .stand_in import StandIn, ended, serving, submit, until
from .waiting import SECONDS


class Reports:
    """What a job in the runner's process says."""

    def __init__(self) -> None:
        self.cancelled = Event()
        self.said: list[str] = []

    def say(self, what: str, **_: Any) -> None:
        self.said.append(what)


def order(prompt: str, output: Path) -> ClipOrder:
    return ClipOrder({"prompt": prompt}, [], str(output))


def test_the_pipeline_is_free_while_a_clip_is_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encode, go_on = video.encode, Event()

    def held(*given: Any) -> None:
        assert go_on.wait(SECONDS)
        encode(*given)

    monkeypatch.setattr(video, "encode", held)
    jobs = Jobs(StubPipeline(None, "stub", None), 10**6)
    first, second, failed = Reports(), Reports(), Reports()
    jobs.make(first, order("a", tmp_path / "first.mp4"))
    jobs.make(failed, order("fail", tmp_path / "failed.mp4"))
    assert (first.said[-1], failed.said[-1]) == ("encoding", "failed")
    assert not (tmp_path / "first.mp4").exists()
    go_on.set()
    jobs.make(second, order("b", tmp_path / "second.mp4"))
    assert first.said[-1] == "made"  # before the second is encoded: at most one clip waits for that
    jobs.finish()
    assert second.said[-2:] == ["encoding", "made"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.mp4", "second.mp4"]


def test_a_clip_that_cannot_be_encoded_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    jobs = Jobs(StubPipeline(None, "stub", None), 10**6)
    with monkeypatch.context() as patched:
        patched.setattr(video, "encode", full)
        jobs.make(first := Reports(), order("a", tmp_path / "first.mp4"))
        jobs.finish()
    jobs.make(second := Reports(), order("b", tmp_path / "second.mp4"))
    jobs.finish()
    assert (first.said[-1], second.said[-1]) == ("failed", "made")


def test_the_next_request_begins_while_clips_are_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But only so many: their clips take room."""

    async def scenario(service: Service, runner: StandIn) -> None:
        run = runner.run

        async def encode_at_once(given: Job, on_event: OnEvent) -> Made:
            on_event(Encoding())
            return await run(given, on_event)

        runner.run = encode_at_once  # type: ignore[method-assign]
        runner.hold.clear()
        for name in "abcde":
            await submit(service, name)
        await until(lambda: len(runner.order) == 3)
        await asyncio.sleep(0.2)
        assert runner.order == ["a", "b", "c"]
        assert (await service.board.view("d", "k")).row.state == "queued"
        runner.hold.set()
        for name in "abcde":
            assert (await ended(service, name)).status == 200
        assert runner.order == list("abcde")

    serving(tmp_path, scenario)


def test_a_request_whose_runner_was_stopped_is_tried_again_without_blame(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        run, left = runner.run, [RunnerLost("stopped", "stopped")] * 3 + [RunnerLost("crashed", "its own")]

        async def lost(given: Job, on_event: Any) -> Made:
            if left:
                raise left.pop(0)
            return await run(given, on_event)

        runner.run = lost  # type: ignore[method-assign]
        await submit(service, "a")
        assert (await ended(service, "a")).status == 200
        (lost_runners,) = service.metrics.lost.collect()
        counts = {each.labels["kind"]: each.value for each in lost_runners.samples if each.name.endswith("_total")}
        assert counts == {"crashed": 1}
        told = [line.message for line in (await service.board.view("a", "k")).logs[:4]]
        assert told == ["The request waits again: stopped"] * 3 + ["The runner was lost: its own"]

    serving(tmp_path, scenario, retries=1)


def test_a_pool_gives_the_next_job_to_the_runner_that_encodes(tmp_path: Path) -> None:
    async def scenario() -> None:
        given: list[str] = []
        go_on = asyncio.Event()

        def member(name: str, encodes: bool) -> Any:
            async def run(_: Job, on_event: OnEvent) -> Made:
                given.append(name)
                if encodes:
                    on_event(Encoding())
                await go_on.wait()
                return Made(1, 0.1, {}, 16)

            return SimpleNamespace(ready=True, problem=None, run=run)

        pool = RunnerPool({"slow": member("slow", False), "quick": member("quick", True)})
        tasks = [asyncio.create_task(pool.run(job(tmp_path, name=name), ignore)) for name in "abc"]
        await until(lambda: len(given) == 3)
        assert given == ["slow", "quick", "quick"]
        assert [runner.state for runner in pool.runners] == ["busy", "ready"]
        go_on.set()
        assert [(await task).runner for task in tasks] == given

    asyncio.run(scenario())


def test_a_clip_has_a_record_only_if_it_is_stored(tmp_path: Path) -> None:
    """From the start of its request, so that no crash leaves bytes without one."""

    def records(service: Service) -> list[int]:
        with service.store.engine.connect() as connection:
            return list(connection.execute(select(tables.files.c.size)).scalars())

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.hold.clear()
        runner.lose = 2  # the second time, it fails
        await submit(service, "a")
        await until(lambda: runner.order == ["a"])
        assert records(service) == [0]
        runner.hold.set()
        assert (await ended(service, "a")).status == 500
        assert records(service) == []
        await submit(service, "b")
        assert (await ended(service, "b")).status == 200
        assert records(service) == [len(b"clip")]

    serving(tmp_path, scenario)


def test_requests_that_wait_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each takes as few transactions as it can: its start, and its end with its clip."""

    async def scenario(service: Service, runner: StandIn) -> None:
        calls: dict[str, int] = {}

        def counted(name: str) -> None:
            method = getattr(service.store, name)

            def call(*given: Any, **named: Any) -> Any:
                calls[name] = calls.get(name, 0) + 1
                return method(*given, **named)

            monkeypatch.setattr(service.store, name, call)

        monkeypatch.setattr(next_requests, "OWN_SECONDS", SECONDS)
        runner.hold.clear()
        for number in range(30):
            await submit(service, f"{number}")
        await until(lambda: len(runner.order) == 1)
        for name in ("ahead", "claim", "finish", "add_file", "get_file"):
            counted(name)
        runner.hold.set()
        for number in range(30):
            assert (await ended(service, f"{number}")).status == 200
        assert (calls.pop("claim"), calls.pop("finish")) == (29, 30)
        assert calls.pop("ahead") < 20 and not calls

    serving(tmp_path, scenario)


def test_a_clip_whose_record_expired_has_one_again(tmp_path: Path) -> None:
    """An outage of the object store may take longer than a record without a clip stays."""

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.hold.clear()
        await submit(service, "a")
        await until(lambda: runner.order == ["a"])
        with service.store.engine.begin() as connection:
            connection.execute(tables.files.delete())
        runner.hold.set()
        url = (await ended(service, "a")).body["video"]["url"]
        with service.store.engine.connect() as connection:
            assert connection.execute(select(func.count()).select_from(tables.files)).scalar_one() == 1
        assert service.store.get_file(url.split("/")[-2]) is not None

    serving(tmp_path, scenario)
