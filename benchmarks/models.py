"""The models for benchmarks: checkpoints with random weights, and the bundle exported from them."""

import json
import re
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime.format.manifest import MAX_SIDE
from sparsectrl_lcm.runtime.machine import peak_bytes

MULTIPLE = 8
ARCHITECTURES = ("full", "small")
"""full: Stable Diffusion 1.5, AnimateDiff v3 and SparseCtrl. small: the same structure in a few megabytes."""


def clip_size(text: str) -> str:
    """The argparse type of a size such as `512x512`.

    Raises:
        ArgumentTypeError: the text is not two multiples of 8, the pixels of a latent.
    """
    parts = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if parts is None or any(int(side) not in range(MULTIPLE, MAX_SIDE + 1, MULTIPLE) for side in parts.groups()):
        raise ArgumentTypeError(
            f"{text!r} is not WIDTHxHEIGHT in multiples of {MULTIPLE} up to {MAX_SIDE}, for example 512x512"
        )
    return text


def prepare(cache: Path, architecture: str = "full") -> dict[str, Any]:
    """Makes checkpoints and bundle in `cache` if they are missing. Returns time, memory and errors of the export.

    Ends the program if the cache holds something else.
    """
    exported = cache / "export.json"
    if not (cache / "bundle").exists():
        for job in JOBS:
            subprocess.run([sys.executable, __file__, job, str(cache), architecture], check=True)
    elif not exported.exists():
        sys.exit(
            f"{cache / 'bundle'} was not finished, or another program made it; remove it or choose another --cache"
        )
    found = dict(json.loads(exported.read_text()))
    if found.setdefault("architecture", architecture) != architecture:  # earlier releases did not write it
        sys.exit(f"{cache} holds the {found['architecture']} architecture; choose another --cache")
    return found


def write_models(cache: Path, architecture: str) -> None:
    """Writes random checkpoints if they are missing."""
    from sparsectrl_lcm.benchmarks.random_checkpoints import (
        FULL_SIZE,
        Architecture,
        write_checkpoints,
        write_tiny_decoder,
    )

    checkpoints = cache / "checkpoints"
    sizes = FULL_SIZE if architecture == "full" else Architecture()
    if not (checkpoints / "done").exists():
        print(f"writing random checkpoints of the {architecture} architecture", file=sys.stderr)
        write_checkpoints(checkpoints, sizes)
        (checkpoints / "done").touch()
    if not (checkpoints / "tiny_decoder").exists():  # earlier releases wrote none
        write_tiny_decoder(checkpoints / "tiny_decoder", sizes, 40)


def export(cache: Path, architecture: str) -> None:
    """Exports the bundle and builds its ONNX Runtime engines.

    The temporal norm is that of diffusers, so that frames can be compared.
    """
    from sparsectrl_lcm.engine.build import build
    from sparsectrl_lcm.export.exporter import export_bundle
    from sparsectrl_lcm.export.plan import ExportOptions

    root = cache / "checkpoints"
    options = ExportOptions(
        base=str(root / "base"),
        motion_adapter=str(root / "motion_adapter"),
        controlnets={"scribble": str(root / "scribble"), "rgb": str(root / "rgb")},
        tiny_decoder=str(root / "tiny_decoder"),
        temporal_norm="clip",
    )
    start = time.perf_counter()

    def on_graph(name: str, index: int, count: int) -> None:
        what = f"exporting {name} ({index + 1}/{count})" if index < count else "exported"
        print(f"{what}, peak {peak_gb():.2f} GB so far", file=sys.stderr)

    manifest = export_bundle(options, cache / "bundle", on_graph)
    weights = {
        name: sum(manifest.files[file].bytes for file in graph.weights) / 1e9 for name, graph in manifest.graphs.items()
    }
    result = {
        "architecture": architecture,
        "seconds": time.perf_counter() - start,
        "peak_gb": peak_gb(),
        "largest_graph_gb": max(weights.values()),
        "errors": {name: graph.max_error for name, graph in manifest.graphs.items()},
    }
    build(cache / "bundle", "onnxruntime")
    (cache / "export.json").write_text(json.dumps(result, indent=2))


def peak_gb() -> float:
    """The largest resident memory of this process so far, in GB."""
    return (peak_bytes() or 0) / 1e9


JOBS = {"write": write_models, "export": export}
"""Each job runs in a separate process, so that the peak memory is that of the export alone."""

if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
