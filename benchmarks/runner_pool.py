"""Measures a server with several runners whose pipelines sleep: clips per second, and the overhead of a request.

    python benchmarks/runner_pool.py
    python benchmarks/runner_pool.py --pool ray --runners 1 8 --requests 200 --rounds 3

With `--pool ray` the runners are on a Ray cluster of three nodes, which are processes of this machine, too.

Server, runners and client are processes of this machine. Each round goes through all counts of runners. Requests are
submitted while longer ones keep the runners busy, so that the time of submissions does not count; each runner has made
a clip before. The client then reads the server's database five times a second, which costs the server nothing.

    clips_per_second   from the end of the first longer request to that of the last request
    overhead_ms        wall time of a request on a runner, beside `pipeline_ms`
    pipeline_ms        what the runner reports for a clip: sleep and encoding
    gap_ms             from the end of a sleep to the next one in the same runner
    processor_ms       processor time of a request by kind of process: server, runners, this client, and Ray's own
    idle_ms            processor time of each second before the first request, with `--idle`
    out_of_order       requests that began before an earlier one
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import reports
import sleeping_pipeline
from sparsectrl_lcm.runtime.machine import report_head
from sparsectrl_lcm.service.settings import DEFAULT_ENDPOINT, SQLITE

PORT = 8792
LIMIT = 300.0
"""Longest time for the requests of one measurement, in seconds."""
SERVE = """
import asyncio, sys
from pathlib import Path
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.server import serve
from sparsectrl_lcm.service.settings import Settings
data, port, count, ray = sys.argv[1:]
pool = {"runners": int(count)}
if ray:
    pool = {"pool": "ray", "ray_address": ray, "replicas": count, "gpus_per_replica": 0.0}
settings = Settings(Path(data), pipeline="sleeping_pipeline:load", threads=1, anonymous=True, **pool)
asyncio.run(serve(settings, [Listener("127.0.0.1", int(port))]))
"""
NODES = 3
KINDS = {
    "process_main": "runners",
    "ray::ServeReplica": "runners",
    "ray::ServeController": "serve controller",
    "ray::": "other workers",
    "/gcs_server ": "gcs_server",
    "/raylet ": "raylets",
    "dashboard/agent.py": "dashboard agents",
    "runtime_env/agent": "runtime_env agents",
    "log_monitor.py": "log monitors",
    "monitor.py": "autoscaler",
}
"""What the commands of processes contain, in the order of the search."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=("local", "ray"), default="local", help="default: local")
    parser.add_argument("--runners", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--requests", type=int, default=200, help="default: 200")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds to wait before the requests; default: 0")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    return parser.parse_args()


