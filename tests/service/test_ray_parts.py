"""What a replica on Ray and its server say to each other, without a cluster."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
from sparsectrl_lcm.service.objects.object_stores import on_every_machine
from sparsectrl_lcm.service.runner import JobFailed, Made, RunnerLost, Step, ray_pool
from sparsectrl_lcm.service.runner import ray_replica as replica
from sparsectrl_lcm.service.runner.ray_pool import RayPool

from .runner_jobs import failure_of, ignore, job
from .waiting import SECONDS

MADE = {"seed": 7, "seconds": 0.1, "timings": {"total": 0.1}, "frames": 16}
REPLICA = {"runner": "replica-2", "node": "10.0.0.1"}


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "get_node_ip_address", lambda: REPLICA["node"])
    context = SimpleNamespace(rank=SimpleNamespace(rank=2))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: context)


def step(number: int) -> dict[str, Any]:
    return {"stage": "denoise", "step": number, "steps": 4, "fraction": number / 4}


def said(scenario: Any, clip: Path, place: tuple[str, str] | None = None) -> list[list[dict[str, Any]]]:
    """What travels of a job that says what the scenario says, in a thread as the pipeline does."""

    async def main() -> list[list[dict[str, Any]]]:
        channel = replica._Channel(clip, place)
        talking = asyncio.create_task(asyncio.to_thread(scenario, channel.say))
        async with asyncio.timeout(SECONDS / 2):
            parts = [part async for part in channel.parts()]
        await talking
        return parts

    return asyncio.run(main())


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the clip")
    return path


def test_messages_that_come_together_travel_together(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.setattr(replica, "GATHER_SECONDS", SECONDS)

    def talk(say: Any) -> None:
        for number in range(3):
            say("step", **step(number))
        say("encoding")
        say("made", **MADE)

    (part,) = said(talk, clip)
    assert [message["say"] for message in part] == ["step", "step", "step", "made"]
    assert part[-1]["clip"] == b"the clip"
    monkeypatch.setattr(replica, "GATHER_SECONDS", 0.0)
    parts = said(talk, clip)
    assert [message["say"] for part in parts for message in part] == ["step", "step", "step", "made"]


def test_all_that_a_short_job_says_travels_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replica, "GATHER_SECONDS", SECONDS)

    def make(reports: Any, order: Any) -> None:
        Path(order.output).write_bytes(b"the clip")
        reports.say("made", **MADE)

    clips = replica.ClipReplica.__new__(replica.ClipReplica)  # without a pipeline, and without a cluster
    clips._jobs, clips._thread = Mock(make=make), ThreadPoolExecutor(1)

    async def main() -> list[list[dict[str, Any]]]:
        return [part async for part in clips.make({}, [], False, "clip.mp4", 8.0, None)]

    ((begun, made),) = asyncio.run(main())
    assert [begun, made] == [*BEGUN, {"say": "made", **MADE, "clip": b"the clip"}]


def test_a_node_that_reaches_the_store_writes_the_clip_there(clip: Path) -> None:
    ((made,),) = said(lambda say: say("made", **MADE), clip, ("memory://clips-of-nodes", "objects/a-1"))
    assert made == {"say": "made", **MADE, "stored": len(b"the clip")}
    assert fsspec.filesystem("memory").cat_file("/clips-of-nodes/objects/a-1") == b"the clip"


def test_a_node_that_does_not_sends_the_clip(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    ((made,),) = said(lambda say: say("made", **MADE), clip, ("unknown://bucket", "objects/a-1"))
    assert (made["clip"], "stored" in made) == (b"the clip", False)
    assert caplog.messages[0].startswith("the server stores a clip, since this node cannot: files: unknown://")


def test_a_cancelled_clip_is_not_stored(clip: Path) -> None:
    async def main() -> None:
        channel = replica._Channel(clip, ("memory://cancelled-clips", "objects/a-1"))
        channel.cancelled.set()
        channel.say("made", **MADE)

    asyncio.run(main())
    assert not fsspec.filesystem("memory").exists("/cancelled-clips/objects/a-1")


class Stream:
    """The answer of a replica: its parts, then its end, or silence if the job has not ended."""

    def __init__(self, *parts: Any) -> None:
        self.parts = self._parts(parts)
        self.cancel = Mock()
        self.ended = False

    async def _parts(self, parts: Any) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part
        if not parts or parts[-1][-1]["say"] not in replica.LAST:
            await asyncio.sleep(SECONDS)
        self.ended = True

    def __aiter__(self) -> Any:
        return self

    def __anext__(self) -> Any:
        return self.parts.__anext__()


def run(folder: Path, *parts: Any, on_event: Any = ignore, **limits: float) -> Any:
    """The outcome of a job on a replica that answers so."""
    options = {"step_seconds": SECONDS, "start_seconds": SECONDS, **limits}
    pool = RayPool(address="auto", replicas=(1, 1), gpus=0, setup={"options": {}}, **options)
    pool._handle = handle = Mock()
    handle.options.return_value.make.remote.return_value = stream = Stream(*parts)

    async def main() -> Any:
        pool._supervisor = asyncio.create_task(asyncio.sleep(60))
        async with asyncio.timeout(SECONDS / 2):
            made = pool.run(job(folder), on_event)
            return await (made if parts and "made" in str(parts[-1]) else failure_of(made))

    outcome = asyncio.run(main())
    assert stream.cancel.called
    assert stream.ended == isinstance(outcome, Made | JobFailed)  # then the replica is free
    return outcome


BEGUN = [{"say": "begun", **REPLICA}]


def test_a_clip_comes_by_value_or_is_stored(tmp_path: Path) -> None:
    events: list[Any] = []
    last = [{"say": "step", **step(1)}, {"say": "made", **MADE, "clip": b"the clip"}]
    made = run(tmp_path, BEGUN, last, on_event=events.append)
    assert (made, events) == (Made(**MADE, runner="replica-2"), [Step(**step(1))])
    assert (tmp_path / "job.mp4").read_bytes() == b"the clip"
    made = run(tmp_path, BEGUN, [{"say": "made", **MADE, "stored": 8}])
    assert made == Made(**MADE, runner="replica-2", stored=8)


def test_a_failed_job(tmp_path: Path) -> None:
    failed = run(
        tmp_path, BEGUN, [{"say": "failed", "kind": "failed", "message": "no", "field": None, "keyframe": None}]
    )
    assert isinstance(failed, JobFailed) and failed.message == "no"


def test_a_replica_that_dies_is_named_if_it_has_begun(tmp_path: Path) -> None:
    lost = [run(tmp_path, *parts, OSError("gone")) for parts in ((), (BEGUN,))]
    assert [(each.kind, each.runner, each.message) for each in lost] == [
        ("crashed", "", "the replica was lost: gone"),
        ("crashed", "replica-2", "the replica on 10.0.0.1 was lost: gone"),
    ]


def test_replicas_have_the_names_that_their_jobs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = running_pool(monkeypatch)
    pool._states, pool._jobs = {"RUNNING": 2, "STARTING": 1}, {"a": Mock(runner="replica-1"), "b": Mock(runner="")}
    states = {runner.name: runner.state for runner in pool.runners}
    assert states == {"replica-0": "ready", "replica-1": "busy", "replica-2": "loading"}


def test_a_replica_that_falls_silent_is_lost(tmp_path: Path) -> None:
    lost = run(tmp_path, BEGUN, [{"say": "step", **step(1)}], step_seconds=0.1)
    assert isinstance(lost, RunnerLost) and (lost.kind, lost.runner) == ("hung", "replica-2")
    assert lost.message == "the replica on 10.0.0.1 said nothing for 0.1 s"


def test_a_job_that_no_replica_takes_waits_again(tmp_path: Path) -> None:
    lost = run(tmp_path, start_seconds=0.1)
    assert isinstance(lost, RunnerLost) and (lost.kind, lost.message) == (
        "stopped",
        "no replica took the job for 0.1 s",
    )


def running_pool(monkeypatch: pytest.MonkeyPatch) -> RayPool:
    """A pool with a replica that is busy without end."""
    pool = RayPool(address="auto", replicas=(1, 1), gpus=0, setup={"options": {}}, step_seconds=10)
    pool._handle = Mock()
    pool._handle.about.remote.side_effect = lambda: asyncio.sleep(60)
    clips = SimpleNamespace(replica_states={"RUNNING": 1}, message="")
    status = SimpleNamespace(status="RUNNING", deployments={"clips": clips})
    monkeypatch.setattr(pool, "_status", lambda: status)
    return pool


def looked(pool: RayPool) -> BaseException | None:
    """The error with which a look at the replicas ended, which may not take long."""

    async def main() -> BaseException | None:
        looking = asyncio.create_task(pool._look())
        done, _ = await asyncio.wait({looking}, timeout=SECONDS / 2)
        assert done
        return looking.exception()

    return asyncio.run(main())


def test_a_server_is_ready_while_all_replicas_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {"backend": "tensorrt", "pid": 1}
    monkeypatch.setattr(ray_pool, "published_about", lambda _: published, raising=False)
    pool = running_pool(monkeypatch)
    assert looked(pool) is None
    assert (pool.about, pool.capacity) == (published, 1)


def test_a_server_knows_what_the_replica_that_started_last_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[dict[str, Any]] = [{"frames": 16}, {"frames": 24}, {}]
    monkeypatch.setattr(ray_pool, "published_about", lambda _: published.pop(0))
    pool = running_pool(monkeypatch)
    known = [pool.about["frames"] for _ in range(3) if looked(pool) is None]
    assert known == [16, 24, 24], "also while the cluster has forgotten it"


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "ANSWER_SECONDS", 0.05, raising=False)
    pool, silence = running_pool(monkeypatch), threading.Event()
    monkeypatch.setattr(pool, "_status", silence.wait)
    try:
        assert isinstance(looked(pool), TimeoutError)
    finally:
        silence.set()


def test_stores_that_every_machine_reaches() -> None:
    given = {
        "s3://bucket/files": True,
        "gs://bucket": True,
        "/srv/files": False,
        "file:///srv": False,
        "memory://a": False,
    }
    assert {url: on_every_machine(url) for url in given} == given
