"""A full disk ends no accepted request: what finds no room is tried again."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sparsectrl_lcm.runtime.errors import OutputError
from sparsectrl_lcm.runtime.output.writers import complete_file
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.queue import job_preparation as preparation
from sparsectrl_lcm.service.queue import retries
from sparsectrl_lcm.service.runner import JobFailed
from sparsectrl_lcm.service.runner.clip_jobs import failure_of
from sparsectrl_lcm.service.runner.picture_reader import PictureReader

from .stand_in import StandIn, ended, serving, submit
from .waiting import SECONDS


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)


def test_a_clip_that_finds_no_room_is_made_again(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.fails = JobFailed("disk_full", "No space left on device")
        for request_id in "ab":
            await submit(service, request_id)
        while not {"a", "b"} <= set(runner.order):  # one that waits for room leaves the runner to the others
            await asyncio.sleep(0.01)
        runner.fails = None
        assert [(await ended(service, request_id)).status for request_id in "ab"] == [200, 200]

    serving(tmp_path, scenario)


def test_a_request_that_is_cancelled_does_not_wait_for_room(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.fails = JobFailed("disk_full", "No space left on device")
        await submit(service, "a")
        while not runner.order:
            await asyncio.sleep(0.01)
        assert await service.board.cancel("a")
        assert (await ended(service, "a")).status == 499

    serving(tmp_path, scenario)


def test_a_keyframe_that_finds_no_room_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []

    async def save(_service: Any, _url: str, file: Any, *_: Any) -> None:
        tried.append(sorted(path.name for path in (tmp_path / "work").glob("job-*/*")))
        Image.new("RGB", (8, 8)).save(file, "PNG")
        if len(tried) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario(service: Service, _: StandIn) -> None:
        monkeypatch.setattr(preparation, "save_keyframe", save)
        await submit(service, "a", input={"prompt": "a", "keyframe_0_image_url": "http://x"})
        assert (await ended(service, "a")).status == 200
        assert tried == [["keyframe-0"]] * 4  # what the attempts before it wrote is gone

    serving(tmp_path, scenario)


def test_the_reader_of_keyframes_tells_a_full_disk_from_a_wrong_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a", "PNG")
    (tmp_path / "a.png").symlink_to("/dev/full")  # where it writes

    async def read() -> None:
        reader = PictureReader(10**6, SECONDS)
        try:
            await reader.read("key", [tmp_path / "a"], (32, 16), "lanczos")
        finally:
            await reader.close()

    with pytest.raises(OSError) as error:
        asyncio.run(read())
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "failed")]
)
def test_the_runner_tells_a_full_disk_from_other_failures(tmp_path: Path, number: int, kind: str) -> None:
    with pytest.raises(OutputError) as error, complete_file(tmp_path / "a.mp4"):
        raise OSError(number, "no")
    assert failure_of(error.value, {}).kind == kind
