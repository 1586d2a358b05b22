"""Measures the cost of status polls: clips with clients that poll ten times a second, and the same clips without polls.

    python benchmarks/polling.py
    python benchmarks/polling.py --waiters 100 --rounds 5 --threads 2 --steps 12

Server, runner and clients are separate processes on this machine. Rounds with and without clients alternate.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import reports
from sparsectrl_lcm.runtime.machine import report_head
from sparsectrl_lcm.service.settings import DEFAULT_ENDPOINT

PORT = 8791
HZ = 10
ALONE_POLLS = 500
"""Polls, one after the other, of the client that is alone."""
LIMIT = 600.0
"""Longest time for one clip, in seconds."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiters", type=int, default=100, help="clients that poll; default: 100")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=12, help="LCM steps of a clip; default: 12")
    parser.add_argument("--threads", type=int, help="threads of the runner; default: all cores but one")
    parser.add_argument("--backend", default="auto", help="backend of the runner; default: auto")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    return parser.parse_args()


async def wait_for(url: str, key: str, waiters: int, stop: float) -> list[float]:
    """Polls until the request is done. Returns the seconds of every poll. Each waiter has its own connection."""
    path = url.partition(f":{PORT}")[2]
    ask = f"GET {path}/status?logs=1 HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nAuthorization: Key {key}\r\n\r\n".encode()

    async def one(number: int) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        await asyncio.sleep(number / waiters / HZ)
        seconds, due = [], time.perf_counter()
        while time.time() < stop:
            start = time.perf_counter()
            writer.write(ask)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            seconds.append(time.perf_counter() - start)
            if b"COMPLETED" in body:
                break
            due = max(due + 1 / HZ, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
        writer.close()
        return seconds

    return [second for part in await asyncio.gather(*map(one, range(waiters))) for second in part]


def poll(url: str, key: str, waiters: int, answers: "multiprocessing.Queue[list[float]]") -> None:
    answers.put(asyncio.run(wait_for(url, key, waiters, time.time() + LIMIT)))


def clip(client: httpx.Client, key: str, steps: int, waiters: int) -> tuple[float, list[float]]:
    """Makes one clip. Returns its seconds, and the seconds of the polls meanwhile."""
    queue = f"http://127.0.0.1:{PORT}/queue/{DEFAULT_ENDPOINT}"
    given = {"prompt": "a yellow star", "seed": 1, "num_inference_steps": steps}
    url = f"{queue}/requests/" + client.post(queue, json=given).raise_for_status().json()["request_id"]
    answers: multiprocessing.Queue[list[float]] = multiprocessing.Queue()
    process = multiprocessing.Process(target=poll, args=(url, key, waiters, answers), daemon=True)
    if waiters:
        process.start()
    end = time.monotonic() + LIMIT
    while (status := client.get(url + "/status").json())["status"] != "COMPLETED":
        if time.monotonic() > end:
            sys.exit(f"a clip was not ready after {LIMIT:g} s")
        time.sleep(0.25)
    polls = answers.get(timeout=LIMIT) if waiters else []
    return status["metrics"]["inference_time"], polls


def one_connection(client: httpx.Client, key: str) -> list[float]:
    """Polls a finished request over one kept connection, while no clip is made. Returns the seconds of every poll."""
    given = {"prompt": "a yellow star", "seed": 2, "num_inference_steps": 1}
    queue = f"http://127.0.0.1:{PORT}/queue/{DEFAULT_ENDPOINT}"
    url = f"{queue}/requests/" + client.post(queue, json=given).raise_for_status().json()["request_id"]
    end = time.monotonic() + LIMIT
    while client.get(url + "/status").json()["status"] != "COMPLETED":
        if time.monotonic() > end:
            sys.exit(f"a clip was not ready after {LIMIT:g} s")
        time.sleep(0.25)
    seconds = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)) as connection:
        for _ in range(ALONE_POLLS):
            start = time.perf_counter()
            connection.request("GET", httpx.URL(url).path + "/status", headers={"Authorization": f"Key {key}"})
            connection.getresponse().read()
            seconds.append(time.perf_counter() - start)
    return seconds


def measure(options: argparse.Namespace, key: str) -> dict[str, object]:
    alone, watched, polls = [], [], []
    with httpx.Client(headers={"Authorization": f"Key {key}"}, timeout=60) as client:
        for _ in range(600):
            if client.get(f"http://127.0.0.1:{PORT}/readyz").status_code == 200:
                break
            time.sleep(0.1)
        clip(client, key, options.steps, 0)
        for _ in range(options.rounds):
            alone.append(clip(client, key, options.steps, 0)[0])
            seconds, answers = clip(client, key, options.steps, options.waiters)
            watched.append(seconds)
            polls += answers
        one = one_connection(client, key)
    return {
        "clip_seconds_alone": alone,
        "clip_seconds_watched": watched,
        "ratio_of_medians": median(watched) / median(alone),
        "polls": len(polls),
        "poll_ms": percentiles_ms(polls),
        "poll_ms_one_connection": percentiles_ms(one),
    }


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(seconds, q) * 1e3) for q in (50, 90, 99, 100)}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as data:
        command = "from sparsectrl_lcm.cli import main; main()"
        serve = ["serve", "--data", data, "--port", str(PORT), "--backend", options.backend, "--log-level", "warning"]
        serve += ["--threads", str(options.threads)] if options.threads else []
        made = [sys.executable, "-c", command, "keys", "create", "--data", data]
        server = subprocess.Popen([sys.executable, "-c", command, *serve], stdout=subprocess.DEVNULL)
        try:
            for _ in range(300):
                try:
                    httpx.get(f"http://127.0.0.1:{PORT}/healthz")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            key = subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()
            result = measure(options, key)
        finally:
            server.terminate()
            server.wait()
    packages = ("sparsectrl-lcm", "uvicorn", "sqlalchemy", "onnxruntime", "openvino")
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    report = {**report_head(reports.command(), packages), "settings": settings, **result}
    path = reports.results_file(f"polling-{os.cpu_count()}cores", options.output)
    path.write_text(json.dumps(report, indent=2) + "\n")
    for name in ("poll_ms", "poll_ms_one_connection"):
        print(name, json.dumps(result[name]))
    print("clip", f"{result['ratio_of_medians']:.3f}x", path)


if __name__ == "__main__":
    main()
