"""The runner with a real process, in which a stub or the demo bundle makes the clips."""

import asyncio
import inspect
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from fakes.storage_server import StorageService
from fakes.stub_pipeline import FRAMES, SIDE, StubPipeline
from PIL import Image
from sparsectrl_lcm.runtime import (
    BackendError,
    BundleError,
    InvalidRequest,
    Keyframe,
    SparseCtrlLcmError,
    VideoPipeline,
)
from sparsectrl_lcm.service.objects.stored_files import remove_expired_files
from sparsectrl_lcm.service.runner import Event, Job, JobFailed, LocalRunner, Made, Preview, RunnerLost, Step
from sparsectrl_lcm.service.runner.make_runners import make_runners

FAKES = Path(__file__).parent.parent / "fakes"


@pytest.fixture(scope="module", autouse=True)
def _stub_is_found() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def runner(loop: asyncio.Runner, _stub_is_found: None) -> Iterator[LocalRunner]:
    """A shared runner, since it has to stay usable after every test."""
    made = stub_runner(image_pixels=1_000_000)
    loop.run(made.start())
    yield made
    loop.run(made.stop())


def stub_runner(**options: Any) -> LocalRunner:
    return LocalRunner(pipeline="stub_pipeline:load", **options)


def job(folder: Path, prompt: str = "a boat", name: str = "job", **more: Any) -> Job:
    keyframes = more.pop("keyframes", ())
    return Job(name, {"prompt": prompt, "seed": 7, **more}, keyframes, folder / f"{name}.mp4")


