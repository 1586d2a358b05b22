"""What a runner does with the two jobs of a process: one whose clip is encoded, and the next one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.runner import LocalRunner, RunnerLost, local_runner

from .loop_time import pass_on
from .runner_jobs import failure_of, ignore, job
from .stand_in import StandIn, ended, serving, submit, until
from .waiting import SECONDS

STEP_SECONDS = 10.0


class Process:
    """The server's handle of a process that says what it is told to. None ends it."""

    def __init__(self) -> None:
        self.says: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.says.put_nowait({"say": "ready", "about": {"pid": 1}})
        self.sent: list[dict[str, Any]] = []
        self.ended = False

    def send(self, message: dict[str, Any]) -> None:
        if message["do"] != "load":
            self.sent.append(message)

    async def receive(self, _: float | None) -> dict[str, Any]:
        if (message := await self.says.get()) is not None:
            return message
        self.ended = True
        raise RunnerLost("crashed", "the runner ended with code 3")

    def hung(self, seconds: float) -> RunnerLost:
        return RunnerLost("hung", f"the runner said nothing for {seconds:g} s")

    @property
    def clips(self) -> list[str]:
        """The clips that it was to make."""
        return [Path(message["output"]).stem for message in self.sent if message["do"] == "make"]


def served(scenario: Callable[[LocalRunner, list[Process]], Awaitable[None]], **options: Any) -> None:
    """Runs a scenario with a runner and its processes, the last of which is ready."""
    processes: list[Process] = []

    @asynccontextmanager
    async def started(_: Path | None) -> AsyncIterator[Process]:
        processes.append(Process())
        yield processes[-1]

    async def main() -> None:
        runner = LocalRunner(**options)
        await runner.start()
        async with asyncio.timeout(SECONDS):
            await until(lambda: runner.ready)
            await scenario(runner, processes)
        await runner.stop()

    with patch.object(local_runner, "RunnerProcess", SimpleNamespace(started=started)):
        asyncio.run(main())


def made(number: int) -> dict[str, Any]:
    return {"say": "made", "job": number, "seed": number, "seconds": 0.1, "timings": {"total": 0.1}, "frames": 16}


async def two_jobs(runner: LocalRunner, processes: list[Process], folder: Path, **more: Any) -> list[asyncio.Task[Any]]:
    """The process encodes `a`, which has these options, while it makes `b`."""
    jobs = [replace(job(folder, name="a"), **more), job(folder, name="b")]
    tasks = [asyncio.create_task(runner.run(given, ignore)) for given in jobs]
    await until(lambda: processes[0].clips == ["a"])
    processes[0].says.put_nowait({"say": "encoding", "job": 1})
    await until(lambda: processes[0].clips == ["a", "b"])
    return tasks


async def ends_alone(task: asyncio.Task[Any], processes: list[Process], count: int) -> None:
    """`b` is alone in the newest of `count` processes, as job `count + 1`, and is made there."""
    await until(lambda: len(processes) == count and processes[-1].clips == ["b"])
    processes[-1].says.put_nowait(made(count + 1))
    assert (await task).seed == count + 1


def test_a_cancellation_reaches_its_own_job(tmp_path: Path) -> None:
    async def scenario(runner: LocalRunner, processes: list[Process]) -> None:
        (process,) = processes
        tasks = [asyncio.create_task(runner.run(job(tmp_path, name=name), ignore)) for name in "ab"]
        await until(lambda: len(process.sent) == 1)
        process.says.put_nowait({"say": "encoding", "job": 1})
        await until(lambda: len(process.sent) == 2)
        runner.cancel("a")
        assert process.sent[-1] == {"do": "cancel", "job": 1}
        for number in (2, 1):  # whichever ends first
            process.says.put_nowait(made(number))
        assert [(await task).seed for task in tasks] == [1, 2]

    served(scenario)


def test_the_clip_that_a_process_died_of_is_found(tmp_path: Path) -> None:
    """Both clips of the process are made again, each alone: now it is clear which one it dies of."""

    async def scenario(runner: LocalRunner, processes: list[Process]) -> None:
        guilty, innocent = await two_jobs(runner, processes, tmp_path)
        processes[0].says.put_nowait(None)
        await until(lambda: len(processes) == 2 and processes[1].clips == ["a"])
        processes[1].says.put_nowait({"say": "encoding", "job": 3})
        await asyncio.sleep(0.05)
        assert processes[1].clips == ["a"]
        processes[1].says.put_nowait(None)
        assert (await failure_of(guilty)).kind == "crashed"
        await until(lambda: len(processes) == 3 and processes[2].clips == ["b"])
        later = asyncio.create_task(runner.run(job(tmp_path, name="c"), ignore))
        processes[2].says.put_nowait({"say": "encoding", "job": 4})
        await asyncio.sleep(0.05)
        assert processes[2].clips == ["b"]
        processes[2].says.put_nowait(made(4))
        assert (await innocent).seed == 4
        await until(lambda: processes[2].clips == ["b", "c"])
        processes[2].says.put_nowait(made(5))
        assert (await later).seed == 5

    served(scenario)


def test_an_encoder_that_hangs_is_noticed_while_the_next_clip_is_made(tmp_path: Path) -> None:
    async def scenario(runner: LocalRunner, processes: list[Process]) -> None:
        hangs, innocent = await two_jobs(runner, processes, tmp_path)
        for _ in range(2):
            values = {"stage": "denoise", "step": 1, "steps": 4, "fraction": 0.2}
            processes[0].says.put_nowait({"say": "step", "job": 2, **values})
            await until(processes[0].says.empty)
            await asyncio.sleep(0.01)  # the runner hears it
            pass_on(0.7 * STEP_SECONDS)
        await until(lambda: len(processes) == 2 and processes[1].clips == ["a"])
        pass_on(STEP_SECONDS)
        assert (await failure_of(hangs)).kind == "hung"
        await ends_alone(innocent, processes, 3)

    served(scenario, step_seconds=STEP_SECONDS)


def test_a_clip_that_may_not_be_made_again_ends_with_its_process(tmp_path: Path) -> None:
    async def scenario(runner: LocalRunner, processes: list[Process]) -> None:
        once, other = await two_jobs(runner, processes, tmp_path, retry=False)
        processes[0].says.put_nowait(None)
        assert (await failure_of(once)).kind == "crashed"
        await ends_alone(other, processes, 2)

    served(scenario)


def test_a_cancelled_clip_is_not_made_again(tmp_path: Path) -> None:
    async def scenario(runner: LocalRunner, processes: list[Process]) -> None:
        cancelled, other = await two_jobs(runner, processes, tmp_path)
        runner.cancel("a")
        processes[0].says.put_nowait(None)
        assert (await failure_of(cancelled)).kind == "cancelled"
        await ends_alone(other, processes, 2)

    served(scenario)


@pytest.mark.parametrize("retry", [True, False])
def test_a_runner_knows_whether_a_clip_may_be_made_again(retry: bool, tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        await submit(service, "a", retry=retry)
        assert (await ended(service, "a")).status == 200
        assert runner.jobs[0].retry is retry

    serving(tmp_path, scenario)
