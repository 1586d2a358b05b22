"""What `/metrics` tells while requests wait and run."""

from pathlib import Path

from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.runner import RunnerStatus

from .test_dispatch import StandIn, _soon, ended, serving, submit, until  # noqa: F401 (a fixture)


def test_waiting_and_running_requests(tmp_path: Path) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        def told(*lines: str) -> bool:
            text = service.metrics.text().decode().splitlines()
            return all(f"sparsectrl_lcm_{line}" in text for line in lines)

        runner.runners = [RunnerStatus("cpu", "busy"), RunnerStatus("cuda:0", "loading")]
        runner.hold.clear()
        for name in "abc":
            await submit(service, name)
        busy = ('runner_busy{runner="cpu"} 1.0', 'runner_ready{runner="cpu"} 1.0')
        await until(lambda: told("queue_depth 2.0", "running 1.0", *busy, 'runner_ready{runner="cuda:0"} 0.0'))
        runner.runners = [RunnerStatus("cpu", "ready")]
        runner.hold.set()
        assert (await ended(service, "c")).status == 200
        await until(lambda: told("queue_depth 0.0", "running 0.0", 'runner_busy{runner="cpu"} 0.0'))
        assert told('requests_ended_total{status="200"} 3.0', "queue_wait_seconds_count 3.0")

    serving(tmp_path, scenario)