def ignore(_: Event) -> None:
    pass


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def failure_of(running: Awaitable[Made]) -> Any:
    with pytest.raises((JobFailed, RunnerLost)) as caught:
        await running
    return caught.value


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def gone(pid: int) -> bool:
    """Whether a process has ended. A zombie has ended too; nobody may reap that of an orphan."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (200, 100)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def png_bomb() -> bytes:
    """The head of a PNG that claims 30000x30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def encoded(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


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


def test_cancel_at_the_next_step(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        runner.cancel("job")

    runner.cancel("unknown")
    failure = loop.run(failure_of(runner.run(job(tmp_path, "slow 0.1", num_inference_steps=12), listen)))
    assert (type(failure), failure.kind) == (JobFailed, "cancelled")
    assert len(seen) <= 3
    assert not list(tmp_path.iterdir())
    loop.run(runner.run(job(tmp_path), ignore))  # the id may be used again


def test_turns_are_taken_in_order_and_cancelled_while_they_wait(
    loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path
) -> None:
    ended = []

    async def run(name: str) -> None:
        with suppress(JobFailed):
            await runner.run(job(tmp_path, "slow 0.05", name), ignore)
        ended.append(name)

    async def scenario() -> None:
        tasks = [asyncio.create_task(run(name)) for name in ("first", "second", "third", "fourth")]
        await asyncio.sleep(0.05)
        runner.cancel("third")
        tasks[3].cancel()
        await asyncio.wait(tasks)

    loop.run(scenario())
    assert ended == ["third", "first", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.mp4", "second.mp4"]


def test_a_caller_that_leaves_cancels_its_job(loop: asyncio.Runner, runner: LocalRunner, tmp_path: Path) -> None:
    async def scenario() -> float:
        begun = asyncio.Event()
        task = asyncio.create_task(runner.run(job(tmp_path, "slow 0.5", num_inference_steps=12), lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.monotonic()
        await runner.run(job(tmp_path), ignore)
        return time.monotonic() - start

    pid = runner.about["pid"]
    assert loop.run(scenario()) < 3
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


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner = stub_runner(step_seconds=1.5)
        await runner.start()
        lost = await failure_of(runner.run(job(tmp_path, "hang"), ignore))
        assert (lost.kind, lost.message) == ("hung", "the runner said nothing for 1.5 s")
        pid = runner.about["pid"]
        await runner.run(job(tmp_path), ignore)
        assert gone(pid)
        await runner.stop()

    asyncio.run(scenario())


def test_loading_is_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner = stub_runner(bundle=tmp_path / "mark", backend="flaky")
        await runner.start()
        assert (runner.ready, runner.about) == (False, {})
        lost = await failure_of(runner.run(job(tmp_path), ignore))  # it does not wait for later attempts
        assert (lost.kind, lost.message) == ("crashed", "the runner could not load: the stub does not load")
        assert runner.problem == lost.message
        await runner.run(job(tmp_path), ignore)
        assert runner.problem is None
        await runner.stop()

    asyncio.run(scenario())


def test_wrong_options_end_it_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        runner = stub_runner(backend="refused")
        await runner.start()
        running = asyncio.create_task(runner.run(job(tmp_path), ignore))
        async with asyncio.timeout(20):
            assert str(await runner.refused()) == "bundle: the stub's is wrong"
        assert (await failure_of(running)).kind == "refused"
        await runner.stop()

    asyncio.run(scenario())
    assert not [line for line in caplog.messages if "asyncio" not in line]


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("refused", BundleError("bundle", "the stub's is wrong")),
        ("invalid", InvalidRequest("precision", "'int2' is not allowed", "give fp32")),
        ("unusable", BackendError("backend", "the stub's cannot run here", "give another")),
    ],
)
def test_a_refusal_keeps_its_class(backend: str, error: SparseCtrlLcmError) -> None:
    async def scenario() -> SparseCtrlLcmError:
        runner = stub_runner(backend=backend)
        await runner.start()
        async with asyncio.timeout(20):
            refusal = await runner.refused()
        await runner.stop()
        return refusal

    refusal = asyncio.run(scenario())
    assert (type(refusal), refusal.field, refusal.reason, refusal.remedy) == (
        type(error),
        error.field,
        error.reason,
        error.remedy,
    )


def test_what_worked_once_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        mark = tmp_path / "mark"
        runner = stub_runner(bundle=mark, backend="lost")
        await runner.start()
        refused = asyncio.create_task(runner.refused())
        assert (await failure_of(runner.run(job(tmp_path, "crash"), ignore))).kind == "crashed"
        await until(lambda: "the stub's is wrong" in (runner.problem or ""))
        mark.unlink()
        await until(lambda: runner.ready)
        assert not refused.done()
        refused.cancel()
        await runner.stop()

    with caplog.at_level("INFO", "sparsectrl_lcm.service.runner"):
        asyncio.run(scenario())
    assert "the stub's is wrong; it starts again" in caplog.text
    assert "Traceback" not in caplog.text


def test_loading_without_end_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner = stub_runner(backend="slow", start_seconds=0.2)
        await runner.start()
        await until(lambda: runner.problem is not None)
        assert runner.problem == "the runner said nothing for 0.2 s"
        await runner.stop()

    asyncio.run(scenario())


def test_stop_ends_every_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner = stub_runner()
        await runner.start()
        await until(lambda: runner.ready)
        running = [asyncio.create_task(runner.run(job(tmp_path, "hang", str(turn)), ignore)) for turn in range(2)]
        await asyncio.sleep(0.1)
        await runner.stop()
        for task in [*running, runner.run(job(tmp_path), ignore)]:
            assert (await failure_of(task)).kind == "stopped"
        assert gone(runner.about["pid"])

    asyncio.run(scenario())


@pytest.fixture(params=["asyncio", "uvloop"])
def clean_loop(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    """A loop in which nothing may be left behind."""
    factory = None if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with asyncio.Runner(loop_factory=factory) as loop:
        yield loop
        assert len(asyncio.all_tasks(loop.get_loop())) == 0
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_nothing_is_left_behind(clean_loop: asyncio.Runner, tmp_path: Path) -> None:
    async def scenario() -> int:
        runner = stub_runner(work=work)
        await runner.start()
        for prompt in ("a boat", "crash", "a boat"):
            with suppress(RunnerLost):
                await runner.run(job(tmp_path, prompt), ignore)
        assert len(list(work.iterdir())) == 1
        running = asyncio.create_task(runner.run(job(tmp_path, "hang"), ignore))
        await asyncio.sleep(0.1)
        await runner.stop()
        assert (await failure_of(running)).kind == "stopped"
        return psutil.Process().num_fds()

    work = tmp_path / "work"
    work.mkdir()
    first, second = (clean_loop.run(scenario()) for _ in range(2))  # a loop may open files of its own in its first run
    assert first == second
    assert not list(work.iterdir())


def test_stop_while_it_starts(clean_loop: asyncio.Runner, tmp_path: Path) -> None:
    async def scenario(rounds: int) -> int:
        runner = stub_runner(work=tmp_path)
        await runner.start()
        for _ in range(rounds):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await runner.stop()
        return psutil.Process().num_fds()

    clean_loop.run(scenario(20))
    for rounds in range(12):
        descriptors = [clean_loop.run(scenario(rounds)) for _ in range(4)]  # others may open files, but not each time
        assert min(after - before for before, after in pairwise(descriptors)) <= 0
    assert not list(tmp_path.iterdir())


def test_an_idle_runner_keeps_its_folder(tmp_path: Path) -> None:
    """The daily clean-up of temporary folders spares the folder of an idle process."""

    async def scenario() -> None:
        service = StorageService(tmp_path / "data", pipeline="stub_pipeline:load")
        (runner,) = make_runners(service.settings)
        await runner.start()
        await until(lambda: runner.capacity == 1)
        for path in service.settings.data.rglob("*"):
            os.utime(path, (0, 0))
        remove_expired_files(service, time.time())
        await runner.run(job(tmp_path), ignore)
        await runner.stop()

    asyncio.run(scenario())


PARENT = """
import asyncio, sys
from pathlib import Path
from sparsectrl_lcm.service.runner import Job, LocalRunner

async def main():
    runner = LocalRunner(pipeline="stub_pipeline:load", work=Path(sys.argv[1]))
    await runner.start()
    job = Job("job", {"prompt": "hang"}, (), Path(sys.argv[1]) / "clip.mp4")
    await runner.run(job, lambda _: print(runner.about["pid"], flush=True))

asyncio.run(main())
"""


def test_it_dies_with_the_server(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        ended, session = gone(pid), os.getsid(pid)
        parent.kill()
    assert not ended
    assert session == pid, "Ctrl-C in the server's terminal would reach it"
    asyncio.run(until(lambda: gone(pid), 5))


def test_the_stub_takes_what_the_pipeline_takes() -> None:
    real, stub = (inspect.signature(kind.generate).parameters for kind in (VideoPipeline, StubPipeline))
    assert set(stub) - {"sizes"} <= set(real)


def test_the_demo_bundle(tmp_path: Path) -> None:
    async def scenario() -> tuple[LocalRunner, Made]:
        runner = LocalRunner(backend="onnxruntime", threads=1)
        await runner.start()
        asked = replace(job(tmp_path, num_inference_steps=1, keyframes=((3, image),)), previews=True)
        made = await runner.run(asked, events.append)
        await runner.stop()
        return runner, made

    image = tmp_path / "noise.png"
    image.write_bytes(encoded((300, 200), "PNG"))
    events: list[Event] = []
    runner, made = asyncio.run(scenario())
    assert made.seed == 7
    assert {event.stage for event in events if isinstance(event, Step)} >= {"text", "denoise", "decode"}
    assert [event.index for event in events if isinstance(event, Preview)] == [8, 0, 4, 8, 12]  # a step, then parts
    assert (runner.about["backend"], runner.about["precision"]) == ("onnxruntime", "fp32")
    frames = np.stack(decode(tmp_path / "job.mp4"))
    assert frames.shape == (16, runner.about["height"], runner.about["width"], 3)
    pipeline = VideoPipeline.load(backend="onnxruntime", threads=1)
    clip = pipeline.generate("a boat", [Keyframe(3, image)], num_inference_steps=1, seed=7)
    reference = clip.save(tmp_path / "reference.mp4", metadata=False)
    assert (tmp_path / "job.mp4").read_bytes() == reference.read_bytes()
