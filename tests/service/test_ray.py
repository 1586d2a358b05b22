"""Runners on a Ray cluster of two nodes on this machine: not on that of the server. A stub makes the clips."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from sparsectrl_lcm.batch import ray_pipelines
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.runner import Event, Job, JobFailed, Made, Preview, RunnerLost, Step
from sparsectrl_lcm.service.runner.ray_pool import RayPool

from .conftest import APP, FAKES, manifest_alone, started
from .holds import Hold
from .runner_jobs import decode, failure_of, ignore, until


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The head of a cluster, whose processes find the stub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=4)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def ray_pool(address: str, replicas: tuple[int, int] = (1, 2), **options: Any) -> RayPool:
    given = {"bundle": None, "backend": "auto", "precision": None, "threads": 1, **options}
    setup = {"pipeline": "stub_pipeline:load", "options": given, "image_pixels": 1_000_000}
    return RayPool(address=address, replicas=replicas, gpus=0, setup=setup, step_seconds=20)


@pytest.fixture(scope="module")
def pool(loop: asyncio.Runner, address: str) -> Iterator[RayPool]:
    made = ray_pool(address)
    loop.run(made.start())
    loop.run(until(lambda: made.capacity > 0, 180))
    yield made
    loop.run(made.stop())


def job(folder: Path, name: str, prompt: str = "a boat", **more: Any) -> Job:
    return Job(name, {"prompt": prompt, "seed": 7}, more.pop("keyframes", ()), folder / f"{name}.mp4", **more)


def test_a_clip_with_its_events(loop: asyncio.Runner, pool: RayPool, tmp_path: Path) -> None:
    assert (pool.about["backend"], pool.about["width"], pool.capacity) == ("auto", 64, 2)
    events: list[Event] = []
    made = loop.run(pool.run(job(tmp_path, "a", conditioning="boat", previews=True), events.append))
    assert (made.seed, made.frames, len(decode(tmp_path / "a.mp4"))) == (7, 16, 16)
    assert made.runner in {runner.name for runner in pool.runners}
    assert [event.step for event in events if isinstance(event, Step) and event.stage == "denoise"] == [0, 1, 2, 3, 4]
    assert [event.index for event in events if isinstance(event, Preview)] == [8, 8, 8, 8, 0, 8]


def test_a_wrong_keyframe_is_an_error_of_the_job(loop: asyncio.Runner, pool: RayPool, tmp_path: Path) -> None:
    (tmp_path / "keyframe").write_bytes(b"no picture")
    wrong = job(tmp_path, "a", keyframes=((3, tmp_path / "keyframe"),))
    failed = loop.run(failure_of(pool.run(wrong, ignore)))
    assert isinstance(failed, JobFailed) and (failed.kind, failed.keyframe) == ("invalid", 0)


def test_cancelled_within_a_step(loop: asyncio.Runner, pool: RayPool, tmp_path: Path, hold: Hold) -> None:
    async def scenario() -> None:
        steps: list[Event] = []
        running = asyncio.create_task(failure_of(pool.run(job(tmp_path, "a", hold.prompt), steps.append)))
        await until(lambda: len(steps) > 1)
        pool.cancel("a")
        failed = await running
        assert isinstance(failed, JobFailed) and failed.kind == "cancelled"
        await pool.run(job(tmp_path, "b"), ignore)

    loop.run(scenario())


@pytest.mark.slow
def test_replicas_follow_the_requests(loop: asyncio.Runner, pool: RayPool, tmp_path: Path) -> None:
    """A second replica starts while requests wait. One that dies takes only its own job with it."""

    async def scenario() -> None:
        jobs = [asyncio.create_task(pool.run(job(tmp_path, f"{number}", "slow 0.5"), ignore)) for number in range(8)]
        await until(lambda: [runner.state for runner in pool.runners] == ["busy", "busy"], 60)
        assert all(isinstance(made, Made) for made in await asyncio.gather(*jobs))
        lost, *others = await asyncio.gather(
            failure_of(pool.run(job(tmp_path, "crash", "crash"), ignore)),
            *(pool.run(job(tmp_path, f"{number}", "slow 0.1"), ignore) for number in range(3)),
        )
        assert isinstance(lost, RunnerLost) and lost.kind == "crashed"
        assert all(isinstance(made, Made) for made in others)

    loop.run(scenario())


@pytest.mark.slow
def test_jobs_go_to_the_replica_that_has_their_weights(loop: asyncio.Runner, address: str, tmp_path: Path) -> None:
    chosen = ray_pool(address, (2, 2), weights={"anime": "bundle"})

    async def process(name: str | None) -> int:
        options = {"prompt": "process", **({"weights": name} if name else {})}
        return (await chosen.run(Job(str(name), options, (), tmp_path / f"{name}.mp4", "boat"), ignore)).seed

    async def scenario() -> None:
        await chosen.start()
        await until(lambda: [runner.state for runner in chosen.runners] == ["ready", "ready"], 180)
        own, anime = await asyncio.gather(process(None), process("anime"))
        assert own != anime
        await asyncio.sleep(3)  # Ray tells its routers once a second
        for name, expected in ((None, own), (None, own), ("anime", anime), ("anime", anime), (None, own)) * 2:
            assert await process(name) == expected
        await chosen.stop()

    loop.run(scenario())


@pytest.mark.slow
def test_options_that_no_replica_can_load(address: str) -> None:
    async def scenario() -> str:
        pool = ray_pool(address, backend="refused")
        await pool.start()
        try:
            async with asyncio.timeout(90):
                return str(await pool.refused())
        finally:
            await pool.stop()

    assert asyncio.run(scenario()) == "pool: no replica could load: bundle: the stub's is wrong"


@pytest.mark.slow
def test_jobs_end_with_the_pool(loop: asyncio.Runner, address: str, pool: RayPool, tmp_path: Path, hold: Hold) -> None:
    """As lost, not as cancelled: their requests wait again. What shares the replicas with it goes on."""

    async def scenario() -> Any:
        other = ray_pool(address)
        await other.start()
        await until(lambda: other.capacity > 0)
        steps: list[Event] = []
        running = asyncio.create_task(failure_of(other.run(job(tmp_path, "a", hold.prompt), steps.append)))
        await until(lambda: len(steps) > 1)
        await other.stop()
        return await running

    lost = asyncio.run(scenario())
    assert isinstance(lost, RunnerLost) and lost.kind == "stopped"
    assert pool.capacity > 0
    assert loop.run(pool.run(job(tmp_path, "b"), ignore)).seed == 7


@pytest.mark.slow
def test_servers_that_start_at_once_deploy_once(address: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        loads_once = {"backend": "lost", "bundle": str(tmp_path / "loaded")}
        pools = [ray_pool(address, (1, 1), **loads_once) for _ in range(2)]
        for pool in pools:
            await pool.start()
        await until(lambda: all(pool.capacity for pool in pools), 60)
        await asyncio.sleep(3)
        assert pools[0].about["pid"] == pools[1].about["pid"]
        assert [(pool.problem, [runner.state for runner in pool.runners]) for pool in pools] == [(None, ["ready"])] * 2
        for pool in pools:
            await pool.stop()

    asyncio.run(scenario())


@pytest.mark.slow
def test_replicas_that_were_shut_down(loop: asyncio.Runner, pool: RayPool, tmp_path: Path) -> None:
    """A server that runs deploys them again."""
    from ray import serve

    async def scenario() -> Made:
        await asyncio.to_thread(serve.shutdown)
        await until(lambda: pool.capacity == 0)
        await until(lambda: pool.capacity > 0, 90)
        return await pool.run(job(tmp_path, "a"), ignore)

    assert loop.run(scenario()).seed == 7


@pytest.mark.slow
def test_a_server_on_the_cluster(address: str, tmp_path: Path, hold: Hold) -> None:
    """A server that is killed finds the replicas of its two bundles again, and its request runs to its end."""
    endpoints = {APP: manifest_alone(tmp_path / "11"), "me/other": manifest_alone(tmp_path / "22")}
    settings = {"pool": "ray", "ray_address": address, "gpus_per_replica": 0.0}
    settings |= {"pipeline": "stub_pipeline:load_numbered", "endpoints": endpoints}
    for server in started(tmp_path, **settings):
        server.wait("/readyz", 90)
        with httpx.Client(headers=server.headers()) as client:
            first = client.post(f"{server.url}/fal-ai/animatediff-sparsectrl-lcm", json={"prompt": "a", "seed": 3})
            assert (first.status_code, first.json()["seed"]) == (200, 3)
            both = [client.post(f"{server.url}/{name}", json={"prompt": "a"}) for name in (APP, "me/other")]
            assert [answer.json()["seed"] for answer in both] == [11, 22]
            url = client.post(server.queue, json={"prompt": hold.prompt, "seed": 4}).json()["response_url"]
            server.kill()
            hold.let_go()
            server.start()
            server.wait("/readyz", 90)
            answer = client.get(url, timeout=30)
            while answer.status_code == 400:  # not ready
                answer = client.get(url, timeout=30)
            assert (answer.status_code, answer.json()["seed"]) == (200, 4)
            ready = client.get(server.url + "/readyz").json()["endpoints"].values()
            assert [runner["state"] for each in ready for runner in each["runners"]] == ["ready"] * 2


@pytest.mark.slow
def test_a_batch_on_the_cluster(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The clips are those of a batch without Ray, bit for bit, and so are errors and warnings."""
    sketch = Image.new("L", (128, 128))
    sketch.paste(255, (40, 40, 44, 90))
    sketch.save(tmp_path / "sketch.png")
    line = {"prompt": "a red star", "keyframes": [{"index": 0, "image": "sketch.png"}], "frames": 8, "seeds": 2}
    Image.new("L", (128, 128)).save(tmp_path / "black.png")
    pictures = [{"index": index, "image": f"{name}.png"} for index, name in enumerate(("black", "none"))]
    lines = [line | {"seed": 5}, {"prompt": "a", "keyframes": pictures}]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["batch", str(tmp_path / "requests.jsonl"), "--backend", "onnxruntime", "--threads", "1"]
    on_ray = ["--pool", "ray", "--ray-address", address, "--gpus-per-replica", "0", "--replicas", "2"]
    for arguments in (["-o", str(tmp_path / "local")], ["-o", str(tmp_path / "ray"), *on_ray]):
        assert run([*given, *arguments]) == 1
        assert "line 2: keyframe 0 is all black" in capsys.readouterr().err
    local, remote = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.mp4")} for name in ("local", "ray")
    )
    assert len(local) == 2 and local == remote
    told = [
        {line["id"]: line.get("error") for line in map(json.loads, (tmp_path / name / "results.jsonl").open())}
        for name in ("local", "ray")
    ]
    assert told[0] == told[1] and sum(error is not None for error in told[0].values()) == 1