@contextmanager
def ray_cluster(runners: int) -> Iterator[str]:
    """Runs a Ray cluster until the block ends; yields its address."""
    from ray.cluster_utils import Cluster

    share = {"num_cpus": -(-runners // NODES) + 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=share)
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=share["num_cpus"])
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def served(data: Path, runners: int, ray_address: str) -> Iterator[tuple[httpx.Client, int]]:
    """Runs a server in a folder until the block ends; yields a client and its pid once all runners are ready."""
    command = [sys.executable, "-c", SERVE, str(data), str(PORT), str(runners), ray_address]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            end = time.monotonic() + LIMIT
            while ready(client) < runners:
                if time.monotonic() > end or server.poll() is not None:
                    sys.exit("the server is not ready")
                time.sleep(0.1)
            yield client, server.pid
    finally:
        server.terminate()
        server.wait()


def ready(client: httpx.Client) -> int:
    try:
        answer = client.get("/readyz").json()
    except httpx.TransportError:
        return 0
    endpoints = answer.get("endpoints", {}).values()  # none while the database does not answer
    return sum(runner["state"] == "ready" for endpoint in endpoints for runner in endpoint["runners"])


def processor_seconds(server: int) -> Counter[str]:
    """Returns the processor time that each kind of process has taken: this one and those that it started."""
    seconds: Counter[str] = Counter()
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[kind_of(process, this, server)] += times.user + times.system
    return seconds


def kind_of(process: psutil.Process, this: psutil.Process, server: int) -> str:
    if process.pid in (this.pid, server):
        return "server" if process.pid == server else "client"
    command = " ".join(process.cmdline()) + " "
    return next((kind for part, kind in KINDS.items() if part in command), "other")


def gaps(folder: Path) -> list[float]:
    """Returns the seconds between the sleeps of each runner, which each has a file of."""
    found = []
    for file in folder.iterdir():
        times = [[float(time) for time in line.split()] for line in file.read_text().splitlines()]
        found += [later[0] - earlier[1] for earlier, later in pairwise(times)]
    return found


def submit(client: httpx.Client, prompts: list[str]) -> None:
    for prompt in prompts:
        client.post(f"/queue/{DEFAULT_ENDPOINT}", json={"prompt": prompt, "seed": 1}).raise_for_status()


def wait_for(store: sqlite3.Connection, requests: int) -> None:
    """Returns once so many requests have ended."""
    end = time.monotonic() + LIMIT
    while store.execute("select count(*) from requests where status = 200").fetchone()[0] < requests:
        if time.monotonic() > end:
            sys.exit(f"{requests} requests did not end within {LIMIT:g} s")
        time.sleep(0.2)


def measure(runners: int, requests: int, ray: bool, idle: float) -> dict[str, Any]:
    """Runs the requests once."""
    with ExitStack() as stack:
        data, times = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        os.environ[sleeping_pipeline.TIMES] = str(times)
        address = stack.enter_context(ray_cluster(runners)) if ray else ""
        client, server = stack.enter_context(served(data, runners, address))
        store = stack.enter_context(closing(sqlite3.connect(data / SQLITE)))
        submit(client, ["sleep 1"] * runners)  # a runner's first clip loads the encoder
        wait_for(store, runners)
        before = processor_seconds(server)
        time.sleep(idle)
        resting = processor_seconds(server) - before
        submit(client, [f"sleep {2 + 0.02 * requests}"] * runners + ["a star"] * requests)
        before = processor_seconds(server)
        wait_for(store, 2 * runners + requests)
        taken = processor_seconds(server) - before
        rows = store.execute("select started_at, finished_at, seconds from requests order by sequence").fetchall()
        between = gaps(times)
    gates, rows = rows[runners : 2 * runners], rows[2 * runners :]
    starts = [start for start, _, _ in rows]
    wall = max(end for _, end, _ in rows) - min(end for _, end, _ in gates)
    return {
        "clips_per_second": requests / wall,
        "overhead_ms": (wall * runners / requests - median(seconds for *_, seconds in rows)) * 1e3,
        "pipeline_ms": median(seconds for *_, seconds in rows) * 1e3,
        "gap_ms": median(between) * 1e3,
        "processor_ms": {kind: seconds / requests * 1e3 for kind, seconds in sorted(taken.items())},
        "idle_ms": {kind: seconds / idle * 1e3 for kind, seconds in sorted(resting.items()) if idle},
        "out_of_order": sum(later < earlier for earlier, later in pairwise(starts)),
    }


def median_of(values: list[Any]) -> Any:
    """Returns the median of numbers, or those of the values of dictionaries."""
    if isinstance(values[0], dict):
        return {name: median(value.get(name, 0) for value in values) for name in values[0]}
    return median(values)


def main() -> None:
    options = arguments()
    here = str(Path(__file__).parent)  # for the processes of runners
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in options.runners}
    for _ in range(options.rounds):
        for count in options.runners:
            found[count].append(measure(count, options.requests, options.pool == "ray", options.idle))
            print(count, json.dumps(found[count][-1]), flush=True)
    rows = {count: {name: median_of([run[name] for run in runs]) for name in runs[0]} for count, runs in found.items()}
    single = rows[min(rows)]["clips_per_second"] / min(rows)
    for count, row in rows.items():
        row["of_linear"] = row["clips_per_second"] / single / count
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    head = report_head(reports.command(), ("sparsectrl-lcm", "uvicorn", "sqlalchemy", "ray"))
    path = reports.results_file(f"runner-pool-{options.pool}-{os.cpu_count()}cores", options.output)
    path.write_text(json.dumps({**head, "settings": settings, "runs": found, "medians": rows}, indent=2) + "\n")
    for count, row in rows.items():
        print(count, json.dumps(row))
    print(path)


if __name__ == "__main__":
    main()
