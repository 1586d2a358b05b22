"""The real architecture at full size with random weights: this runtime against diffusers, on the same weights and seed.

    python benchmarks/full_size.py --size 256x256 --size 512x512

Exports once to a cache folder (about 20 GB with the checkpoints), then runs each side in a process of its own, so that
peak memory is that side's alone. Prints one table and writes it as JSON into benchmarks/results/.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a photo of a red lighthouse on the sea, day turns to night"
KEYFRAMES = (0, 8, 15)
SEED = 42
SECOND_SEED_LIMIT = 240.0
"""Seconds; a longer first request is not followed by a second one."""
STAGES = ("text", "keyframes", "control", "denoise", "decode", "total")


def keyframe(index: int, width: int, height: int) -> np.ndarray:
    """A scribble: a white ring on black that moves with the index."""
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(x - width * (0.25 + index / 30), y - height / 2)
    ring = np.abs(radius - height / 5) < height / 64
    return np.repeat((ring * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def prepare(cache: Path) -> dict[str, Any]:
    """Checkpoints and bundle in `cache`; returns the export's time and memory where it ran now."""
    from sparsectrl_lcm.export.random_checkpoints import FULL_SIZE, write_checkpoints

    checkpoints, bundle = cache / "checkpoints", cache / "bundle"
    if not (checkpoints / "done").exists():
        print("writing random checkpoints of full size", file=sys.stderr)
        write_checkpoints(checkpoints, FULL_SIZE)
        (checkpoints / "done").touch()
    if not bundle.exists():
        run_side("export", cache, "512x512")
    return dict(json.loads((cache / "export.json").read_text()))


def export(cache: Path) -> dict[str, Any]:
    """Exports the bundle, with the temporal norm of diffusers so that the frames can be compared, and its engines."""
    from sparsectrl_lcm.engine.onnxruntime import build
    from sparsectrl_lcm.export.exporter import export_bundle
    from sparsectrl_lcm.export.plan import ExportOptions

    root = cache / "checkpoints"
    options = ExportOptions(
        base=str(root / "base"),
        motion_adapter=str(root / "motion_adapter"),
        controlnets={"scribble": str(root / "scribble"), "rgb": str(root / "rgb")},
        temporal_norm="clip",
    )
    start = time.perf_counter()
    marks: list[tuple[str, float]] = []

    def on_graph(name: str, index: int, count: int) -> None:
        marks.append((name, time.perf_counter() - start))
        print(f"exporting {name} ({index + 1}/{count}), peak {peak_gb():.2f} GB so far", file=sys.stderr)

    manifest = export_bundle(options, cache / "bundle", on_graph)
    weights = {
        name: sum(manifest.files[file].bytes for file in graph.weights) / 1e9 for name, graph in manifest.graphs.items()
    }
    result = {
        "seconds": time.perf_counter() - start,
        "peak_gb": peak_gb(),
        "largest_graph_gb": max(weights.values()),
        "errors": {name: graph.max_error for name, graph in manifest.graphs.items()},
    }
    build(cache / "bundle")
    (cache / "export.json").write_text(json.dumps(result, indent=2))
    return result


def run_runtime(cache: Path, width: int, height: int) -> tuple[dict[str, float], np.ndarray]:
    """A first request, and one with another seed after it where the first did not take too long."""
    from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

    start = time.perf_counter()
    pipeline = VideoPipeline.load(cache / "bundle")
    for graph in ("text_encoder", "controlnet_scribble", "unet", "vae_decoder"):
        pipeline.executor.sessions.session(graph)
    load = time.perf_counter() - start
    keyframes = [Keyframe(index, keyframe(index, width, height)) for index in KEYFRAMES]
    clip = pipeline.generate(PROMPT, keyframes, seed=SEED, width=width, height=height)
    timings = {**clip.timings, "load": load}
    if clip.timings["total"] < SECOND_SEED_LIMIT:
        second = pipeline.generate(PROMPT, keyframes, seed=SEED + 1, width=width, height=height)
        timings["second_seed"] = second.timings["total"]
    return timings, clip.frames


