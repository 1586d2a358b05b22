"""The real architecture at full size with random weights: this runtime against diffusers, on the same weights and seed.

    python benchmarks/full_size.py --size 256x256 --size 512x512

Exports once to a cache folder (about 20 GB with the checkpoints), then runs each side in a process of its own, so that
peak memory is that side's alone. Prints one table and writes it as JSON into benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import reports
from models import clip_size, diffusers_pipeline, peak_gb, prepare, watch_stages
from sparsectrl_lcm.benchmarks.harness.requests import PROMPT, SEED, scribbles
from sparsectrl_lcm.runtime.machine import report_head

FRAMES = 16
SECOND_SEED_LIMIT = 240.0
"""Seconds; a longer first request is not followed by a second one."""
STAGES = ("text", "keyframes", "control", "denoise", "decode", "total")


def run_runtime(cache: Path, width: int, height: int) -> tuple[dict[str, float], np.ndarray]:
    """A first request, and one with another seed after it where the first did not take too long."""
    from sparsectrl_lcm.runtime import Keyframe, VideoPipeline

    start = time.perf_counter()
    pipeline = VideoPipeline.load(cache / "bundle", "onnxruntime")
    load = time.perf_counter() - start
    keyframes = [Keyframe(index, picture) for index, picture in scribbles(width, height, FRAMES).items()]
    clip = pipeline.generate(PROMPT, keyframes, seed=SEED, width=width, height=height)
    opened = clip.timings["load"]
    timings = {**clip.timings, "load": load + opened, "total": clip.timings["total"] - opened}
    if timings["total"] < SECOND_SEED_LIMIT:
        second = pipeline.generate(PROMPT, keyframes, seed=SEED + 1, width=width, height=height)
        timings["second_seed"] = second.timings["total"]
    return timings, clip.frames


def run_diffusers(cache: Path, width: int, height: int) -> tuple[dict[str, float], np.ndarray]:
    """diffusers in fp32, as documented for AnimateDiff with SparseCtrl and LCM."""
    import torch
    from PIL import Image

    start = time.perf_counter()
    pipe = diffusers_pipeline(cache / "checkpoints")
    load = time.perf_counter() - start
    stages = watch_stages(pipe)
    stages.append({"load": load})
    pictures = scribbles(width, height, FRAMES)
    begin = time.perf_counter()
    frames = pipe(
        PROMPT,
        negative_prompt="",
        num_inference_steps=4,
        guidance_scale=1.0,
        conditioning_frames=[Image.fromarray(picture) for picture in pictures.values()],
        controlnet_frame_indices=list(pictures),
        num_frames=FRAMES,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).frames[0]
    return stages[0] | {"total": time.perf_counter() - begin}, (frames * 255).round().astype(np.uint8)


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
        result = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
        if result.returncode:
            print(f"{side} at {size} failed with exit code {result.returncode}", file=sys.stderr)
            return {"failed": result.returncode}, None
        timings = json.loads(result.stdout.splitlines()[-1])
        return timings, np.load(frames) if frames.exists() else None


def main() -> None:
    """Runs all sizes, prints the table, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", type=clip_size, help="WIDTHxHEIGHT; repeatable")
    parser.add_argument("--cache", type=Path, default=Path(".cache/full-size"))
    parser.add_argument("--side", choices=["sparsectrl-lcm", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.size or ["256x256", "512x512"]
    if options.side:
        width, height = map(int, sizes[0].split("x"))
        timings, frames = (run_runtime if options.side == "sparsectrl-lcm" else run_diffusers)(
            options.cache, width, height
        )
        np.save(options.save, frames)
        print(json.dumps({**timings, "peak_gb": peak_gb()}))
        return

    exported = prepare(options.cache)
    results: dict[str, Any] = {}
    path = reports.results_file("full-size-cpu")
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
    head = report_head(reports.command(), packages)
    report = head | {"export": exported, "sizes": results}
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


if __name__ == "__main__":
    main()
