"""Keyframes that take long to read, or fill the log: a process of its own reads them, in a limited time."""

import asyncio
import io
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.runtime.images import MAX_SCANS, load_picture
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.runner.interface import JobFailed
from sparsectrl_lcm.service.runner.picture_reader import PictureReader
from sparsectrl_lcm.service.runner.process_handle import LINES_LOGGED, _Output

from .stand_in import StandIn, ended, serving, submit, until
from .waiting import SECONDS


def jpeg(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    made = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(made, "JPEG", progressive=True)
    data = made.getvalue()[:-2]
    last = data[data.rindex(b"\xff\xda") :]
    return data + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_has_few_scans() -> None:
    assert load_picture(jpeg(MAX_SCANS), "image").size == (64, 64)
    with pytest.raises(InvalidRequest, match=f"{MAX_SCANS + 1} scans"):
        load_picture(jpeg(MAX_SCANS + 1), "image")


def test_exif_tags_cause_no_warnings() -> None:
    count = 50
    tags = b"".join(tag.to_bytes(2, "big") + b"\0\x02\xff\xff\xff\xff\0\0\0\x09" for tag in range(1000, 1000 + count))
    made = io.BytesIO()
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + count.to_bytes(2, "big") + tags + bytes(4)
    Image.new("RGB", (8, 8)).save(made, "PNG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_picture(made.getvalue(), "image")
    assert not caught


def read(files: list[Path], seconds: float = 5 * SECONDS, pixels: int = 10**6) -> None:
    async def main() -> None:
        reader = PictureReader(pixels, seconds)
        try:
            await reader.read("key", files, (32, 16), "lanczos")
        finally:
            await reader.close()

    asyncio.run(main())


def test_pictures_are_replaced_in_the_clips_size(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file, format in zip(files, ("PNG", "JPEG"), strict=True):
        Image.new("RGB", (64, 32), (9, 200, 9)).save(file, format)
    read(files)
    for file in files:
        picture = Image.open(file)
        assert (picture.format, picture.size) == ("PNG", (32, 16))
        assert np.abs(np.asarray(picture).astype(int) - (9, 200, 9)).max() <= 3
    files[1].write_bytes(b"no image")
    with pytest.raises(JobFailed, match="cannot be read") as failed:
        read(files)
    assert (failed.value.kind, failed.value.keyframe) == ("invalid", 1)
    Image.new("RGB", (64, 32)).save(files[0], "PNG")
    with pytest.raises(JobFailed, match="64x32 has too many pixels"):
        read(files, pixels=100)


def test_a_picture_that_takes_too_long_is_left(tmp_path: Path) -> None:
    file, endless = tmp_path / "a", tmp_path / "b"
    Image.new("RGB", (64, 32)).save(file, "PNG")
    os.mkfifo(endless)  # whoever opens it waits
    with pytest.raises(JobFailed, match=r"takes longer than 0\.01 seconds"):
        read([endless, file], 0.01)

    async def cancelled() -> float:
        reader = PictureReader(10**6, SECONDS)
        task = asyncio.create_task(reader.read("key", [endless, file], (32, 16), "lanczos"))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        seconds = time.monotonic() - start
        await reader.close()
        return seconds

    assert asyncio.run(cancelled()) < SECONDS / 2
    assert Image.open(file).size == (64, 32)


def test_the_next_process_is_started_ahead(tmp_path: Path) -> None:
    """Each request has a process of its own, also after one that was started ahead was killed. None stays behind."""
    file = tmp_path / "a"
    Image.new("RGB", (64, 32)).save(file, "PNG")
    used = []

    async def main() -> None:
        reader = PictureReader(10**6, SECONDS)
        for number in range(4):
            await reader.read("key", [file], None, "lanczos")
            assert reader._next is not None
            ahead = await reader._next
            assert ahead.returncode is None
            used.append(ahead)
            if number == 2:
                ahead.kill()
                await ahead.wait()
        await reader.close()

    asyncio.run(main())
    assert len({process.pid for process in used}) == 4
    assert all(process.returncode is not None for process in used)


@pytest.mark.parametrize(("warm", "ahead"), [((64, 64), 1), (None, 0)])
def test_a_warm_server_has_a_process_for_its_first_keyframes(
    tmp_path: Path, warm: tuple[int, int] | None, ahead: int
) -> None:
    def readers() -> int:
        commands = []
        for process in psutil.Process().children():
            with suppress(psutil.Error):  # it has just ended
                commands.append(process.cmdline())
        return sum(command[-1].endswith(".picture_main") for command in commands if command)

    async def scenario(service: Service, _: StandIn) -> None:
        await until(lambda: readers() == ahead)
        await submit(service, "a")
        assert (await ended(service, "a")).status == 200
        assert readers() == ahead

    serving(tmp_path, scenario, warm=warm)
    assert readers() == 0


def test_a_job_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """The lines of a job are bounded, and counted anew for the next one. The last ones are kept for errors."""
    caplog.set_level("INFO")
    output = _Output()
    for _ in range(2):
        output.begin()
        output.data_received(b"a line\n" * 10 * LINES_LOGGED + b"the last\n")
    assert [record.getMessage() for record in caplog.records].count("a line") == 2 * LINES_LOGGED
    assert len(caplog.records) == 2 * (LINES_LOGGED + 1)
    assert output.lines[-1] == "the last"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what is mapped")
def test_the_memory_of_a_reader_is_bounded() -> None:
    """Twice the pixels that are allowed fit, for a library that takes much for each. A gigabyte does not."""
    program = f"""
from sparsectrl_lcm.service.runner.picture_main import limit_memory
limit_memory({10**6})
kept = bytes(2 * 4 * {10**6})
try:
    bytearray(2**30 + {os.cpu_count()} * 2**24)
except MemoryError:
    print("refused")
"""
    said = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (said.stdout, said.stderr) == ("refused\n", "")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_largest_pictures_are_read_in_it(tmp_path: Path, format: str) -> None:
    file = tmp_path / "a"
    Image.new("RGBA" if format == "PNG" else "RGB", (4000, 4000), (9, 200, 9)).save(file, format)
    read([file], pixels=16_000_000)
    assert Image.open(file).size == (32, 16)
