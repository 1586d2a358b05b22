"""Fields beyond fal's, which `serve --extensions` takes: the clips are read with PyAV and Pillow."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import httpx
import numpy as np
import pytest
from fakes.stub_pipeline import SIDE, StubPipeline
from PIL import Image
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.protocol.extended_input import ExtendedInput
from sparsectrl_lcm.service.protocol.input_parsing import parse_input
from sparsectrl_lcm.service.runner.clip_jobs import ClipOrder, Jobs
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from starlette.testclient import TestClient

from .conftest import APP, HERE, Server, started
from .stand_in import StandIn

SCRIBBLE = HERE.parents[1] / "demo/scribbles/frame_08.png"
GIVEN = {"prompt": "a", "width": 72, "height": 64, "num_frames": 24, "fps": 12.5, "output_format": "webm"}


@pytest.mark.parametrize(
    ("given", "field", "kind"),
    [
        ({"width": 100}, "width", "multiple_of"),
        ({"height": 0}, "height", "greater_than_equal"),
        ({"width": 4096}, "width", "less_than_equal"),
        ({"num_frames": 0}, "num_frames", "greater_than_equal"),
        ({"num_frames": 129}, "num_frames", "less_than_equal"),
        ({"num_frames": 2.5}, "num_frames", "int_from_float"),
        ({"fps": 61}, "fps", "less_than_equal"),
        ({"fps": float("nan")}, "fps", "finite_number"),
        ({"fps": 55, "output_format": "gif"}, "fps", "less_than_equal"),
        ({"output_format": "mov"}, "output_format", "one_of"),
        ({"keyframe_1_index": 16}, "keyframe_1_index", "less_than_equal"),
        ({"num_frames": 8, "keyframe_2_index": 8}, "keyframe_2_index", "less_than_equal"),
    ],
)
def test_wrong_fields(given: dict[str, Any], field: str, kind: str) -> None:
    with pytest.raises(ServiceError) as refused:
        parse_input({"prompt": "a", **given}, 100, 16, extensions=True)
    assert [(item["loc"], item["type"]) for item in refused.value.body["detail"]] == [(["body", field], kind)]


def test_what_is_given_is_stored_and_reaches_the_pipeline() -> None:
    parsed = parse_input({**GIVEN, "keyframe_0_index": 23}, 100, 16, extensions=True)
    assert ExtendedInput.model_validate(parsed.stored()).model_dump() == parsed.model_dump()
    assert parsed.options().items() >= {"width": 72, "height": 64, "num_frames": 24}.items()
    plain = parse_input({"prompt": "a"}, 100, 16, extensions=True)
    assert plain.options() == parse_input({"prompt": "a"}, 100, 16).options()


def test_without_the_option_the_fields_are_ignored_as_on_fal(tmp_path: Path) -> None:
    service = open_service(Settings(tmp_path, anonymous=True), StandIn())
    client = TestClient(create_app(service))
    submitted = client.post(f"/queue/{APP}", json={**GIVEN, "width": "wide"}).raise_for_status().json()
    stored = service.store.given(submitted["request_id"])
    assert stored is not None and stored[0] == {"prompt": "a"}
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert "width" not in schemas["AnimatediffSparsectrlLcmInput"]["properties"]
    service.store.close()


@pytest.mark.parametrize(
    ("given", "field", "size"),
    [
        ({"width": 4 * SIDE}, "width", "16 frames of 256x64"),
        ({"width": 2 * SIDE, "num_frames": 24}, "width", "24 frames of 128x64"),
        ({"num_frames": 8}, "num_frames", "8 frames of 64x64"),
    ],
)
def test_a_size_without_engines_is_refused_by_name(
    tmp_path: Path, given: dict[str, int], field: str, size: str
) -> None:
    failed = made(tmp_path, given)
    assert failed.items() >= {"say": "failed", "kind": "invalid", "field": field}.items()
    assert failed["message"] == f"this server has no engines for {size}"


@pytest.mark.parametrize("given", [{}, {"num_frames": 24}, {"width": SIDE}])
def test_engines_of_one_length_make_longer_clips_in_windows(tmp_path: Path, given: dict[str, int]) -> None:
    assert made(tmp_path, given)["say"] == "made"


def made(folder: Path, given: dict[str, int]) -> dict[str, Any]:
    """Returns the last message of a job of a pipeline whose engines make 16 frames of 64x64."""
    said: list[dict[str, Any]] = []
    reports: Any = SimpleNamespace(
        say=lambda what, **values: said.append({"say": what, **values}), cancelled=SimpleNamespace(is_set=bool)
    )
    jobs = Jobs(StubPipeline(None, "auto", None), 10_000)
    jobs.make(reports, ClipOrder({"prompt": "a", **given}, [], str(folder / "clip.mp4")))
    jobs.finish()
    return said[-1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("extensions")
    for server in started(folder, backend="onnxruntime", extensions=True, clip_pixels=200_000):
        server.wait()
        yield server


def clip(server: Server, **given: Any) -> tuple[bytes, dict[str, Any]]:
    body = {"prompt": "a star", "seed": 1, "num_inference_steps": 1, **given}
    answer = httpx.post(f"{server.url}/{APP}", json=body, headers=server.headers(), timeout=120)
    video = answer.raise_for_status().json()["video"]
    file = httpx.get(video["url"]).raise_for_status()
    assert file.headers["content-type"] == video["content_type"]
    return file.content, video


def test_a_clip_of_another_size_length_and_format(server: Server) -> None:
    content, video = clip(server, **GIVEN | {"num_frames": 20, "prompt": "a star"})
    assert video["content_type"] == "video/webm" and video["file_name"].endswith(".webm")
    with av.open(io.BytesIO(content)) as opened:
        (stream,) = opened.streams.video
        assert (stream.width, stream.height, stream.average_rate) == (72, 64, 12.5)
        assert sum(1 for _ in opened.decode(stream)) == 20


def test_a_gif_with_a_keyframe(server: Server) -> None:
    picture = {"keyframe_0_image_url": upload(server), "keyframe_0_index": 3}
    content, video = clip(server, width=64, height=64, num_frames=4, fps=5, output_format="gif", **picture)
    assert video["content_type"] == "image/gif"
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, opened.size, opened.n_frames, opened.info["duration"]) == ("GIF", (64, 64), 4, 200)
    plain, _ = clip(server, width=64, height=64, num_frames=4, fps=5, output_format="gif")
    assert not np.array_equal(last_frame(content), last_frame(plain))


def upload(server: Server) -> str:
    given = {"file_name": "a.png", "content_type": "image/png"}
    place = httpx.post(f"{server.url}/storage/upload/initiate", json=given, headers=server.headers()).json()
    httpx.put(place["upload_url"], content=SCRIBBLE.read_bytes()).raise_for_status()
    return str(place["file_url"])


def last_frame(gif: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(gif)) as opened:
        opened.seek(opened.n_frames - 1)
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize(
    ("given", "field", "pixels"),
    [({"width": 128, "height": 128}, "width", 262_144), ({"num_frames": 13}, "num_frames", 212_992)],
)
def test_clips_that_are_too_large(server: Server, given: dict[str, Any], field: str, pixels: int) -> None:
    answer = httpx.post(f"{server.url}/{APP}", json={"prompt": "a", **given}, headers=server.headers(), timeout=60)
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    told = f"The clip would have {pixels} pixels in all its frames, 200000 are allowed; ask for a smaller size or "
    assert (detail["loc"], detail["msg"]) == (["body", field], f"{told}fewer frames")


def test_the_schema_has_the_fields(server: Server) -> None:
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    properties = schemas["AnimatediffSparsectrlLcmInput"]["properties"]
    assert properties["output_format"]["enum"] == ["mp4", "webm", "gif", "webp"]
    assert properties["width"]["nullable"] and properties["width"]["multipleOf"] == 8
