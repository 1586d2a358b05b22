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
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.engine_sets import EngineSet

PRECISION = "fp16"
"""The precision of all contenders."""
CUDA_GRAPH, PLAIN = "CUDA graph", "plain"

Row = dict[str, Any]
Keyframes = dict[int, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Diffusers:
    """diffusers on the GPU.

    Attributes:
        share: share of the time limit, relative to the other contenders.
        compile_mode: mode of torch.compile; None runs eagerly. reduce-overhead replays CUDA graphs, as TensorRT does.
    """

    share: int
    compile_mode: str | None = None
    modes: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class ProjectBackend:
    """A backend of this project; the contender has its name.

    Attributes:
        share: share of the time limit, relative to the other contenders.
        modes: modes to measure, each in its own row of the table.
        builds: whether it needs engines.
        per_size: whether its engines are built for one size.
    """

    share: int
    modes: tuple[str | None, ...] = (CUDA_GRAPH, PLAIN)
    builds: bool = True
    per_size: bool = True


CONTENDERS: dict[str, Diffusers | ProjectBackend] = {
    "diffusers-eager": Diffusers(2),
    "tensorrt": ProjectBackend(6),
    "diffusers-compile": Diffusers(3, "default"),
    "diffusers-compile-reduce-overhead": Diffusers(3, "reduce-overhead"),
    "tensorrt-rtx": ProjectBackend(2),
    "onnxruntime-cuda": ProjectBackend(2, per_size=False),
}
"""All contenders, in the order in which they run."""
BASELINE = "diffusers-eager"
DRY_RUN: dict[str, Diffusers | ProjectBackend] = {"onnxruntime": ProjectBackend(1, modes=(None,), builds=False)}
"""The contender of a dry run, which runs the whole flow on a CPU."""
RECORDS = CONTENDERS | DRY_RUN


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one process.

    Attributes:
        role: measure, build or peak.
        contender: one of `RECORDS`.
        checkpoints: checkpoints for diffusers; None if there are none.
        requests: samples with a second seed; half as many have new keyframes.
        seconds: longest time of the process.
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
        """The clip size of the engines."""
        return ClipSize(width=self.width, height=self.height, frames=self.frames)

    @property
    def request(self) -> RequestSize:
        """The size of the requests."""
        return RequestSize(self.width, self.height, self.frames, self.steps)

    @property
    def build_options(self) -> BuildOptions:
        """The options of the engine build."""
        record = RECORDS[self.contender]
        if isinstance(record, ProjectBackend) and record.per_size:
            return BuildOptions(self.width, self.height, self.frames, PRECISION, check=False)
        return BuildOptions(precision=PRECISION, check=False)

    def keyframes(self) -> Iterator[Keyframes]:
        """An endless series of scribbles, no two sets alike."""
        first = scribbles(self.width, self.height, self.frames)
        for shift in count():
            by = (shift, shift // self.height)
            yield {index: np.roll(picture, by, axis=(0, 1)) for index, picture in first.items()}


def rows_of(job: Job, built: Row, rows: list[Row]) -> list[Row]:
    """One row for each mode of a contender, with samples or the reason for their absence."""
    failed = {"reason": next((row["reason"] for row in rows if "mode" not in row), "gave no result")}
    by_mode: dict[str | None, Row] = {}
    for row in rows:  # a mode may have several, each with more than the one before
        if "mode" in row:
            before = by_mode.get(row["mode"], {})
            peaks = [peak for peak in (before.get("peak_bytes"), row.get("peak_bytes")) if peak is not None]
            by_mode[row["mode"]] = before | row | {"peak_bytes": max(peaks, default=None)}
    return [
        {"contender": job.contender, "mode": mode, **built, **row}
        | ({} if row.keys() & {"samples", "reason"} else failed)
        for mode in RECORDS[job.contender].modes
        for row in [by_mode.get(mode, {})]
    ]


def build_engines(job: Job) -> Iterator[Row]:
    """Builds the engines of a backend if none fit. The row has the build time, of this or an earlier build."""
    from sparsectrl_lcm.engine.build import build

    begin = time.perf_counter()
    seconds = None
    if (engines := fitting_engines(job)) is None:
        engines = build(Path(job.bundle), job.contender, job.build_options)
        seconds = time.perf_counter() - begin
    records = engines.index.engines
    reported = sum(record.report.get("seconds", 0.0) for record in records.values())
    yield {
        "build_s": seconds or reported or None,
        "built_now": seconds is not None,
        "engines": {graph: {"flags": record.spec.flags, **record.report} for graph, record in records.items()},
    }


def fitting_engines(job: Job) -> EngineSet | None:
    """The engines that the contender would load; None if there are none for this bundle, version and device.

    Raises:
        SparseCtrlLcmError: the backend cannot run here.
    """
    from sparsectrl_lcm.runtime.backends import BACKENDS, availability

    found = availability(job.contender)
    if found.reason is not None or found.version is None:
        raise SparseCtrlLcmError("", found.reason or "its version is unknown")
    bundle = Bundle.load(job.bundle)
    sets = BACKENDS[job.contender].loadable_sets(bundle.folder, found.version, PRECISION, job.clip)
    for engines in sets:
        graphs = bundle.manifest.graphs.keys()
        if engines.index.engines.keys() == graphs and not any(engines.fault(bundle.manifest, name) for name in graphs):
            return engines
    return None
