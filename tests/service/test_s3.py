"""Files and bundles in S3, over HTTP: moto's server, s3fs in `serve`, and boto3 to look at what is there."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.s3_server import BUCKET, S3Server, s3_server
from sparsectrl_lcm.runtime import BundleError, InvalidRequest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.objects import object_stores
from sparsectrl_lcm.service.objects.object_stores import FilesUnavailable, check_files, open_files
from sparsectrl_lcm.service.objects.stored_files import keep_file
from sparsectrl_lcm.service.runner.bundle_cache import local_bundle
from sparsectrl_lcm.service.server import forget_what_is_old

from .conftest import Server, started
from .holds import Hold
from .stand_in import serving
from .test_object_store_outages import PNG
from .test_outages import get, lines, submit
from .waiting import SECONDS, wait_until

PREFIX = "clips of ü+%20[1]"
MB = 2**20


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    yield from s3_server()


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    for server in started(folder, pipeline="stub_pipeline:load", files=f"s3://{BUCKET}/{PREFIX}"):
        server.wait()
        yield server


@pytest.fixture
def _new_client(s3: S3Server) -> Iterator[None]:
    """s3fs reads the environment when it makes a client, which it keeps."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def upload(server: Server, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/files/upload", content=content, headers=server.headers() | headers)


def test_a_request_from_upload_to_clip(server: Server, s3: S3Server) -> None:
    url = upload(server, PNG, **{"Content-Type": "image/png", "X-Fal-File-Name": "ein Bild.png"}).json()["access_url"]
    assert httpx.get(url).content == PNG
    given = {"prompt": "a", "seed": 3, "keyframe_0_image_url": url}
    path = f"{server.queue}/requests/"
    path += httpx.post(server.queue, json=given, headers=server.headers()).json()["request_id"]
    wait_until(lambda: get(server, path.removeprefix(server.url) + "/status").json()["status"] == "COMPLETED")
    video = httpx.get(path, headers=server.headers()).json()["video"]
    clip = httpx.get(video["url"])
    assert (clip.headers["Content-Type"], len(clip.content)) == ("video/mp4", video["file_size"])
    assert clip.content in [s3.read(key) for key in s3.keys(f"{PREFIX}/objects/")]
    part = httpx.get(video["url"], headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, clip.content[100:200])
    assert not s3.keys(f"{PREFIX}/probe"), "the check at the start left an object"


def test_a_large_upload_goes_in_parts(server: Server, s3: S3Server) -> None:
    """s3fs would read all of it into memory."""
    before, content = set(s3.keys()), b"x" * (17 * MB)
    url = upload(server, content).json()["access_url"]
    (key,) = set(s3.keys()) - before
    assert s3.client.head_object(Bucket=BUCKET, Key=key)["ETag"].strip('"').endswith("-3")
    assert httpx.get(url, headers={"Range": f"bytes={17 * MB - 5}-"}).content == b"xxxxx"
    assert s3.read(key) == content


def test_a_clip_outlives_an_outage_of_the_store(server: Server, s3: S3Server, hold: Hold) -> None:
    request = submit(server, hold.prompt)
    path = f"{server.queue.removeprefix(server.url)}/requests/{request}"
    with s3.unreachable():
        hold.let_go()
        wait_until(lambda: lines(server, "a clip could not be stored, and is tried again: Could not connect") > 0)
        refused = upload(server, b"a")
        assert (refused.status_code, refused.json()["detail"]) == (503, "The object store does not answer; try again")
        assert get(server, "/readyz").status_code == 200
        assert get(server, f"{path}/status").json()["status"] == "IN_PROGRESS"
        assert "sparsectrl_lcm_clips_unstored 1.0" in get(server, "/metrics").text
    wait_until(lambda: get(server, f"{path}/status").json()["status"] == "COMPLETED")
    url = get(server, path).json()["video"]["url"]
    assert httpx.get(url).status_code == 200
    assert "Traceback" not in server.log
    assert url.split("/")[-2] not in server.log, "whoever reads the log could fetch the clip"


def test_expired_files_are_deleted(s3: S3Server, tmp_path: Path) -> None:
    async def scenario(service: Any, _: Any) -> None:
        for name, seconds in (("old", 0.0), ("new", None)):
            keep_file(service, PNG, key_id="k", name=name, content_type="image/png", seconds=seconds)
        assert len(s3.keys("expiring/")) == 2
        await forget_what_is_old(service)
        assert len(s3.keys("expiring/")) == 1

    serving(tmp_path, scenario, files=f"s3://{BUCKET}/expiring")


def told(url: str) -> str:
    with pytest.raises(InvalidRequest) as raised:
        check_files(url, open_files(url))
    assert raised.value.remedy
    return str(raised.value)


@pytest.mark.usefixtures("_new_client")
def test_a_store_that_cannot_be_used_is_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    check_files("s3://bucket/x", open_files("s3://bucket/x"))
    assert told("s3://none/x").startswith("files: s3://none/x cannot be used (not found: The specified bucket does not")
    assert told("s3://NO!").startswith("files: s3://NO! cannot be used (Parameter validation failed: Invalid bucket na")
    with s3.unreachable():
        assert "Could not connect to the endpoint URL" in told("s3://bucket")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert told("s3://bucket/x").startswith("files: s3://bucket/x cannot be used (Unable to locate credentials);")


@pytest.mark.usefixtures("_new_client")
def test_a_silent_store_is_given_up(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "CALL_SECONDS", 0.5)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(FilesUnavailable, match="it does not answer"):
            open_files("s3://bucket").put("a", b"a")
        with pytest.raises(BundleError, match="^bundle: s3://bucket/b cannot be fetched: it does not answer; check"):
            local_bundle("s3://bucket/b")
    assert time.monotonic() - begun < SECONDS


def test_a_bundle_is_fetched_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sparsectrl_lcm.service.runner.bundle_cache.user_cache_path", lambda _: tmp_path)
    files = {path.relative_to(demo_bundle()): path.read_bytes() for path in demo_bundle().rglob("*") if path.is_file()}
    for name, content in [*files.items(), ("", b""), ("onnx/", b"")]:  # the last two are folders of S3's console
        s3.client.put_object(Bucket=BUCKET, Key=f"a bundle [1]*/{name}", Body=content)
    folder = local_bundle(f"s3://{BUCKET}/a bundle [1]*")
    assert folder is not None
    assert {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == files
    damaged = next(str(path) for path in files if path.suffix == ".weights")
    s3.client.put_object(Bucket=BUCKET, Key=f"a bundle [1]*/{damaged}", Body=b"damaged")
    assert local_bundle(f"s3://{BUCKET}/a bundle [1]*/") == folder
    s3.client.put_object(Bucket=BUCKET, Key="a bundle [1]*/manifest.json", Body=files[Path("manifest.json")] + b"\n")
    with pytest.raises(BundleError, match=damaged):
        local_bundle(f"s3://{BUCKET}/a bundle [1]*")
    with pytest.raises(BundleError, match="s3://none/b cannot be fetched: not found: The specified bucket does not"):
        local_bundle("s3://none/b")
