"""Models with random weights that the benchmarks share: a bundle, and diffusers' pipeline on the same checkpoints."""

import json
import re
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime.format.manifest import MAX_SIDE
from sparsectrl_lcm.runtime.machine import peak_bytes

MULTIPLE = 64
ARCHITECTURES = ("full", "small")
"""Stable Diffusion 1.5, AnimateDiff v3 and SparseCtrl, and one of the same structure in a few megabytes."""


def clip_size(text: str) -> str:
    """`512x512`, as an option's type.

    Raises:
        ArgumentTypeError: it is not two multiples of 64, which the architectures ask for.
    """
    parts = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if parts is None or any(int(side) not in range(MULTIPLE, MAX_SIDE + 1, MULTIPLE) for side in parts.groups()):
        raise ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in multiples of {MULTIPLE} up to {MAX_SIDE}, as 512x512")
    return text


def prepare(cache: Path, architecture: str = "full") -> dict[str, Any]:
    """Makes checkpoints and bundle in `cache` where there is none; time and memory of the export.

    Ends the program where the cache holds something else.
    """
    exported = cache / "export.json"
    if not (cache / "bundle").exists():
        for job in JOBS:
            subprocess.run([sys.executable, __file__, job, str(cache), architecture], check=True)
    elif not exported.exists():
        sys.exit(f"{cache / 'bundle'} is of another program, or was not finished; remove it, or give another --cache")
    found = dict(json.loads(exported.read_text()))
    if found.setdefault("architecture", architecture) != architecture:  # an earlier release does not say
        sys.exit(f"{cache} holds the {found['architecture']} architecture; give another --cache")
    return found


def write_models(cache: Path, architecture: str) -> None:
    """Writes random checkpoints where they are missing."""
    from sparsectrl_lcm.benchmarks.random_checkpoints import (
        FULL_SIZE,
        Architecture,
        write_checkpoints,
        write_tiny_decoder,
    )

    checkpoints = cache / "checkpoints"
    sizes = FULL_SIZE if architecture == "full" else Architecture()
    if not (checkpoints / "done").exists():
        print(f"writing random checkpoints of {architecture} size", file=sys.stderr)
        write_checkpoints(checkpoints, sizes)
        (checkpoints / "done").touch()
    if not (checkpoints / "tiny_decoder").exists():  # of an earlier release
        write_tiny_decoder(checkpoints / "tiny_decoder", sizes, 40)


def export(cache: Path, architecture: str) -> None:
    """Exports the bundle, with the temporal norm of diffusers so that the frames can be compared, and its engines."""
    from sparsectrl_lcm.engine.onnxruntime import build
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
    build(cache / "bundle")
    (cache / "export.json").write_text(json.dumps(result, indent=2))


def peak_gb() -> float:
    """The largest resident memory of this process so far."""
    return (peak_bytes() or 0) / 1e9


def diffusers_pipeline(checkpoints: Path, dtype: Any = None) -> Any:
    """AnimateDiff with SparseCtrl and LCM of diffusers, as it documents them; `dtype` is torch's, by default fp32."""
    from diffusers import (
        AnimateDiffSparseControlNetPipeline,
        AutoencoderKL,
        DDIMScheduler,
        LCMScheduler,
        MotionAdapter,
        SparseControlNetModel,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    base = checkpoints / "base"
    given = {} if dtype is None else {"torch_dtype": dtype}
    pipe = AnimateDiffSparseControlNetPipeline(
        vae=AutoencoderKL.from_pretrained(base / "vae", **given),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder", **given),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(base / "unet", **given),
        motion_adapter=MotionAdapter.from_pretrained(checkpoints / "motion_adapter", **given),
        controlnet=SparseControlNetModel.from_pretrained(checkpoints / "scribble", **given),
        scheduler=LCMScheduler.from_config(DDIMScheduler.load_config(base / "scheduler"), beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch_stages(pipe: Any, synchronize: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
    """From here on the seconds of a request's stages are added to the last entry of what this returns.

    Models are watched where they are called, which torch.compile does not trace.
    """
    requests: list[dict[str, float]] = []

    def timed(stage: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            synchronize()
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            synchronize()
            requests[-1][stage] = requests[-1].get(stage, 0.0) + time.perf_counter() - begin
            return result

        return call

    pipe.encode_prompt = timed("text", pipe.encode_prompt)
    pipe.prepare_image = timed("keyframes", pipe.prepare_image)
    for stage, model in (("control", pipe.controlnet), ("denoise", pipe.unet)):
        model._compiled_call_impl = timed(stage, model._compiled_call_impl or model._call_impl)
    pipe.decode_latents = timed("decode", pipe.decode_latents)
    return requests


JOBS = {"write": write_models, "export": export}
"""Each in a process of its own, so that the peak memory is the export's alone."""

if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
