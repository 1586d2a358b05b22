"""One server with several bundles, each under its own endpoint name."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.runtime.errors import BundleError, SparseCtrlLcmError
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.runner import make_runners as making
from sparsectrl_lcm.service.server import open_service, running, serve
from sparsectrl_lcm.service.settings import Settings
from starlette.testclient import TestClient

from .conftest import Server, manifest_alone, ports, started
from .holds import Hold
from .loop_time import pass_on
from .stand_in import StandIn, ended, new, submit, until
from .test_python_client import python
from .waiting import SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("soon")

ONE, OTHER = "me/portraits", "me/landscapes"
DRAIN_SECONDS = SECONDS / 2
SEEDS = {ONE: 11, OTHER: 22}


def both(folder: Path, **settings: Any) -> tuple[Service, StandIn, StandIn]:
    runners = StandIn(), StandIn()
    settings = {"anonymous": True, "endpoints": {ONE: None, OTHER: None}, "drain_seconds": 1.0} | settings
    return open_service(Settings(folder, **settings), *runners), *runners


# One server in a process of its own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its clips have the seeds of their bundles unless the request gives one."""
    folder = tmp_path_factory.mktemp("two")
    endpoints = {name: manifest_alone(folder / str(seed)) for name, seed in SEEDS.items()}
    options: dict[str, Any] = {"pipeline": "stub_pipeline:load_numbered", "retries": 0}
    for made in started(folder, endpoints=endpoints, **options):
        made.wait()
        yield made


def test_fals_client_gets_each_clip_from_its_own_bundle(server: Server) -> None:
    program = f"""
import fal_client, json
seeds = {{}}
for name in {list(SEEDS)}:
    handle = fal_client.submit(name, {{"prompt": "a"}})
    states = list(handle.iter_events(with_logs=True, interval=0.05))
    streamed = [event for event in fal_client.stream(name, {{"prompt": "b"}})]
    run = fal_client.run(name, {{"prompt": "c"}})
    assert type(states[-1]).__name__ == "Completed", states
    seeds[name] = [handle.get()["seed"], streamed[-1]["seed"], run["seed"]]
print(json.dumps(seeds))
"""
    assert json.loads(python(server, program)) == {name: [seed] * 3 for name, seed in SEEDS.items()}


def test_queues_are_apart(server: Server, hold: Hold) -> None:
    with httpx.Client(headers=server.headers()) as client:

        def post(name: str, prompt: str) -> dict[str, Any]:
            made: dict[str, Any] = client.post(f"{server.url}/queue/{name}", json={"prompt": prompt}).json()
            return made

        held = post(ONE, hold.prompt)
        wait_until(lambda: client.get(held["status_url"]).json()["status"] == "IN_PROGRESS")
        waiting = [post(ONE, "a") for _ in range(2)]
        assert [made["queue_position"] for made in waiting] == [0, 1]
        other = post(OTHER, "a")
        assert other["queue_position"] == 0
        wait_until(lambda: client.get(other["status_url"]).json()["status"] == "COMPLETED")
        assert client.get(waiting[1]["status_url"]).json()["queue_position"] == 1
        assert client.put(held["cancel_url"]).status_code == 202
        wait_until(lambda: client.get(waiting[1]["status_url"]).json()["status"] == "COMPLETED")
        told = client.get(f"{server.url}/metrics").text
        assert f'requests_ended_total{{endpoint="{ONE}",status="499"}} 1.0' in told
        assert f'requests_ended_total{{endpoint="{OTHER}",status="499"}}' not in told


def test_a_crash_leaves_the_other_endpoint_alone(server: Server) -> None:
    def state() -> dict[str, str]:
        return {name: each["status"] for name, each in httpx.get(f"{server.url}/readyz").json()["endpoints"].items()}

    wait_until(lambda: state() == dict.fromkeys(SEEDS, "ready"))
    lost = httpx.post(f"{server.url}/{ONE}", json={"prompt": "crash"}, headers=server.headers())
    left = state()
    made = httpx.post(f"{server.url}/{OTHER}", json={"prompt": "a"}, headers=server.headers())
    assert (lost.status_code, left[OTHER], made.json()["seed"]) == (500, "ready", SEEDS[OTHER])
    wait_until(lambda: state() == dict.fromkeys(SEEDS, "ready"))
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert [line["endpoint"] for line in lines if line["message"].startswith("the runner was lost")] == [ONE]
    assert [line["endpoint"] for line in lines if line["message"] == "the last words"] == [ONE]
    assert {line["endpoint"] for line in lines if line["message"] == "the runner is ready"} == SEEDS.keys()


# Two endpoints on the event loop of the test


