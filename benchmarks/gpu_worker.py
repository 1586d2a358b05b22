"""One process of gpu.py: measures a contender, builds its engines, or measures the GPU's peak. Writes JSON rows."""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_pipeline import generate, load_pipeline, watch_stages
from gpu_contenders import CUDA_GRAPH, PLAIN, RECORDS, Diffusers, Job, Keyframes, Row, build_engines
from machine_limits import cuda_product_rate
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError, first_line
from sparsectrl_lcm.runtime.request_warnings import request_log

LEAST = 3
"""Fewest samples, which are taken even if time runs out."""
SAMPLING = 0.85
"""Share of a contender's time after which it starts no further samples."""

Ask = Callable[[int, Keyframes], dict[str, float]]
"""A function that makes a clip with a seed and keyframes, and returns the seconds of its stages."""


def work(job: Job) -> None:
    """Writes a line of JSON for each result. If the process cannot go on, the last line has the reason."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for jobs in the background
    is_diffusers = isinstance(RECORDS.get(job.contender), Diffusers)
    measure = measure_diffusers if is_diffusers else measure_pipeline
    roles: dict[str, Callable[[Job], Iterable[Row]]] = {
        "measure": measure,
        "build": build_engines,
        "peak": lambda _: [cuda_product_rate()],
    }
    with Path(job.output).open("a", encoding="utf-8", buffering=1) as file:
        try:
            for row in roles[job.role](job):
                file.write(json.dumps(row) + "\n")
        except ImportError as error:
            reason = f"{first_line(error)}; run: pip install '.[bench]'"
            file.write(json.dumps({"reason": reason}) + "\n")
        except Exception as error:  # any failure becomes a row: the other contenders go on
            known = isinstance(error, SparseCtrlLcmError)
            reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
            file.write(json.dumps({"reason": reason}) + "\n")


def measure_pipeline(job: Job) -> Iterator[Row]:
    """Measures a backend of this project with and without CUDA graphs."""

    start = time.perf_counter()
    modes = RECORDS[job.contender].modes
    for number, mode in enumerate(modes, start=1):
        deadline = start + SAMPLING * job.seconds * number / len(modes)
        yield {"mode": mode, **_measure_mode(job, mode, deadline)}


def _measure_mode(job: Job, mode: str | None, deadline: float) -> Row:
    """Loads the backend and takes the samples of one mode. Returns a reason instead if another mode ran."""
    from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

    begin = time.perf_counter()
    pipeline = VideoPipeline.load(job.bundle, job.contender, cuda_graphs=mode != PLAIN)
    load = time.perf_counter() - begin

    def ask(seed: int, keyframes: Keyframes) -> dict[str, float]:
        pictures = [Keyframe(index, picture) for index, picture in keyframes.items()]
        clip = pipeline.generate(
            PROMPT,
            pictures,
            seed=seed,
            num_inference_steps=job.steps,
            width=job.width,
            height=job.height,
            num_frames=job.frames,
        )
        return dict(clip.timings)

    try:
        with last_warning() as warning:
            fresh = job.keyframes()
            begin = time.perf_counter()
            load += ask(0, next(fresh))["load"]
            first = time.perf_counter() - begin
            current = warm_up(ask, fresh)
        if mode == CUDA_GRAPH and warning.text:
            return {"reason": warning.text}
        return {"load_s": load, "first_s": first, "samples": sample(job.requests, ask, current, fresh, deadline)}
    finally:
        pipeline.close()


def measure_diffusers(job: Job, device: str = "cuda", dtype: str = "float16") -> Iterator[Row]:
    """Measures diffusers on the same checkpoints.

    Raises:
        SparseCtrlLcmError: there are no checkpoints, or torch has no CUDA.
    """
    if job.checkpoints is None:
        raise SparseCtrlLcmError("checkpoints", "missing: diffusers cannot read a bundle", "give --checkpoints DIR")
    deadline = time.perf_counter() + SAMPLING * job.seconds
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SparseCtrlLcmError("", "torch has no CUDA here", "install a build of torch for CUDA")
    start = time.perf_counter()
    pipe = load_pipeline(Path(job.checkpoints)).to(device, getattr(torch, dtype))
    yield from sample_diffusers(job, pipe, device, start, deadline)


def sample_diffusers(job: Job, pipe: Any, device: str, start: float, deadline: float) -> Iterator[Row]:
    """Measures diffusers' pipeline. Gives its row three times, with more each time, in case the process is killed.

    The first row has the seconds of the first request, the second the samples, the third those of their stages, too.

    Args:
        job: the request and how often to make it.
        pipe: the pipeline.
        device: cuda or cpu.
        start: when loading it began, on `time.perf_counter`.
        deadline: when to start no further samples, on `time.perf_counter`.
    """
    import torch

    if job.vae_slicing:
        pipe.vae.enable_slicing()
    record = RECORDS[job.contender]
    if isinstance(record, Diffusers) and record.compile_mode:
        compile_models(pipe, record.compile_mode)
    load = time.perf_counter() - start

    def ask(seed: int, keyframes: Keyframes) -> dict[str, float]:
        generate(pipe, PROMPT, seed, job.request, keyframes)
        return {}

    fresh = job.keyframes()
    begin = time.perf_counter()
    ask(0, next(fresh))
    row: Row = {"mode": None, "load_s": load, "first_s": time.perf_counter() - begin}
    yield row
    current = warm_up(ask, fresh)
    samples = sample(job.requests, ask, current, fresh, deadline)
    yield row | {"samples": samples}
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    stages = watch_stages(pipe, synchronize)
    for seed in range(LEAST):  # last, since timing a stage makes the host wait for the device
        stages.append({})
        ask(seed, current)
    for samples_of_kind in samples.values():
        samples_of_kind |= {stage: [timings[stage] for timings in stages] for stage in stages[0]}
    yield row | {"samples": samples}


def compile_models(pipe: Any, mode: str) -> None:
    """Compiles SparseCtrl, the UNet and the decoder with torch.compile.

    With CUDA graphs (reduce-overhead), replays after a step's mark overwrite the results of earlier steps. A step of
    the loop is SparseCtrl and the UNet, which reads SparseCtrl's residuals. Decoded frames are copied.
    """
    import torch

    def compiled(function: Any) -> Any:
        return torch.compile(function, mode=mode)

    control, decode = compiled(pipe.controlnet.forward), compiled(pipe.vae.decoder.forward)

    def first_of_step(*arguments: Any, **keywords: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return control(*arguments, **keywords)

    def decode_step(*arguments: Any, **keywords: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return decode(*arguments, **keywords).clone()

    pipe.unet.forward = compiled(pipe.unet.forward)
    pipe.controlnet.forward, pipe.vae.decoder.forward = first_of_step, decode_step


def warm_up(ask: Ask, fresh: Iterator[Keyframes]) -> Keyframes:
    """Makes both kinds of requests twice, so that each is captured and then replayed. Returns the last keyframes."""
    for _ in range(2):
        current = next(fresh)
        for seed in range(2):
            ask(seed, current)
    return current


def sample(
    requests: int, ask: Ask, current: Keyframes, fresh: Iterator[Keyframes], deadline: float
) -> dict[str, dict[str, list[float]]]:
    """Takes the samples: seconds of each request and of its stages, by kind of request.

    Args:
        requests: samples with a second seed; half as many have new keyframes.
        ask: makes a clip.
        current: the keyframes of the last request.
        fresh: new keyframes.
        deadline: time of `time.perf_counter` after which at most `LEAST` samples of a kind are taken.
    """
    samples: dict[str, dict[str, list[float]]] = {}
    for kind, wanted in (("second_seed", requests), ("new_keyframes", requests // 2)):
        taken: dict[str, list[float]] = {"wall": []}
        samples[kind] = taken
        for seed in range(100, 100 + max(LEAST, wanted)):
            if len(taken["wall"]) >= LEAST and time.perf_counter() > deadline:
                break
            keyframes = current if kind == "second_seed" else next(fresh)
            begin = time.perf_counter()
            timings = ask(seed, keyframes)
            for stage, seconds in {"wall": time.perf_counter() - begin, **timings}.items():
                taken.setdefault(stage, []).append(seconds)
    return samples


@contextmanager
def last_warning() -> Iterator["LastWarning"]:
    """Gives the package's last warning within the block, which has the reason if no CUDA graph was captured."""
    handler, logger = LastWarning(logging.WARNING), logging.getLogger("sparsectrl_lcm")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


class LastWarning(logging.Handler):
    """Keeps the last message in `text`, except those about the request."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != request_log.name:
            self.text = record.getMessage()
