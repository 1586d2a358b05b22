"""The contenders of gpu.py: diffusers, and this project's GPU backends with their engines."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparsectrl_lcm.benchmarks.harness.measured_requests import RequestSize, scribbles
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.engine_sets import (
    ANY_DEVICE,
    ClipSize,
    device_scope,
    find_set,
    graph_checksums,
    set_name,
    version_scope,
)
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.gpu.engine_scope import device_scope, version_scope

PRECISION = "fp16"
"""Of all contenders."""
CUDA_GRAPH, PLAIN = "CUDA graph", "plain"

Row = dict[str, Any]
Keyframes = dict[int, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Diffusers:
    """diffusers on the GPU.

    Attributes:
        share: of the time limit, relative to the other contenders.
        compile_mode: of torch.compile; None runs eagerly. reduce-overhead replays CUDA graphs, as TensorRT does here.
    """

    share: int
    compile_mode: str | None = None
    modes: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend of this project, by whose name the contender goes.

    Attributes:
        share: of the time limit, relative to the other contenders.
        modes: one row of the table for each.
        builds: whether it needs engines.
        per_size: whether its engines are built for one size.
    """

    share: int
    modes: tuple[str | None, ...] = (CUDA_GRAPH, PLAIN)
    builds: bool = True
    per_size: bool = True


CONTENDERS: dict[str, Diffusers | Backend] = {
    "diffusers-eager": Diffusers(2),
    "tensorrt": Backend(6),
    "diffusers-compile": Diffusers(3, "default"),
    "diffusers-compile-reduce-overhead": Diffusers(3, "reduce-overhead"),
    "tensorrt-rtx": Backend(2),
    "onnxruntime-cuda": Backend(2, per_size=False),
}
"""In the order in which they run."""
BASELINE = "diffusers-eager"
DRY_RUN: dict[str, Diffusers | Backend] = {"onnxruntime": Backend(1, modes=(None,), builds=False)}
"""Runs the whole flow on a CPU."""
RECORDS = CONTENDERS | DRY_RUN


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one process.

    Attributes:
        role: measure, build or peak.
        contender: one of `RECORDS`.
        checkpoints: for diffusers; None if there are none.
        requests: samples with a second seed; with new keyframes half as many.
        seconds: that the process may take.
        output: the file for its rows.
    """

    role: str
    contender: str
    bundle: str
    checkpoints: str | None
    width: int
    height: int
    frames: int
    steps: int
    requests: int
    vae_slicing: bool = False
    seconds: float = 0.0
    output: str = ""

    @property
    def clip(self) -> ClipSize:
        """The size that engines are built for."""
        return ClipSize(width=self.width, height=self.height, frames=self.frames)

    @property
    def request(self) -> RequestSize:
        """The size of the requests."""
        return RequestSize(self.width, self.height, self.frames, self.steps)

    def keyframes(self) -> Iterator[Keyframes]:
        """Sets of scribbles without end, no two alike."""
        first = scribbles(self.width, self.height, self.frames)
        for shift in count():
            by = (shift, shift // self.height)
            yield {index: np.roll(picture, by, axis=(0, 1)) for index, picture in first.items()}


def build_engines(job: Job) -> Iterator[Row]:
    """Builds the engines of a backend if none fit; the row says how long that took, now or earlier."""
    bundle = Path(job.bundle)
    begin = time.perf_counter()
    seconds = None
    if not engines_fit(job):
        if _record(job).per_size:
            from sparsectrl_lcm.engine.tensorrt.builder import build as build_tensorrt
            from sparsectrl_lcm.engine.tensorrt.options import TensorRtOptions

            build_tensorrt(bundle, job.contender, job.clip, TensorRtOptions(), check=False)
        else:
            from sparsectrl_lcm.engine.onnxruntime_cuda import build

            build(bundle, check=False)
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
    """The name of the engine set that the contender loads."""
    return set_name(PRECISION, job.clip if _record(job).per_size else None)


def engines_fit(job: Job) -> bool:
    """Whether there are engines for this bundle, version and device.

    Raises:
        SparseCtrlLcmError: the backend cannot run here.
    """
    from sparsectrl_lcm.runtime.backends import availability

    backend = availability(job.contender)
    if backend.reason is not None or backend.version is None:
        raise SparseCtrlLcmError("", backend.reason or "its version is unknown")
    manifest, device = read_manifest(Path(job.bundle)), probe()
    if (found := find_set(Path(job.bundle), job.contender, engine_set(job))) is None:
        return False
    for graph, record in found.index.engines.items():
        spec, flags = record.spec, record.spec.flags
        bound = device_scope(job.contender, device, flags) if _record(job).per_size else ANY_DEVICE
        wanted = (version_scope(backend.version, flags), bound, graph_checksums(manifest, graph))
        if (spec.version, spec.device, spec.graph_sha256) != wanted:
            return False
    return found.index.engines.keys() == manifest.graphs.keys()


def _record(job: Job) -> Backend:
    record = RECORDS[job.contender]
    assert isinstance(record, Backend)
    return record