def test_a_request_is_known_under_its_own_endpoint_only(tmp_path: Path) -> None:
    service, *_ = both(tmp_path)
    client = TestClient(create_app(service))
    made = client.post(f"/queue/{ONE}", json={"prompt": "a"}, headers={"Idempotency-Key": "1"}).json()
    again = client.post(f"/queue/{OTHER}", json={"prompt": "b"}, headers={"Idempotency-Key": "1"}).json()
    assert made["request_id"] != again["request_id"]
    path = f"/requests/{made['request_id']}"
    for rest in ("/status", ""):
        for _ in range(2):  # the second time from memory
            status = client.get(f"/{ONE}{path}{rest}")
            told = status.status_code, status.headers["x-fal-request-id"]
            assert told == (202 if rest else 400, made["request_id"])
            assert client.get(f"/{OTHER}{path}{rest}").json() == {"status": "NOT_FOUND"}
    assert client.put(f"/{OTHER}{path}/cancel").status_code == 404
    wrong = client.post(f"/queue/{ONE}", json={}).json()["request_id"]  # it has ended
    for _ in range(2):
        assert client.get(f"/{ONE}/requests/{wrong}/status").json()["status"] == "COMPLETED"
        assert client.get(f"/{OTHER}/requests/{wrong}/status").json() == {"status": "NOT_FOUND"}
    assert client.get(f"/{ONE}{path}/status").json()["status_url"].startswith(f"http://testserver/{ONE}/")
    service.store.close()


def test_an_unknown_endpoint_is_told_which_there_are(tmp_path: Path) -> None:
    service, *_ = both(tmp_path)
    client = TestClient(create_app(service))
    told = "Endpoint 'fal-ai/flux' not found; this server has me/portraits, me/landscapes"
    for path in ("/fal-ai/flux", "/queue/fal-ai/flux", "/fal-ai/flux/stream", "/openapi.json?endpoint_id=fal-ai/flux"):
        answer = client.get(path) if "?" in path else client.post(path, json={"prompt": "a"})
        assert (answer.status_code, answer.json()) == (404, {"detail": told})
    of_request = "/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b"
    for method, path in (("GET", ""), ("GET", "/status"), ("GET", "/status/stream"), ("PUT", "/cancel")):
        for prefix in ("", "/queue"):
            answer = client.request(method, f"{prefix}{of_request}{path}")
            assert (answer.status_code, answer.json()) == (404, {"detail": told})
    for path in ("/fal-ai/flux", f"/{ONE}/requests", "/files/x/requests/y"):
        assert client.get(path).json()["detail"] == f"Path {path} not found"
    for path in ("/", f"/{ONE}/other", "/files/x", "/x"):
        assert client.post(path).json()["detail"] in (f"Path {path} not found", "Method Not Allowed")
    for method in ("POST", "GET"):  # a line feed after a name
        assert client.request(method, f"/{ONE}%0A", json={"prompt": "a"}).status_code == 404
    service.store.close()


def test_a_caller_limits_the_queue_of_its_own_endpoint(tmp_path: Path) -> None:
    service, *_ = both(tmp_path)
    client = TestClient(create_app(service))

    def post(name: str) -> int:
        limit = {"fal_max_queue_length": 0}
        return client.post(f"/queue/{name}", json={"prompt": "a"}, params=limit).status_code

    assert [post(name) for name in (ONE, OTHER, ONE, OTHER)] == [200, 200, 429, 429]
    service.store.close()


def test_a_token_opens_the_endpoints_that_it_names(tmp_path: Path) -> None:
    service, *_ = both(tmp_path)
    client = TestClient(create_app(service))

    def allowed(*apps: str) -> list[int]:
        """What each endpoint answers to a token; 422 is for the missing prompt."""
        token = client.post("/tokens/", json={"allowed_apps": apps}).json()
        return [client.post(f"/{name}/stream?fal_jwt_token={token}", json={}).status_code for name in SEEDS]

    assert (allowed(ONE), allowed("landscapes"), allowed(*SEEDS)) == ([422, 403], [403, 422], [422, 422])
    service.store.close()


def test_the_server_is_ready_once_every_endpoint_was_and_while_one_is(tmp_path: Path) -> None:
    service, one, other = both(tmp_path)
    client = TestClient(create_app(service))

    def told() -> tuple[int, str, list[str]]:
        answer = client.get("/readyz")
        ready = answer.json()
        return answer.status_code, ready["status"], [ready["endpoints"][name]["status"] for name in SEEDS]

    one.about, other.capacity = {"backend": "onnxruntime"}, 0
    assert told() == (503, "loading", ["ready", "loading"])
    other.problem = "no memory"
    assert told() == (503, "failed", ["ready", "failed"])
    other.about, other.capacity, other.problem = one.about, 1, None
    assert told() == (200, "ready", ["ready", "ready"])
    other.capacity, other.problem = 0, "no memory"
    assert told() == (200, "ready", ["ready", "failed"]), "a crash touches its own endpoint only"
    one.capacity = 0
    assert told() == (503, "failed", ["loading", "failed"])
    assert client.get("/readyz").json()["endpoints"][OTHER]["problem"] == "no memory"
    documents = [client.get("/openapi.json", params={"endpoint_id": name}).json()["paths"] for name in SEEDS]
    assert [f"/{name}" in paths for name, paths in zip(SEEDS, documents, strict=True)] == [True, True]
    service.store.close()