@pytest.mark.slow
def test_a_batch_without_the_pipelines_that_cannot_load(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one cannot load, and the cluster has no room for the last ones: the others make all clips."""

    class Pipeline(ray_pipelines.RemotePipeline):
        def __init__(self, bundle: str | None, options: dict[str, Any]) -> None:
            with suppress(FileExistsError):
                (tmp_path / "begun").mkdir()
                raise BackendError("backend", "this node has no engines")
            super().__init__(bundle, options)

    monkeypatch.setattr(ray_pipelines, "RemotePipeline", Pipeline)
    monkeypatch.chdir(tmp_path)  # not the folder of Ray's processes
    Path("demo").symlink_to(demo_bundle())
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": "a red star", "frames": 2, "seeds": 6}))
    given = ["batch", "requests.jsonl", "-o", "out", "--bundle", "demo", "--backend", "onnxruntime"]
    on_ray = ["--pool", "ray", "--ray-address", address, "--gpus-per-replica", "0", "--replicas", "6"]
    assert run([*given, *on_ray]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 6
    assert caplog.messages == ["a pipeline is left out, since it could not load: backend: this node has no engines"]


@pytest.mark.slow
def test_a_batch_for_which_no_pipeline_can_load(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": "a red star"}))
    given = ["batch", str(tmp_path / "requests.jsonl"), "-o", str(tmp_path / "out"), "--bundle", "none"]
    on_ray = ["--pool", "ray", "--ray-address", address, "--gpus-per-replica", "0", "--replicas", "2"]
    assert run([*given, *on_ray]) == 2
    assert f"error: --pool: no pipeline could load: bundle: '{Path('none').absolute()}" in capsys.readouterr().err
