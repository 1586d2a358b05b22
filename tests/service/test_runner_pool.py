"""Several runners in one server: real processes, in which a stub makes the clips."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.runner import Event, Job, LocalRunner, Made, RunnerLost, RunnerPool

from .conftest import APP, FAKES, Server, started
from .holds import Hold
from .runner_jobs import failure_of, held_starts, ignore, until
from .waiting import SECONDS, wait_until


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def members() -> dict[str, LocalRunner]:
    return {name: LocalRunner(pipeline="stub_pipeline:load") for name in ("left", "right")}


@pytest.fixture(scope="module")
def pool(loop: asyncio.Runner, members: dict[str, LocalRunner]) -> Iterator[RunnerPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)
        made = RunnerPool(members)
        loop.run(made.start())
        assert (made.capacity, [runner.state for runner in made.runners]) == (0, ["loading", "loading"])
        loop.run(until(lambda: made.capacity == 2))
        yield made
        loop.run(made.stop())


def job(folder: Path, name: str, prompt: str = "slow 0.02", conditioning: str = "", **options: Any) -> Job:
    return Job(name, {"prompt": prompt, "seed": 7, **options}, (), folder / f"{name}.mp4", conditioning)


async def made_together(pool: RunnerPool, *jobs: Job) -> list[Any]:
    """Returns the runner's name or the exception of each job."""
    results = await asyncio.gather(*(pool.run(job, ignore) for job in jobs), return_exceptions=True)
    return [result.runner if isinstance(result, Made) else result for result in results]


def test_each_runner_has_a_job(loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path) -> None:
    states: list[set[str]] = []

    def listen(_: Event) -> None:
        states.append({runner.state for runner in pool.runners})

    async def scenario() -> list[Made]:
        return await asyncio.gather(*(pool.run(job(tmp_path, name), listen) for name in "ab"))

    assert {made.runner for made in loop.run(scenario())} == {"left", "right"}
    assert {"busy"} in states
    assert all((tmp_path / f"{name}.mp4").stat().st_size for name in "ab")


def test_a_crash_ends_its_own_job_only(loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path) -> None:
    with held_starts():
        lost, other = loop.run(made_together(pool, job(tmp_path, "a", "crash"), job(tmp_path, "b", "slow 0.1")))
        assert isinstance(lost, RunnerLost) and lost.kind == "crashed"
        assert other in ("left", "right")
        left = loop.run(made_together(pool, job(tmp_path, "c")))  # at once, by the runner that is left
        assert left == [other]
    loop.run(until(lambda: pool.capacity == 2))


def test_all_die_and_it_goes_on(loop: asyncio.Runner, pool: RunnerPool, members: dict[str, LocalRunner]) -> None:
    with held_starts():
        for runner in members.values():
            os.kill(runner.about["pid"], signal.SIGKILL)
        loop.run(until(lambda: pool.capacity == 0 and pool.problem is not None))
        assert "SIGKILL" in str(pool.problem)
    loop.run(until(lambda: pool.capacity == 2))
    assert pool.problem is None and pool.about["backend"] == "auto"