def test_a_shutdown_waits_for_all_endpoints_and_keeps_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        service, one, other = both(tmp_path, drain_seconds=DRAIN_SECONDS)
        for runner in (one, other):
            runner.hold.clear()
        async with asyncio.timeout(SECONDS), running(service) as dispatchers:
            for name in SEEDS:
                for place in range(2):
                    await submit(service, f"{name[3:]}-{place}", endpoint=name)
            await until(lambda: len(one.order) == len(other.order) == 1)
            ending = asyncio.create_task(end(service, dispatchers, one))
        await ending

    async def end(service: Service, dispatchers: Any, one: StandIn) -> None:
        """Ends the running request of one endpoint, and then the time in which that of the other does not end."""
        await until(lambda: service.draining)
        one.hold.set()
        assert (await ended(service, "portraits-0")).status == 200
        dispatchers._ticker.cancel()  # no call of the database may be under way: it would last as long
        await asyncio.wait({dispatchers._ticker})
        pass_on(DRAIN_SECONDS)

    asyncio.run(main())
    service, *_ = both(tmp_path)
    assert [service.store.waiting(name) for name in SEEDS] == [["portraits-1"], ["landscapes-0", "landscapes-1"]]
    service.store.close()


def test_requests_for_an_endpoint_that_is_gone_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def start() -> None:
        async with running(open_service(Settings(tmp_path, endpoints={ONE: None}), StandIn())):
            pass

    service, *_ = both(tmp_path)
    for place, name in enumerate((ONE, OTHER, OTHER)):
        service.store.submit(new(str(place), endpoint=name), limit=9, key_limit=9)
    service.store.close()
    asyncio.run(start())
    (told,) = (vars(record) for record in caplog.records if "does not have" in record.message)
    assert (told["levelname"], told["requests"]) == ("WARNING", {OTHER: 2})


def test_a_start_that_one_bundle_refuses_names_its_endpoint(tmp_path: Path) -> None:
    class Refused(StandIn):
        async def refused(self) -> SparseCtrlLcmError:
            return BundleError("bundle", "a graph is damaged", "export it again")

    settings = Settings(tmp_path, endpoints={ONE: None, OTHER: None})
    with pytest.raises(BundleError) as told:
        asyncio.run(serve(settings, [Listener("127.0.0.1", ports()[0])], [StandIn(), Refused()]))
    assert str(told.value) == "endpoint: me/landscapes: a graph is damaged; export it again"


def test_runners_of_all_endpoints_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int, int]] = []

    def local(**options: Any) -> StandIn:
        made.append((options["bundle"], options["place"], options["runners"]))
        return StandIn()

    monkeypatch.setattr(making, "LocalRunner", local)
    assert len(making.make_runners(Settings(tmp_path, endpoints={ONE: "a", OTHER: "b"}, runners=2))) == 2
    assert made == [("a", 0, 4), ("a", 1, 4), ("b", 2, 4), ("b", 3, 4)]


def test_each_bundle_has_an_application_on_ray(tmp_path: Path) -> None:
    """Names of one bundle and the same weights share theirs."""

    def applications(bundle: str, **more: Any) -> int:
        settings = Settings(tmp_path, endpoints={ONE: "a", OTHER: bundle}, pool="ray", **more)
        pools: list[Any] = making.make_runners(settings)
        return len({pool.name for pool in pools})

    assert [applications("b"), applications("a"), applications("a", weights={ONE: {"anime": "c"}})] == [2, 1, 2]


def test_a_cancelled_request_is_cancelled_at_its_runner(tmp_path: Path) -> None:
    """Also if another server was told, so that only the periodic work finds it."""

    async def main() -> None:
        service, one, other = both(tmp_path)
        told: list[str] = []
        one.cancel = other.cancel = lambda _: told.append("wrong")  # type: ignore[method-assign]
        other.cancel = told.append  # type: ignore[method-assign]
        other.hold.clear()
        async with asyncio.timeout(SECONDS), running(service):
            await submit(service, "a", endpoint=OTHER)
            await until(lambda: other.order == ["a"])
            assert service.store.cancel("a", time.time()) is not None
            await until(lambda: "a" in told)
            other.hold.set()
            assert (await ended(service, "a")).status == 499
        assert set(told) == {"a"}

    asyncio.run(main())
