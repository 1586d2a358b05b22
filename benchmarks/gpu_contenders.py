"""What one process of gpu.py does: measures a contender, or builds its engines. A row for each result."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from flops import matmul_peak
from models import diffusers_pipeline, watch_stages
from sparsectrl_lcm.benchmarks.harness.requests import PROMPT, scribble
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError, first_line
from sparsectrl_lcm.runtime.format.engine_keys import ANY_DEVICE, ClipSize, graph_checksums
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_name
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.gpu.engine_scope import device_scope, version_scope

CONTENDERS = {"diffusers-eager": 2, "tensorrt": 6, "diffusers-compile": 3, "tensorrt-rtx": 2, "onnxruntime-cuda": 2}
"""In the order in which they run, with their shares of the time."""
BASELINE = "diffusers-eager"
MODES = ("CUDA graph", "plain")
KINDS = ("new_keyframes", "second_seed")
STAGES = ("text", "control", "denoise", "decode")
LEAST = 3
"""Samples that are taken even where time runs out."""
OUT_OF_TIME = "ran out of time"
SAMPLING = 0.85
"""Share of a contender's time after which it takes no more of them."""

Row = dict[str, Any]
Ask = Callable[[int, list[np.ndarray]], dict[str, float]]
"""Makes a clip with a seed and scribbles; gives the seconds of its stages."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does."""

    role: str
    contender: str
    bundle: str
    checkpoints: str | None
    width: int
    height: int
    frames: int
    steps: int
    requests: int
    seconds: float = 0.0
    output: str = ""

    @property
    def size(self) -> ClipSize:
        return ClipSize(width=self.width, height=self.height, frames=self.frames)

    @property
    def keyframes(self) -> list[int]:
        return sorted({0, self.frames // 2, self.frames - 1})

    def scribbles(self) -> Iterator[list[np.ndarray]]:
        """Sets of scribbles, each another one."""
        first = [scribble(place / self.frames, self.width, self.height) for place in self.keyframes]
        for shift in count():
            yield [np.roll(picture, (shift, shift // self.height), axis=(0, 1)) for picture in first]


def measure_pipeline(job: Job) -> Iterator[Row]:
    """This engine on one of its backends, with CUDA graphs and without."""
    from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

    start = time.perf_counter()
    pipeline = VideoPipeline.load(job.bundle, job.contender)
    load = time.perf_counter() - start
    complaints = Complaints()

    def ask(seed: int, scribbles: list[np.ndarray]) -> dict[str, float]:
        pictures = [Keyframe(place, scribble) for place, scribble in zip(job.keyframes, scribbles, strict=True)]
        size = {"width": job.width, "height": job.height, "num_frames": job.frames}
        return pipeline.generate(PROMPT, pictures, seed=seed, num_inference_steps=job.steps, **size).timings

    fresh = job.scribbles()
    begin = time.perf_counter()
    load += ask(0, next(fresh))["load"]
    row = {"load_s": load, "first_s": time.perf_counter() - begin}
    wanted = modes(job.contender)
    for number, mode in enumerate(wanted, start=1):
        if mode == "plain":
            for workspace in pipeline.executor._workspaces.values():
                workspace.forgo_graphs()
        current = warm_up(ask, fresh)
        if mode == "CUDA graph" and complaints.last:
            yield {"mode": mode, "reason": complaints.last}
        else:
            deadline = start + SAMPLING * job.seconds * number / len(wanted)
            samples = sample(job.requests, ask, current, fresh, deadline)
            yield {"mode": mode, **row, "samples": samples}


def measure_diffusers(job: Job, device: str = "cuda", dtype: str = "float16") -> Iterator[Row]:
    """diffusers on the same checkpoints, as documented for AnimateDiff with SparseCtrl and LCM."""
    if job.checkpoints is None:
        raise SparseCtrlLcmError("checkpoints", "is missing: diffusers cannot read a bundle")
    import torch
    from PIL import Image

    if device == "cuda" and not torch.cuda.is_available():
        raise SparseCtrlLcmError("", "torch has no CUDA here", "install a build of torch for CUDA")
    start = time.perf_counter()
    pipe = diffusers_pipeline(Path(job.checkpoints)).to(device, getattr(torch, dtype))
    if job.contender == "diffusers-compile":
        for module in (pipe.unet, pipe.controlnet, pipe.vae.decoder):
            module.forward = torch.compile(module.forward)
    load = time.perf_counter() - start

    def ask(seed: int, scribbles: list[np.ndarray]) -> dict[str, float]:
        pipe(
            PROMPT,
            negative_prompt="",
            num_inference_steps=job.steps,
            guidance_scale=1.0,
            conditioning_frames=[Image.fromarray(scribble) for scribble in scribbles],
            controlnet_frame_indices=job.keyframes,
            num_frames=job.frames,
            width=job.width,
            height=job.height,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        )
        return {}

    fresh = job.scribbles()
    begin = time.perf_counter()
    ask(0, next(fresh))
    row: Row = {"mode": None, "load_s": load, "first_s": time.perf_counter() - begin}
    current = warm_up(ask, fresh)
    samples = sample(job.requests, ask, current, fresh, start + SAMPLING * job.seconds)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    stages = watch_stages(pipe, synchronize)
    for seed in range(LEAST):  # apart from the others, since taking a stage's time holds the device up
        stages.append({})
        ask(seed, current)
    for samples_of_kind in samples.values():
        samples_of_kind |= {stage: [timings[stage] for timings in stages] for stage in stages[0]}
    yield row | {"samples": samples}


def modes(contender: str) -> tuple[str | None, ...]:
    """The rows of a contender."""
    return MODES if contender in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda") else (None,)


def warm_up(ask: Ask, fresh: Iterator[list[np.ndarray]]) -> list[np.ndarray]:
    """Both kinds of requests twice: what is to be captured is then replayed. Returns the scribbles of the last."""
    for _ in range(2):
        current = next(fresh)
        for seed in range(2):
            ask(seed, current)
    return current


def sample(
    requests: int, ask: Ask, current: list[np.ndarray], fresh: Iterator[list[np.ndarray]], deadline: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each request, and of its stages, by kind of request."""
    samples: dict[str, dict[str, list[float]]] = {}
    for kind, wanted in (("second_seed", requests), ("new_keyframes", requests // 2)):
        samples[kind] = taken = {"wall": []}
        for seed in range(100, 100 + max(LEAST, wanted)):
            if len(taken["wall"]) >= LEAST and time.perf_counter() > deadline:
                break
            scribbles = current if kind == "second_seed" else next(fresh)
            begin = time.perf_counter()
            timings = ask(seed, scribbles)
            for stage, seconds in {"wall": time.perf_counter() - begin, **timings}.items():
                taken.setdefault(stage, []).append(seconds)
    return samples


class Complaints(logging.Handler):
    """The last warning of the package: it says why no graph was captured."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        logging.getLogger("sparsectrl_lcm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def build_engines(job: Job) -> Iterator[Row]:
    """Engines where there are none that may be loaded here; how long that took, now or then."""
    bundle = Path(job.bundle)
    begin = time.perf_counter()
    seconds = None
    if not engines_fit(job):
        if job.contender == "onnxruntime-cuda":
            from sparsectrl_lcm.engine.onnxruntime_cuda import build

            build(bundle, check=False)
        else:
            from sparsectrl_lcm.engine.tensorrt.builder import build as build_tensorrt
            from sparsectrl_lcm.engine.tensorrt.options import TensorRtOptions

            build_tensorrt(bundle, job.contender, job.size, TensorRtOptions(), check=False)
        seconds = time.perf_counter() - begin
    found = find_set(bundle, job.contender, engine_set(job))
    engines = found.index.engines if found else {}
    reported = sum(record.report.get("seconds", 0.0) for record in engines.values())
    yield {
        "build_s": seconds or reported or None,
        "built_now": seconds is not None,
        "engines": {graph: {"flags": record.spec.flags, **record.report} for graph, record in engines.items()},
    }


def engine_set(job: Job) -> str:
    return set_name("fp16", None if job.contender == "onnxruntime-cuda" else job.size)


def engines_fit(job: Job) -> bool:
    """Whether the engines are there, of this bundle, version and device; raises where the backend cannot run here."""
    from sparsectrl_lcm.runtime.backends import availability

    backend = availability(job.contender)
    if backend.reason is not None or backend.version is None:
        raise SparseCtrlLcmError(backend.reason or "it has no version")
    manifest, device = read_manifest(Path(job.bundle)), probe()
    if (found := find_set(Path(job.bundle), job.contender, engine_set(job))) is None:
        return False
    for graph, record in found.index.engines.items():
        spec, flags = record.spec, record.spec.flags
        bound = ANY_DEVICE if job.contender == "onnxruntime-cuda" else device_scope(job.contender, device, flags)
        wanted = (version_scope(backend.version, flags), bound, graph_checksums(manifest, graph))
        if (spec.version, spec.device, spec.graph_sha256) != wanted:
            return False
    return found.index.engines.keys() == manifest.graphs.keys()


def work(job: Job) -> None:
    """One process: a line of JSON for each result, the last with the reason where it cannot go on."""
    measure = measure_diffusers if job.contender.startswith("diffusers") else measure_pipeline
    role = {"measure": measure, "build": build_engines, "peak": lambda _: [matmul_peak()]}[job.role]
    with Path(job.output).open("a", encoding="utf-8", buffering=1) as file:
        try:
            for row in role(job):
                file.write(json.dumps(row) + "\n")
        except ImportError as error:
            reason = f"{first_line(error)}; run: pip install '.[bench]'"
            file.write(json.dumps({"reason": reason}) + "\n")
        except Exception as error:  # a row says it, whatever it is
            known = isinstance(error, SparseCtrlLcmError)
            reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
            file.write(json.dumps({"reason": reason}) + "\n")
