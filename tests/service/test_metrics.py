"""What `/metrics` tells while requests wait and run."""

from pathlib import Path

import pytest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.runner import RunnerStatus

from .conftest import APP
from .stand_in import StandIn, ended, serving, submit, until

pytestmark = pytest.mark.usefixtures("soon")


def test_waiting_and_running_requests(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        def told(*lines: str) -> bool:
            text = service.metrics.text().decode().splitlines()
            return all(f"sparsectrl_lcm_{line}" in text for line in lines)

        runner.runners = [RunnerStatus("cpu", "busy"), RunnerStatus("cuda:0", "loading")]
        runner.hold.clear()
        for name in "abc":
            await submit(service, name)
        of = f'endpoint="{APP}"'

        def shown(name: str, runner: str, value: int) -> str:
            return f'runner_{name}{{{of},runner="{runner}"}} {value}.0'

        def counted(waiting: int, running: int) -> tuple[str, str]:
            return f"queue_depth{{{of}}} {waiting}.0", f"running{{{of}}} {running}.0"

        states = shown("busy", "cpu", 1), shown("ready", "cpu", 1), shown("ready", "cuda:0", 0)
        await until(lambda: told(*counted(2, 1), *states))
        runner.runners = [RunnerStatus("cpu", "ready")]
        runner.hold.set()
        assert (await ended(service, "c")).status == 200
        await until(lambda: told(*counted(0, 0), shown("busy", "cpu", 0)))
        assert told(f'requests_ended_total{{{of},status="200"}} 3.0', f"queue_wait_seconds_count{{{of}}} 3.0")

    serving(tmp_path, scenario)
