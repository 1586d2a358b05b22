"""The contenders of compare.py: diffusers, and this project's backends for the CPU."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffusers_worker import COMMAND
from sparsectrl_lcm.benchmarks.harness.requests import RequestSize
from sparsectrl_lcm.benchmarks.harness.rounds import Contender
from sparsectrl_lcm.runtime.format.engine_sets import set_name, set_names
from sparsectrl_lcm.runtime.format.manifest import DECODERS

BASELINE = "diffusers-fp32"
DIFFUSERS = {
    BASELINE: (BASELINE, {"dtype": "float32"}, {}, 13.4),
    "diffusers-fp32-compiled": (BASELINE, {"dtype": "float32"}, {"compiled": True}, 14.5),
    "diffusers-bf16": ("diffusers-bf16", {"dtype": "bfloat16"}, {}, 7.5),
    "diffusers-bf16-compiled": ("diffusers-bf16", {"dtype": "bfloat16"}, {"compiled": True}, 9.0),
}
"""Process, how it is loaded, what is added to its requests, and GB at 256x256 and 16 frames."""


@dataclass(frozen=True, slots=True)
class Ours:
    """A backend of this project in one precision; `memory_gb` at 256x256 and 16 frames."""

    backend: str
    precision: str
    memory_gb: float
    decoder: str = "full"


OURS = {
    "onnxruntime-fp32": Ours("onnxruntime", "fp32", 10.4),
    "openvino-fp32": Ours("openvino", "fp32", 13.0),
    "openvino-bf16": Ours("openvino", "bf16", 8.0),
    "openvino-int8-tiny": Ours("openvino", "int8", 6.0, "tiny"),
}
NAMES = (*DIFFUSERS, *OURS)
GRAPHS = {"text": "text_encoder", "control": "controlnet_scribble", "denoise": "unet", "decode": "vae_decoder"}
"""The graph that takes the time of each stage."""


def contenders(names: Iterable[str], cache: Path, size: RequestSize, threads: int) -> list[Contender]:
    """The contenders of these names, in the order of `NAMES`."""
    wanted = set(names)
    return [contender(name, cache, size, threads) for name in NAMES if name in wanted]


def contender(name: str, cache: Path, size: RequestSize, threads: int) -> Contender:
    """One contender, loaded from the checkpoints or the bundle in `cache`."""
    if name in OURS:
        ours = OURS[name]
        return Contender(
            name=name,
            load={
                "bundle": str(cache / "bundle"),
                "backend": ours.backend,
                "precision": ours.precision,
                "threads": threads,
            },
            memory_gb=expected_gb(ours.memory_gb, size),
            request={"decoder": ours.decoder},
        )
    process, load, request, memory_gb = DIFFUSERS[name]
    return Contender(
        name=name,
        load={"checkpoints": str(cache / "checkpoints"), "threads": threads, **load},
        memory_gb=expected_gb(memory_gb, size),
        request=request,
        command=COMMAND,
        process=process,
        kinds=("first",),
        probe="limits" if name == "diffusers-bf16" else "",
    )


def expected_gb(memory_gb: float, size: RequestSize) -> float:
    """What a process takes at another size than 256x256x16: three quarters do not change with it."""
    return memory_gb * (0.75 + 0.25 * size.width * size.height * size.frames / (256 * 256 * 16))


def graphs_of(name: str) -> dict[str, str]:
    """The graph of each stage; for diffusers those that do the same."""
    return GRAPHS | {"decode": DECODERS[OURS[name].decoder if name in OURS else "full"]}


def element_bytes(name: str) -> int:
    """Bytes of a number in the precision of a contender."""
    return next(count for precision, count in (("fp32", 4), ("bf16", 2), ("int8", 1)) if precision in name)


def build_engines(names: Iterable[str], bundle: Path) -> None:
    """Builds the engines of this project's contenders where there are none; what fails is told when they load."""
    for name in names:
        ours = OURS.get(name)
        if ours is None or set_name(ours.precision) in set_names(bundle, ours.backend):
            continue
        command = ["build", str(bundle), "--backend", ours.backend]
        if ours.backend == "openvino":
            command += ["--precision", ours.precision]
        print(f"building engines of {name}", file=sys.stderr)
        code = f"from sparsectrl_lcm.cli import main; main({command!r})"
        subprocess.run([sys.executable, "-c", code], check=False)
