"""Jobs of a runner with a real process: progress, turns, failures, crashes. A stub makes the clips."""

import asyncio
import io
import os
import signal
import struct
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from fakes.stub_pipeline import FRAMES, SIDE
from PIL import Image
from sparsectrl_lcm.service.runner import Event, JobFailed, LocalRunner, Preview, RunnerLost, Step

from ..holds import Hold
from ..runner_jobs import decode, failure_of, held_starts, ignore, job, until
from ..waiting import SECONDS
from .conftest import encoded


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (200, 100)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def png_bomb() -> bytes:
    """The head of a PNG that claims 30000x30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_a_clip_with_progress_and_previews(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    events: list[Event] = []
    red = picture(tmp_path / "red.jpg", (255, 0, 0))
    green = picture(tmp_path / "green.webp", (0, 255, 0))
    asked = replace(job(tmp_path, seed=2**64 - 1, keyframes=((9, red), (2, green))), previews=True)
    made = loop.run(runner.run(asked, events.append))

    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.stage, step.step) for step in steps[:2]] == [("denoise", 0), ("denoise", 1)]
    assert [step.fraction for step in steps] == sorted(step.fraction for step in steps)
    assert steps[-1].fraction == 1
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [8, 8, 8, 8, 0, 8]  # of four steps, and of two parts
    assert Image.open(io.BytesIO(previews[0].jpeg)).format == "JPEG"

    assert made.seed == 2**64 - 1
    assert made.seconds > 0
    assert made.timings.keys() == {"denoise", "total"}
    frames = decode(tmp_path / "job.mp4")
    assert len(frames) == FRAMES
    assert {frame.shape for frame in frames} == {(SIDE, SIDE, 3)}
    assert np.abs(frames[9].mean((0, 1)) - (255, 0, 0)).max() < 12
    assert np.abs(frames[2].mean((0, 1)) - (0, 255, 0)).max() < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["green.webp", "job.mp4", "red.jpg"]


def test_what_it_says_of_itself(loop: asyncio.Runner, runner: LocalRunner) -> None:
    loop.run(until(lambda: runner.ready))
    sizes = {"width": SIDE, "height": SIDE, "frames": FRAMES, "fps": 8}
    about = dict(runner.about)
    assert psutil.Process(about.pop("pid")).ppid() == os.getpid()
    assert about == {"backend": "auto", "precision": None, "bundle": "stub", **sizes}
    assert runner.problem is None


def test_it_yields_to_the_server_and_heeds_no_signal_of_the_group(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path
) -> None:
    loop.run(until(lambda: runner.ready))
    process = psutil.Process(runner.about["pid"])
    assert process.nice() == min(psutil.Process().nice() + 5, 19)
    if sys.platform == "linux":
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    loop.run(runner.run(job(tmp_path), ignore))
    assert runner.about["pid"] == process.pid


def test_cancel_at_the_next_step(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path, hold: Hold) -> None:
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        runner.cancel("job")

    runner.cancel("unknown")
    failure = loop.run(failure_of(runner.run(job(tmp_path, hold.prompt, num_inference_steps=12), listen)))
    assert (type(failure), failure.kind) == (JobFailed, "cancelled")
    assert {event.step for event in seen if isinstance(event, Step)} <= {0, 1}
    assert not list(tmp_path.iterdir())
    loop.run(runner.run(job(tmp_path), ignore))  # the id may be used again


def test_turns_are_taken_in_order_and_cancelled_while_they_wait(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path, hold: Hold
) -> None:
    ended, begun = [], asyncio.Event()

    async def run(name: str) -> None:
        with suppress(JobFailed):
            await runner.run(job(tmp_path, hold.prompt, name), lambda _: begun.set())
        ended.append(name)

    async def scenario() -> None:
        tasks = [asyncio.create_task(run(name)) for name in ("first", "second", "third", "fourth")]
        await begun.wait()
        runner.cancel("third")
        tasks[3].cancel()
        await asyncio.wait(tasks[2:])
        hold.let_go()
        await asyncio.wait(tasks)

    loop.run(scenario())
    assert ended == ["third", "first", "second"]
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["first.mp4", "second.mp4"]


def test_a_caller_that_leaves_cancels_its_job(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path, hold: Hold
) -> None:
    async def scenario() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(runner.run(job(tmp_path, hold.prompt), lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(SECONDS):
            await runner.run(job(tmp_path), ignore)  # which the one before would hold up for ever

    pid = runner.about["pid"]
    loop.run(scenario())
    assert runner.about["pid"] == pid


@pytest.mark.parametrize(
    ("prompt", "kind", "message", "field"),
    [
        ("oom", "out_of_memory", "no memory for the stub", None),
        ("device oom", "out_of_memory", "no memory on the device", None),
        ("fail", "failed", "the stub failed", None),
        ("invalid", "invalid", "'x' is not in this bundle; allowed are scribble", "controlnet"),
    ],
)
def test_a_job_that_fails(
    loop: asyncio.Runner,
    runner: LocalRunner,
    tmp_path: Path,
    prompt: str,
    kind: str,
    message: str,
    field: str | None,
) -> None:
    loop.run(until(lambda: runner.ready))
    pid = runner.about["pid"]
    failure = loop.run(failure_of(runner.run(job(tmp_path, prompt, controlnet="x"), ignore)))
    assert (failure.kind, failure.message, failure.field, failure.keyframe) == (kind, message, field, None)
    loop.run(runner.run(job(tmp_path), ignore))
    assert runner.about["pid"] == pid


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"<html>not an image</html>", "cannot be read"),
        (encoded((64, 64), "TIFF"), "give a whole image as PNG, JPEG"),
        (encoded((64, 64), "PNG")[:-2000], "cannot be read"),
        (encoded((64, 64), "JPEG")[:100], "cannot be read"),
        (encoded((1001, 1000), "JPEG"), "1001x1000 has too many pixels; allowed are 1,000,000"),
        (png_bomb(), "too many pixels"),
    ],
    ids=["empty", "text", "tiff", "png-cut", "jpeg-cut", "large", "bomb"],
)
def test_a_keyframe_that_is_no_image(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path, content: bytes, message: str
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    keyframes = ((0, picture(tmp_path / "good.png", (1, 2, 3))), (5, bad))
    failure = loop.run(failure_of(runner.run(job(tmp_path, keyframes=keyframes), ignore)))
    assert (failure.kind, failure.keyframe) == ("invalid", 1)
    assert message in failure.message


def test_a_crash_ends_only_its_job(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    loop.run(until(lambda: runner.ready))
    pid = runner.about["pid"]
    lost = loop.run(failure_of(runner.run(job(tmp_path, "crash"), ignore)))
    assert (type(lost), lost.kind, lost.message) == (RunnerLost, "crashed", "the runner ended with code 3")
    assert lost.lines[-2:] == ("these are", "the last words")
    assert not runner.ready
    loop.run(runner.run(job(tmp_path), ignore))
    assert runner.ready
    assert runner.about["pid"] != pid


def test_a_lost_device_takes_a_new_process(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    lost = loop.run(failure_of(runner.run(job(tmp_path, "device lost"), ignore)))
    assert (lost.kind, lost.message) == ("crashed", "the runner lost its device: the device has fallen off")
    loop.run(runner.run(job(tmp_path), ignore))


def test_killed_from_outside(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    def kill() -> None:
        os.kill(runner.about["pid"], signal.SIGKILL)

    loop.run(until(lambda: runner.ready))
    with held_starts():
        kill()
        loop.run(until(lambda: not runner.ready))  # it notices although no job runs
        assert "SIGKILL" in str(runner.problem)
    lost = loop.run(failure_of(runner.run(job(tmp_path, "hang"), lambda _: kill())))
    assert (lost.kind, lost.message) == (
        "crashed",
        "the runner was ended by SIGKILL, which the system sends if memory runs out",
    )
    loop.run(runner.run(job(tmp_path), ignore))


def test_what_libraries_print_disturbs_nothing(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "sparsectrl_lcm.service.runner"):
        loop.run(runner.run(job(tmp_path, "noisy"), ignore))
    assert len(decode(tmp_path / "job.mp4")) == FRAMES
    assert '{"say": "made"}' in caplog.messages
    assert any("no newline" in line for line in caplog.messages)
    assert max(map(len, caplog.messages)) <= 2000


def test_a_listener_that_fails_harms_nothing(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    def listen(_: Event) -> None:
        raise RuntimeError("the listener's")

    loop.run(runner.run(job(tmp_path), listen))