def diffusers_pipeline(checkpoints: Path) -> Any:
    """AnimateDiff with SparseCtrl and LCM of diffusers, as it documents them."""
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
    pipe = AnimateDiffSparseControlNetPipeline(
        vae=AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(base / "unet"),
        motion_adapter=MotionAdapter.from_pretrained(checkpoints / "motion_adapter"),
        controlnet=SparseControlNetModel.from_pretrained(checkpoints / "scribble"),
        scheduler=LCMScheduler.from_config(DDIMScheduler.load_config(base / "scheduler"), beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_diffusers(cache: Path, width: int, height: int) -> tuple[dict[str, float], np.ndarray]:
    """diffusers in fp32, as documented for AnimateDiff with SparseCtrl and LCM."""
    import torch
    from PIL import Image

    start = time.perf_counter()
    pipe = diffusers_pipeline(cache / "checkpoints")
    load = time.perf_counter() - start
    timings: dict[str, float] = {"load": load}

    def timed(stage: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin
            return result

        return call

    pipe.encode_prompt = timed("text", pipe.encode_prompt)
    pipe.prepare_image = timed("keyframes", pipe.prepare_image)
    pipe.controlnet.forward = timed("control", pipe.controlnet.forward)
    pipe.unet.forward = timed("denoise", pipe.unet.forward)
    pipe.decode_latents = timed("decode", pipe.decode_latents)
    begin = time.perf_counter()
    frames = pipe(
        PROMPT,
        negative_prompt="",
        num_inference_steps=4,
        guidance_scale=1.0,
        conditioning_frames=[Image.fromarray(keyframe(index, width, height)) for index in KEYFRAMES],
        controlnet_frame_indices=list(KEYFRAMES),
        num_frames=16,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).frames[0]
    timings["total"] = time.perf_counter() - begin
    return timings, (frames * 255).round().astype(np.uint8)


def peak_gb() -> float:
    """The largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_side(side: str, cache: Path, size: str) -> tuple[dict[str, float], np.ndarray | None]:
    """Runs one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames.npy"
        command = [
            sys.executable,
            __file__,
            "--cache",
            str(cache),
            "--size",
            size,
            "--side",
            side,
            "--save",
            str(frames),
        ]
        result = subprocess.run(command, capture_output=False, stdout=subprocess.PIPE, check=False, text=True)
        if result.returncode:
            print(f"{side} at {size} failed with exit code {result.returncode}", file=sys.stderr)
            return {"failed": result.returncode}, None
        timings = json.loads(result.stdout.splitlines()[-1])
        return timings, np.load(frames) if frames.exists() else None


def main() -> None:
    """Runs all sizes, prints the table, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHT; repeatable")
    parser.add_argument("--cache", type=Path, default=Path(".cache/full-size"))
    parser.add_argument("--side", choices=["export", "sparsectrl-lcm", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.size or ["256x256", "512x512"]
    if options.side:
        width, height = map(int, sizes[0].split("x"))
        if options.side == "export":
            print(json.dumps(export(options.cache)))
            return
        timings, frames = (run_runtime if options.side == "sparsectrl-lcm" else run_diffusers)(
            options.cache, width, height
        )
        np.save(options.save, frames)
        print(json.dumps({**timings, "peak_gb": peak_gb()}))
        return

    exported = prepare(options.cache)
    results: dict[str, Any] = {}
    path = Path(__file__).parent / "results" / f"{date.today().isoformat()}-full-size-cpu.json"
    path.parent.mkdir(exist_ok=True)
    for size in sizes:
        mine, frames = run_side("sparsectrl-lcm", options.cache, size)
        theirs, reference = run_side("diffusers", options.cache, size)
        results[size] = {"sparsectrl-lcm": mine, "diffusers": theirs}
        if frames is not None and reference is not None:
            difference = np.abs(frames.astype(int) - reference.astype(int))
            results[size]["difference"] = {"max": int(difference.max()), "mean": float(difference.mean())}
        write_report(path, exported, results)  # a run takes long: what is measured is kept
    print_table(results)
    print(f"\nwritten to {path}")
    if any("failed" in side for sides in results.values() for side in sides.values()):
        sys.exit(1)


def write_report(path: Path, exported: dict[str, Any], results: dict[str, Any]) -> None:
    """The results with machine, versions and commit."""
    packages = ("onnxruntime", "torch", "diffusers", "numpy", "sparsectrl-lcm")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "commit": commit,
        "export": exported,
        "sizes": results,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def print_table(results: dict[str, Any]) -> None:
    """One row per size and side."""
    print("| size | side | " + " | ".join(STAGES) + " | second seed | peak GB | largest / mean difference |")
    print("|---" * (len(STAGES) + 5) + "|")
    for size, sides in results.items():
        for side in ("sparsectrl-lcm", "diffusers"):
            row = sides[side]
            cells = [f"{row[stage]:.1f}" if stage in row else "-" for stage in (*STAGES, "second_seed", "peak_gb")]
            difference = sides.get("difference") if side == "sparsectrl-lcm" else None
            cells.append(f"{difference['max']} / {difference['mean']:.3f}" if difference else "")
            print(f"| {size} | {side} | " + " | ".join(cells) + " |")


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    import psutil

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": psutil.cpu_count(logical=True),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(terse=True),
    }


if __name__ == "__main__":
    main()
