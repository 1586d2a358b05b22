"""Requests that name the weights of another bundle."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.stub_pipeline import StubPipeline
from sparsectrl_lcm.cli.options import endpoint_weights, parse_weights
from sparsectrl_lcm.runtime import BackendError, InvalidRequest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.protocol.advanced_options import KEY
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.queue.submission import accept
from sparsectrl_lcm.service.runner import Job, JobFailed, RunnerPool, devices
from sparsectrl_lcm.service.runner import pipeline_loading as loading
from sparsectrl_lcm.service.runner.clip_jobs import ClipOrder, Jobs
from sparsectrl_lcm.service.runner.make_runners import make_runners
from sparsectrl_lcm.service.runner.ray_pool import RayPool
from sparsectrl_lcm.service.settings import Settings

from .conftest import APP
from .stand_in import StandIn, ended, posted, serving, submit


def asking(name: Any) -> dict[str, Any]:
    return {"prompt": "a", KEY: {"weights": name}}


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (["anime", "slow-motion"], "Input should be 'anime' or 'slow-motion'"),
        ([], "This endpoint has no other weights; leave it out"),
    ],
)
def test_an_unknown_name_is_told_with_the_known_ones(known: list[str], told: str, tmp_path: Path) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        await accept(service, service.endpoints[APP], posted("queued", asking("x")), "k", "queue")
        with pytest.raises(ServiceError) as refused:
            await accept(service, service.endpoints[APP], posted("run", asking("x")), "k", "run")
        for status, body in ((refused.value.status, refused.value.body), _outcome(await ended(service, "queued"))):
            (detail,) = body["detail"]
            assert (status, detail["loc"], detail["type"]) == (422, ["body", KEY, "weights"], "one_of")
            assert (detail["msg"], detail["ctx"], detail["input"]) == (told, {"expected": known}, "x")

    serving(tmp_path, scenario, weights={APP: dict.fromkeys(known, "bundle")})


def _outcome(outcome: Any) -> tuple[int, Any]:
    return outcome.status, outcome.body


def test_a_job_has_the_weights_of_its_request_and_a_conditioning_of_its_own(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        given = [asking("anime"), {"prompt": "a"}, asking(None), asking("slow-motion"), asking("anime")]
        for number, each in enumerate(given):
            await accept(service, service.endpoints[APP], posted(str(number), each), "k", "queue")
            assert (await ended(service, str(number))).status == 200
        assert [job.weights for job in runner.jobs] == ["anime", None, None, "slow-motion", "anime"]
        first, own, none, other, again = (job.conditioning for job in runner.jobs)
        assert first == again and own == none
        assert len({first, own, other}) == 3

    serving(tmp_path, scenario, weights={APP: {"anime": "a", "slow-motion": "b"}})


def test_weights_that_are_gone_end_what_waited_for_them(tmp_path: Path) -> None:
    """The server was started again without them: the pipeline refuses the name."""

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.fails = JobFailed("invalid", "'anime' is not allowed; allowed are slow-motion", field="weights")
        await submit(service, "a", input=asking("anime"))
        outcome = await ended(service, "a")
        (detail,) = outcome.body["detail"]
        assert (outcome.status, detail["loc"]) == (422, ["body", KEY, "weights"])

    serving(tmp_path, scenario)


def test_weights_that_cannot_be_fitted_are_told(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    reports: Any = SimpleNamespace(
        say=lambda what, **values: said.append(values), cancelled=SimpleNamespace(is_set=bool)
    )
    pipeline = StubPipeline(None, "auto", None)

    def generate(**_: Any) -> None:
        raise BackendError("refit", "the weights of 'anime' cannot be used: no room", "free some")

    pipeline.generate = generate  # type: ignore[assignment,method-assign]
    order = ClipOrder({"prompt": "a", "weights": "anime"}, [], str(tmp_path / "clip.mp4"))
    Jobs(pipeline, 10_000).make(reports, order)
    (failed,) = said
    assert (failed["kind"], failed["field"]) == ("failed", "weights")
    assert failed["message"].startswith("refit: the weights of 'anime' cannot be used: no room")

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.fails = JobFailed("failed", failed["message"], field="weights")
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, outcome.body["detail"][0]["msg"]) == (500, "The weights could not be loaded")

    serving(tmp_path / "data", scenario)


def test_a_runner_that_could_not_fit_weights_is_not_preferred_for_them(tmp_path: Path) -> None:
    asked: list[str] = []

    class Failing:
        ready = True

        def __init__(self, name: str) -> None:
            self.name = name

        async def run(self, job: Job, _: Any) -> None:
            asked.append(self.name)
            raise JobFailed("failed", "no room", field="weights")

    pool = RunnerPool({name: Failing(name) for name in "ab"})  # type: ignore[misc]
    for _ in range(4):
        with pytest.raises(JobFailed):
            asyncio.run(pool.run(Job("a", {"weights": "anime"}, (), tmp_path / "a"), id))
    assert asked == ["a", "b", "a", "b"]


def test_a_backend_that_cannot_refit_is_refused_with_a_way_out() -> None:
    """Also if it is chosen only when the bundle is loaded: here one of the CPU."""
    with pytest.raises(BackendError) as refused:
        loading.load(weights={"anime": "none"})
    assert refused.value.field == "weights"
    assert refused.value.remedy == "serve each bundle under a name of its own: --endpoint OWNER/NAME=BUNDLE"
    loading.check_weights("tensorrt", ["anime"])


def test_a_bundle_without_engines_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copy(demo_bundle() / "manifest.json", bundle)
    settings = Settings(tmp_path, endpoints={APP: bundle}, weights={APP: {"anime": demo_bundle()}})
    with pytest.raises(BackendError, match="^weights: the bundle has no engines whose weights can be changed; run "):
        loading.check_settings(settings)
    index = bundle / "engines/tensorrt/fp16/engines.json"
    index.parent.mkdir(parents=True)
    index.touch()
    loading.check_settings(settings)
    with pytest.raises(BackendError):
        loading.check_settings(replace(settings, precision="fp8"))
    loading.check_settings(replace(settings, precision="fp8", pool="ray"))  # the engines are those of other machines
    loading.check_settings(replace(settings, devices=("cpu", "cuda:0")))  # the runner on the CPU is left out


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["anime"], "'anime' is not allowed; give NAME=BUNDLE"),
        (["anime="], "'anime=' is not allowed"),
        (["=folder"], "'=folder' is not allowed"),
        (["a,b=folder"], "'a,b=folder' is not allowed"),
        (["anime=a", "anime=b"], "anime is given twice; give each bundle a name of its own"),
    ],
)
def test_wrong_options_are_told(texts: list[str], told: str) -> None:
    with pytest.raises(InvalidRequest, match="^weights: ") as refused:
        parse_weights(texts)
    assert told in str(refused.value)


def test_options_are_names_and_bundles() -> None:
    assert parse_weights(["anime=a=b", "v2.slow=s3://bucket/x"]) == {"anime": "a=b", "v2.slow": "s3://bucket/x"}


def test_each_endpoint_has_weights_of_its_own() -> None:
    one, two = {"me/a": None}, {"me/a": None, "me/b": None}
    assert endpoint_weights([], two) == {}
    assert endpoint_weights(["anime=a", "me/a:slow=s3://b"], one) == {"me/a": {"anime": "a", "slow": "s3://b"}}
    assert endpoint_weights(["me/a:x=1", "me/b:x=2"], two) == {"me/a": {"x": "1"}, "me/b": {"x": "2"}}
    with pytest.raises(InvalidRequest, match="'me/c' is no endpoint of this server; there are me/a, me/b"):
        endpoint_weights(["me/c:anime=a"], two)
    with pytest.raises(InvalidRequest, match="'anime=a' does not say of which endpoint; give OWNER/NAME:NAME=BUNDLE"):
        endpoint_weights(["anime=a"], two)
    with pytest.raises(InvalidRequest, match="anime is given twice"):
        endpoint_weights(["anime=a", "me/a:anime=a"], one)


def test_the_runners_of_an_endpoint_get_its_weights(tmp_path: Path) -> None:
    endpoints = {"me/a": "a", "me/b": "b"}
    settings = Settings(tmp_path, endpoints=endpoints, weights={"me/b": {"anime": "c"}}, pool="ray")
    options = [pool._setup["options"] for pool in make_runners(settings)]  # type: ignore[attr-defined]
    assert ["weights" in each for each in options] == [False, True]
    assert options[1]["weights"] == {"anime": str(Path("c").absolute())}
    local = make_runners(replace(settings, pool="local"))
    members = [pool._members[0].runner._setup["options"] for pool in local]  # type: ignore[attr-defined]
    assert [(each["bundle"], each["weights"]) for each in members] == [("a", {}), ("b", {"anime": "c"})]


def test_ray_matches_jobs_and_replicas_by_weights_if_there_are_others(tmp_path: Path) -> None:
    def preferences(options: dict[str, Any]) -> list[dict[str, str]]:
        pool = RayPool(address="auto", replicas=(1, 1), gpus=0, setup={"options": options}, step_seconds=1)
        jobs = [Job("a", {"weights": name}, (), tmp_path / "a", conditioning="boat") for name in ("anime", None)]
        return [pool._preference(job) for job in jobs]

    assert preferences({"weights": {"anime": "a"}}) == [{"multiplexed_model_id": name} for name in ("anime", "-")]
    assert preferences({}) == [{"session_id": "boat"}] * 2