def test_a_job_goes_where_its_conditioning_is_kept(loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = await made_together(pool, job(tmp_path, "a", "a", "boat"), job(tmp_path, "b", "b", "car"))
        for conditioning, runner in (("car", second), ("boat", first), ("boat", first), ("car", second)):
            assert await made_together(pool, job(tmp_path, "c", "c", conditioning)) == [runner]
        third = await made_together(pool, job(tmp_path, "d", "d", "tree"))  # the one that was free longest
        assert third == [first]
        assert await made_together(pool, job(tmp_path, "g", "g", "lamp")) == [second]
        both = await made_together(pool, job(tmp_path, "e", "e", "car"), job(tmp_path, "f", "f", "car"))
        assert both == [second, first]  # rather than wait for it

    loop.run(scenario())


def test_a_job_goes_where_its_weights_are(loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path) -> None:
    """Conditionings made with other weights are gone."""

    def asking(conditioning: str, weights: str | None = None) -> Job:
        return job(tmp_path, conditioning, "a", conditioning, **({"weights": weights} if weights else {}))

    async def scenario() -> None:
        plain, anime = await made_together(pool, asking("hill"), asking("anime lake", "anime"))
        assert await made_together(pool, asking("anime wood", "anime")) == [anime]
        assert await made_together(pool, asking("anime lake", "anime")) == [anime]
        assert await made_together(pool, asking("rain")) == [plain]
        assert await made_together(pool, asking("snow")) == [plain]  # rather than the one that was free longest
        both = await made_together(pool, asking("x", "anime"), asking("y", "anime"))
        assert both == [anime, plain]  # rather than wait for it
        own = await made_together(pool, asking("z"), asking("anime lake", "anime"))
        assert own == [anime, plain]  # the one that was free longest; the other has the weights, without the lake
        assert await made_together(pool, asking("hill")) == [anime]

    loop.run(scenario())


def test_a_new_process_keeps_no_conditioning(loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path) -> None:
    async def scenario() -> None:
        first, _ = await made_together(pool, job(tmp_path, "a", "a", "ship"), job(tmp_path, "b", "b", "bike"))
        (lost,) = await made_together(pool, job(tmp_path, "c", "crash", "bike"))
        assert isinstance(lost, RunnerLost)
        await until(lambda: pool.capacity == 2)
        assert await made_together(pool, job(tmp_path, "d", "d", "bike")) == [first]

    loop.run(scenario())


def test_a_job_is_cancelled_wherever_it_runs(
    loop: asyncio.Runner, pool: RunnerPool, tmp_path: Path, hold: Hold
) -> None:
    async def scenario() -> None:
        jobs = [asyncio.create_task(failure_of(pool.run(job(tmp_path, name, hold.prompt), ignore))) for name in "ab"]
        await until(lambda: all(runner.state == "busy" for runner in pool.runners))
        pool.cancel("b")
        async with asyncio.timeout(SECONDS):
            assert (await jobs[1]).kind == "cancelled"
        assert not jobs[0].done()
        pool.cancel("a")
        assert (await jobs[0]).kind == "cancelled"

    loop.run(scenario())


def test_wrong_options_of_one_runner_leave_it_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)

    async def scenario(*backends: str) -> None:
        runners = {name: LocalRunner(pipeline="stub_pipeline:load", backend=name) for name in backends}
        pool = RunnerPool(runners)
        refused = asyncio.create_task(pool.refused())
        await pool.start()
        try:
            if "auto" in backends:
                await until(lambda: pool.capacity == 1 and pool.runners[0].state == "failed")
                assert await made_together(pool, job(tmp_path, "a"), job(tmp_path, "b")) == ["auto", "auto"]
                assert not refused.done()
            else:
                async with asyncio.timeout(SECONDS):
                    assert str(await refused) == "bundle: the stub's is wrong"
        finally:
            refused.cancel()
            await pool.stop()

    asyncio.run(scenario("refused", "auto"))
    left_out = "a runner is left out: bundle: the stub's is wrong"
    assert [vars(record)["runner"] for record in caplog.records if record.message == left_out] == ["refused"]
    asyncio.run(scenario("refused", "unusable"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pool")
    yield from started(folder, pipeline="stub_pipeline:load", runners=2, retries=0)


def test_a_server_with_two_runners(server: Server, hold: Hold) -> None:
    with httpx.Client(headers=server.headers()) as client:

        def submit(prompt: str) -> str:
            answer = client.post(server.queue, json={"prompt": prompt, "seed": 1})
            return str(answer.json()["status_url"])

        def state(url: str) -> str:
            return str(client.get(url).json()["status"])

        urls = [submit(prompt) for prompt in (hold.prompt, hold.prompt, "slow 0")]
        wait_until(lambda: [state(url) for url in urls[:2]] == ["IN_PROGRESS"] * 2)
        assert state(urls[2]) == "IN_QUEUE"
        ready = client.get(server.url + "/readyz").json()["endpoints"][APP]
        assert ready["runners"] == [{"name": "runner-0", "state": "busy"}, {"name": "runner-1", "state": "busy"}]
        hold.let_go()
        wait_until(lambda: all(state(url) == "COMPLETED" for url in urls))
        lost, other = submit("crash"), submit("slow 0.1")
        wait_until(lambda: state(lost) == state(other) == "COMPLETED")
        assert [client.get(url.removesuffix("/status")).status_code for url in (lost, other)] == [500, 200]
        line = f'runner_ready{{endpoint="{APP}",runner="runner-1"}} 1.0'
        wait_until(lambda: line in client.get(server.url + "/metrics").text)
        metrics = client.get(server.url + "/metrics").text
    logged = [(line["runner"], line) for line in map(json.loads, server.log.splitlines()) if "runner" in line]
    assert {line["endpoint"] for _, line in logged} == {APP}
    ready = [name for name, line in logged if line["message"] == "the runner is ready" and line["backend"] == "auto"]
    (died,) = (name for name, line in logged if line["message"].startswith("the runner was lost: "))
    assert f'runner_lost_total{{endpoint="{APP}",kind="crashed",runner="{died}"}} 1.0' in metrics
    assert set(ready) == {"runner-0", "runner-1"}
    assert [name for name, line in logged if line["message"] == "the last words"] == [died]
