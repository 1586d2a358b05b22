"""The contenders of compare.py: diffusers, and this project's backends for the CPU."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_worker import COMMAND
from sparsectrl_lcm.benchmarks.harness.measured_requests import RequestSize
from sparsectrl_lcm.benchmarks.harness.rounds import Contender
from sparsectrl_lcm.runtime.format.decoders import DECODERS
from sparsectrl_lcm.runtime.format.engine_sets import set_name, set_names

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Names of torch dtypes by precision."""
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
GRAPHS = {"text": "text_encoder", "control": "controlnet_scribble", "denoise": "unet", "decode": "vae_decoder"}
"""The graph that runs in each stage."""


@dataclass(frozen=True, slots=True)
class Diffusers:
    """diffusers in one precision.

    Attributes:
        memory_gb: memory of the process at 256x256 and 16 frames.
        compiled: whether UNet, SparseCtrl and decoder go through torch.compile.
        vae_slicing: decode frame by frame, which takes less memory; otherwise all frames at once.
        probes: whether its process also measures the limits of the machine, once per round.
    """

    precision: str
    memory_gb: float
    compiled: bool = False
    vae_slicing: bool = False
    decoder: str = "full"
    probes: bool = False


@dataclass(frozen=True, slots=True)
class Ours:
    """A backend of this project in one precision.

    Attributes:
        memory_gb: memory of the process at 256x256 and 16 frames.
        build: options of `sparsectrl-lcm build`.
    """

    backend: str
    precision: str
    memory_gb: float
    decoder: str = "full"
    build: tuple[str, ...] = ()


BASELINE = "diffusers-fp32"
"""The contender that ratios and differences of frames refer to."""
DIFFUSERS = {
    BASELINE: Diffusers("fp32", 13.4),
    "diffusers-fp32-compiled": Diffusers("fp32", 14.5, compiled=True),
    "diffusers-fp32-sliced": Diffusers("fp32", 13.4, vae_slicing=True),
    "diffusers-bf16": Diffusers("bf16", 7.5, probes=True),
    "diffusers-bf16-compiled": Diffusers("bf16", 9.0, compiled=True),
    "diffusers-bf16-sliced": Diffusers("bf16", 7.5, vae_slicing=True),
    "diffusers-bf16-tiny": Diffusers("bf16", 7.5, decoder="tiny"),
    "diffusers-bf16-tiny-compiled": Diffusers("bf16", 9.0, compiled=True, decoder="tiny"),
}
OURS = {
    "onnxruntime-fp32": Ours("onnxruntime", "fp32", 10.4),
    "openvino-fp32": Ours("openvino", "fp32", 13.0, build=("--precision", "fp32")),
    "openvino-bf16": Ours("openvino", "bf16", 8.0, build=("--precision", "bf16")),
    "openvino-int8-tiny": Ours("openvino", "int8", 6.0, "tiny", build=("--precision", "int8")),
}
RECORDS: dict[str, Diffusers | Ours] = {**DIFFUSERS, **OURS}
NAMES = tuple(RECORDS)


def contenders(names: Iterable[str], cache: Path, size: RequestSize, threads: int) -> list[Contender]:
    """The contenders of these names, in the order of `NAMES`."""
    wanted = set(names)
    return [contender(name, cache, size, threads) for name in NAMES if name in wanted]


def contender(name: str, cache: Path, size: RequestSize, threads: int) -> Contender:
    """One contender.

    Args:
        name: one of `NAMES`.
        cache: the folder with the checkpoints and the bundle of models.py.
        size: size of its requests.
        threads: threads that it computes with.
    """
    record = RECORDS[name]
    memory_gb = expected_gb(record.memory_gb, size)
    if isinstance(record, Ours):
        load: dict[str, Any] = {"backend": record.backend, "precision": record.precision, "threads": threads}
        load["bundle"] = str(cache / "bundle")
        return Contender(name, load, memory_gb, request={"decoder": record.decoder})
    load = {"dtype": DTYPES[record.precision], "threads": threads, "decoder": record.decoder}
    load["checkpoints"] = str(cache / "checkpoints")
    return Contender(
        name,
        load,
        memory_gb,
        request={"compiled": record.compiled, "vae_slicing": record.vae_slicing},
        command=COMMAND,
        process=f"diffusers-{record.precision}-{record.decoder}",
        kinds=("first",),
        probe="limits" if record.probes else "",
    )


def expected_gb(memory_gb: float, size: RequestSize) -> float:
    """GB of a process at a size, from its GB at 256x256 and 16 frames. A quarter of them grows with the pixels."""
    return memory_gb * (0.75 + 0.25 * size.width * size.height * size.frames / (256 * 256 * 16))


def graphs_of(name: str) -> dict[str, str]:
    """The graph of each stage; for diffusers the graph with the same work."""
    return GRAPHS | {"decode": DECODERS[RECORDS[name].decoder]}


def element_bytes(name: str) -> int:
    """Bytes per number in the precision of a contender."""
    return ELEMENT_BYTES[RECORDS[name].precision]


def build_engines(names: Iterable[str], bundle: Path) -> None:
    """Builds the missing engines of this project's contenders. If a build fails, the contender fails to load."""
    for name in names:
        ours = OURS.get(name)
        if ours is None or set_name(ours.precision) in set_names(bundle, ours.backend):
            continue
        print(f"building engines of {name}", file=sys.stderr)
        command = ["build", str(bundle), "--backend", ours.backend, *ours.build]
        code = f"from sparsectrl_lcm.cli import main; main({command!r})"
        subprocess.run([sys.executable, "-c", code], check=False)
