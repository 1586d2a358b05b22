"""A whole request at full size by torch's engines: in one CUDA graph and plain, with channels last and first."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu_contenders import CUDA_GRAPH, PLAIN, Job, Keyframes
from gpu_worker import SAMPLING, last_warning, sample, warm_up
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

from .processes import CannotRun, Settings, Write
from .torch_pipelines import (
    EMULATED_FRAMES,
    EMULATED_SIDE,
    EMULATED_STEPS,
    NOT_REPLAYED,
    torch_pipeline,
    watched_replays,
)

MODES = ((CUDA_GRAPH, True), (PLAIN, True), (CUDA_GRAPH, False))
"""Mode, and whether convolutions keep channels last; the most useful first."""
NO_GRAPH = f"{PLAIN} for want of a graph"
"""The mode of a row whose CUDA graph was given up or never captured."""
REQUESTS = 20


def measure(settings: Settings, write: Write) -> None:
    """Writes a row for each mode.

    Raises:
        RuntimeError: after all modes, if one gave other frames than the first, frames without contrast, or no replays.
    """
    if not (settings.bundle / "manifest.json").exists():
        raise CannotRun("there are no weights; the stage `weights` did not end")
    job = job_of(settings)
    write({"request": job.request.as_dict()})
    expected: Any = None
    faults: list[str] = []
    for number, (mode, channels_last) in enumerate(MODES[: 1 if settings.dry_run else None], start=1):
        options = {"cuda_graphs": mode == CUDA_GRAPH, "channels_last": channels_last}
        with torch_pipeline(settings.bundle, settings.dry_run, **options) as pipeline:
            row, frames = measure_mode(job, pipeline, settings.deadline(SAMPLING * number / len(MODES)))
        expected = frames if expected is None else expected
        row |= {"frames_std": float(frames.std()), "levels_from_first": levels(frames, expected)}
        ran = NO_GRAPH if mode == CUDA_GRAPH and not row["replayed"] else mode
        name = f"{ran}, channels {'last' if channels_last else 'first'}"
        write({"mode": name} | row)
        faults += [f"{name}: {fault}" for fault in faults_of(row, ran, channels_last)]
    if faults:
        raise RuntimeError("; ".join(faults))


def faults_of(row: dict[str, Any], ran: str, channels_last: bool) -> Iterator[str]:
    """What is wrong with a mode's row."""
    if row["frames_std"] < 1:
        yield "the frames are of one colour"
    if channels_last and row["levels_from_first"]:
        yield "other frames than those of the first mode"
    if ran == NO_GRAPH:
        yield row["mode_warning"] or NOT_REPLAYED


def levels(frames: Any, expected: Any) -> int:
    """The largest difference, in levels of 255."""
    return int(np.abs(frames.astype(np.int16) - expected).max())


def job_of(settings: Settings, contender: str = "", checkpoints: str | None = None) -> Job:
    """The measured request: 512x512, 16 frames, 4 steps."""
    size = (512, 512, 16, 4, REQUESTS)
    if settings.dry_run:
        size = (EMULATED_SIDE, EMULATED_SIDE, EMULATED_FRAMES, EMULATED_STEPS, 1)
    return Job("measure", contender, str(settings.bundle), checkpoints, *size, seconds=settings.seconds)


def measure_mode(job: Job, pipeline: VideoPipeline, deadline: float) -> tuple[dict[str, Any], Any]:
    """The samples of one mode, and the frames of one request. `deadline` is a time of `time.perf_counter`."""
    executor: Any = pipeline.executor
    frames: list[Any] = []

    def ask(seed: int, keyframes: Keyframes) -> dict[str, float]:
        pictures = [Keyframe(index, picture) for index, picture in keyframes.items()]
        size = {"num_inference_steps": job.steps, "width": job.width, "height": job.height, "num_frames": job.frames}
        clip = pipeline.generate(PROMPT, pictures, seed=seed, **size)
        frames[:] = [clip.frames]
        return dict(clip.timings)

    with last_warning() as warning, watched_replays() as replays:
        fresh = job.keyframes()
        begin = time.perf_counter()
        load = ask(0, next(fresh))["load"]
        row: dict[str, Any] = {"load_s": load, "first_s": time.perf_counter() - begin}
        current = warm_up(ask, fresh)
        ask(0, current)
        kept = frames[0]
        replays.clear()
        row["samples"] = sample(job.requests, ask, current, fresh, deadline)
    free, total = executor._cuda.memory()
    row |= {"device_bytes": total - free, "replayed": all(replays), "mode_warning": warning.text}
    return row | percentiles(row["samples"]), kept


def percentiles(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The p50 and p95 of each stage, by kind of request."""
    return {
        name: {
            kind: {stage: float(np.percentile(values, percent)) for stage, values in stages.items()}
            for kind, stages in samples.items()
        }
        for name, percent in (("p50", 50), ("p95", 95))
    }


def checkpoints_folder(settings: Settings) -> Path:
    """The folder for what diffusers needs as files."""
    return Path(settings.work) / "checkpoints"
