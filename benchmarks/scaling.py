"""The cost of a request by frames, pixels and steps."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT, RequestSize
from sparsectrl_lcm.benchmarks.harness.rounds import KINDS, Contender
from sparsectrl_lcm.benchmarks.harness.worker_process import Worker, WorkerFailed
from sparsectrl_lcm.runtime.format.manifest import Sizes

FRAMES = (1, 2, 4, 8, 16)
SIDES = (128, 192, 256, 384, 512)
STEPS = (1, 2, 4, 8, 12)
AXES = {"frames": "frames", "side": "pixels of a side", "steps": "steps"}
"""The values in which requests differ, with their labels in pictures."""


def points(base: RequestSize, sizes: Sizes, axes: Collection[str] = AXES) -> list[tuple[str, int, RequestSize]]:
    """Requests that differ from `base` in one value. Returns its name, the value and the request.

    Args:
        base: the size that all requests start from.
        sizes: the sizes that the bundle allows.
        axes: the names of `AXES` to vary.
    """
    frames = [("frames", count, replace(base, frames=count)) for count in FRAMES if count <= sizes.max_frames]
    sides = [("side", side, replace(base, width=side, height=side)) for side in SIDES if side % sizes.multiple == 0]
    steps = [("steps", count, replace(base, steps=count)) for count in STEPS]
    return [point for point in (*frames, *steps, *sides) if point[0] in axes]  # the slowest last


def measure(
    contender: Contender, base: RequestSize, sizes: Sizes, repeat: int, axes: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Measures seconds of both kinds of requests at each point of the axes. Stops at the first point that fails."""
    worker = Worker(contender.command)
    try:
        worker.ask("load", **contender.load)
        for axis, value, size in points(base, sizes, axes):
            request = {**size.as_dict(), **contender.request}
            worker.ask("warm_up", **(request | {"steps": 1}))
            samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for number in range(repeat):
                # a new prompt each time, since the conditioning of an earlier prompt would be reused
                prompt = f"{PROMPT}, {axis} {value}, {number}"
                for seed, kind in enumerate(KINDS, start=100 * number):
                    reply = worker.ask("generate", prompt=prompt, seed=seed, **request)
                    samples[kind].append(reply["seconds"])
            yield {"axis": axis, "value": value, "request": size.as_dict(), "samples": samples}
    except WorkerFailed as error:
        yield {"failed": str(error)}
    finally:
        worker.close()
