"""A runner that cannot load, hangs, or is stopped."""

import asyncio
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime import (
    BackendError,
    BundleError,
    InvalidRequest,
    SparseCtrlLcmError,
)
from sparsectrl_lcm.service.runner import Event

from ..loop_time import pass_on
from ..runner_jobs import failure_of, ignore, job, until
from ..waiting import SECONDS
from .conftest import gone, stub_runner


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner, events = stub_runner(step_seconds=SECONDS), list[Event]()
        await runner.start()
        running = asyncio.create_task(failure_of(runner.run(job(tmp_path, "hang"), events.append)))
        await until(lambda: len(events) == 2)  # those before its second step, in which it hangs
        pass_on(SECONDS)
        lost = await running
        assert (lost.kind, lost.message) == ("hung", "the runner said nothing for 60 s")
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
        async with asyncio.timeout(SECONDS):
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
        async with asyncio.timeout(SECONDS):
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
