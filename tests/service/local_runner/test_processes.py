"""What a runner's process leaves behind, when it ends, and the real pipeline in it."""

import asyncio
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from fakes.storage_server import StorageService
from fakes.stub_pipeline import StubPipeline
from sparsectrl_lcm.runtime import (
    Keyframe,
    VideoPipeline,
)
from sparsectrl_lcm.service.objects.stored_files import remove_expired_files
from sparsectrl_lcm.service.runner import Event, LocalRunner, Made, Preview, RunnerLost, Step
from sparsectrl_lcm.service.runner.make_runners import make_runners

from ..runner_jobs import decode, failure_of, ignore, job, until
from ..waiting import SECONDS
from .conftest import encoded, gone, stub_runner


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
    assert second <= first
    assert not list(work.iterdir())


def test_stop_while_it_starts(clean_loop: asyncio.Runner, tmp_path: Path) -> None:
    async def scenario(rounds: int) -> int:
        runner = stub_runner(work=tmp_path)
        await runner.start()
        for _ in range(rounds):
            await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS):
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
    asyncio.run(until(lambda: gone(pid)))


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
