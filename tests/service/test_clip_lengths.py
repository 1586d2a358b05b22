"""Endpoints whose bundles make clips of other lengths than fal's 16 frames."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.protocol.input_parsing import parse_input
from sparsectrl_lcm.service.runner import Job, Made
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from starlette.testclient import TestClient

from .conftest import APP, Server, started
from .stand_in import StandIn, ended, serving, submit

SHORT, LONG = "me/short", "me/long"
LENGTHS = {SHORT: 8, LONG: 24, APP: 16}
FEWEST_KEYFRAMES = {SHORT: 0, LONG: 1}
"""That the models were trained with; that of the demo with three."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of the demo bundle and of two copies, whose clips have 8 and 24 frames by default."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles: dict[str, Path | str | None] = {APP: None}
    for name in (SHORT, LONG):
        bundle = bundles[name] = Path(shutil.copytree(demo_bundle(), folder / name))
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["sizes"]["frames"] = LENGTHS[name]
        manifest["trained_for"]["min_keyframes"] = FEWEST_KEYFRAMES[name]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    return Settings(folder / "data", endpoints=bundles, anonymous=True, backend="onnxruntime")


def document(client: TestClient, name: str) -> Any:
    answer = client.get("/openapi.json", params={"endpoint_id": name}).raise_for_status().json()
    return answer["components"]["schemas"]["AnimatediffSparsectrlLcmInput"]["properties"]


def test_documents_and_page_say_how_long_clips_are_and_what_they_need(settings: Settings, tmp_path: Path) -> None:
    service = open_service(replace(settings, data=tmp_path), StandIn(), StandIn(), StandIn())
    client = TestClient(create_app(service))
    for name, frames in LENGTHS.items():
        indices = [document(client, name)[f"keyframe_{slot}_index"] for slot in range(3)]
        assert [index["maximum"] for index in indices] == [frames - 1] * 3
        assert [index["examples"] for index in indices] == [[0], [frames // 2], [frames - 1]]
    known = client.get("/page/about.json").json()["endpoints"]
    assert {each["name"]: each["frames"] for each in known} == LENGTHS
    assert [each["needed_keyframes"] for each in known] == ["3", None, "1 to 3"]
    service.store.close()


def test_extensions_bound_indices_by_the_length_that_is_asked_for(settings: Settings, tmp_path: Path) -> None:
    service = open_service(replace(settings, data=tmp_path, extensions=True), StandIn(), StandIn(), StandIn())
    about = document(TestClient(create_app(service)), SHORT)
    assert about["num_frames"]["description"] == "Frames of the clip; 8 by default."
    assert "maximum" not in about["keyframe_2_index"]
    service.store.close()
    for num_frames, last in ((None, 7), (24, 23)):
        given = {"prompt": "a", "num_frames": num_frames, "keyframe_1_index": last}
        parse_input(given, 100, 8, extensions=True)
        with pytest.raises(ServiceError) as refused:
            parse_input(given | {"keyframe_1_index": last + 1}, 100, 8, extensions=True)
        assert refused.value.body["detail"][0]["ctx"] == {"le": last}
    parse_input({"prompt": "a", "num_frames": 200}, 100, 200, extensions=True)  # a bundle of long clips takes its own


def test_an_index_beyond_the_clip_is_told_as_fal_does(settings: Settings, tmp_path: Path) -> None:
    service = open_service(replace(settings, data=tmp_path), StandIn(), StandIn(), StandIn())
    client = TestClient(create_app(service))
    told = client.post(f"/{SHORT}", json={"prompt": "a", "guidance_scale": 3, "keyframe_1_index": 8})
    assert told.status_code == 422
    about = {item["loc"][1]: (item["type"], item["msg"], item["ctx"]) for item in told.json()["detail"]}
    expected = ("less_than_equal", "Input should be less than or equal to 7", {"le": 7})
    assert (about["keyframe_1_index"], about.keys()) == (expected, {"keyframe_1_index", "guidance_scale"})
    accepted = client.post(f"/queue/{LONG}", json={"prompt": "a", "keyframe_1_index": 23}).json()["request_id"]
    assert service.store.given(accepted) is not None, "it waits"
    service.store.close()


def test_a_later_model_says_how_long_its_clips_are(tmp_path: Path) -> None:
    """As after an upload of another version of the bundle and a restart of the runner."""
    runner = StandIn()
    service = open_service(Settings(tmp_path, anonymous=True), runner)
    client = TestClient(create_app(service))
    assert document(client, APP)["keyframe_2_index"]["maximum"] == 15
    runner.about = {"frames": 24}
    assert document(client, APP)["keyframe_2_index"]["maximum"] == 23
    assert client.get("/page/about.json").json()["endpoints"][0]["frames"] == 24
    accepted = client.post(f"/queue/{APP}", json={"prompt": "a", "keyframe_1_index": 23}).json()["request_id"]
    assert service.store.given(accepted) is not None, "it waits"
    service.store.close()


def test_a_clip_is_recorded_with_the_frames_that_its_runner_made(tmp_path: Path) -> None:
    """Those of an endpoint may have loaded different versions of its bundle."""

    async def scenario(service: Service, runner: StandIn) -> None:
        run = runner.run

        async def longer(job: Job, on_event: Any) -> Made:
            return replace(await run(job, on_event), frames=24)

        runner.run = longer  # type: ignore[method-assign]
        await submit(service, "a")
        assert (await ended(service, "a")).frames == 24

    serving(tmp_path, scenario)


def test_a_request_that_waited_while_clips_became_shorter_is_told(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.about = {"frames": 8, "width": 64, "height": 64}
        await submit(service, "a", input={"prompt": "a", "keyframe_2_index": 15})
        outcome = await ended(service, "a")
        (detail,) = outcome.body["detail"]
        assert (outcome.status, detail["loc"], detail["ctx"]) == (422, ["body", "keyframe_2_index"], {"le": 7})
        assert runner.jobs == []

    serving(tmp_path, scenario)


@pytest.fixture
def server(settings: Settings, tmp_path: Path) -> Iterator[Server]:
    short = {SHORT: settings.endpoints[SHORT]}
    for made in started(tmp_path, backend="onnxruntime", endpoints=short):
        made.wait()
        yield made


def test_clips_have_the_length_of_their_bundle(server: Server) -> None:
    given = {"prompt": "a star", "seed": 1, "num_inference_steps": 1}
    answer = httpx.post(f"{server.url}/{SHORT}", json=given, headers=server.headers(), timeout=120)
    content = httpx.get(answer.raise_for_status().json()["video"]["url"]).content
    with av.open(io.BytesIO(content)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 8
    made = httpx.get(f"{server.url}/page/clips.json", headers=server.headers()).json()["clips"]
    assert made[0]["frames"] == 8
