"""Compares the GPU backends with diffusers: latency, device memory, and share of the GPU's peak.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --bundle DIR --checkpoints DIR --contenders diffusers-eager,tensorrt

Runs the real architecture at full size with random weights. Without --bundle, models.py makes the bundle in --cache
before the time limit starts. Each contender runs in a separate process; missing engines are built in another. Prints
one table and writes all samples as JSON into benchmarks/results/.

diffusers runs eagerly, with torch.compile in its default mode, and with mode="reduce-overhead", which replays CUDA
graphs. It decodes all frames at once; with --vae-slicing it decodes frame by frame, which takes less memory.

Device memory is the largest drop in the device's free memory since the start of a contender's process. It includes the
CUDA context. Nothing else may use the device. Operations are counted in the exported graphs for every contender.
diffusers runs more for the same clip, so its share of the peak is that of useful work.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import reports
from flops import flops_per_second, request_flops
from gpu_contenders import BASELINE, CONTENDERS, DRY_RUN, RECORDS, Job, ProjectBackend, Row, rows_of
from gpu_worker import work
from machine_limits import data_sheet_peak
from models import clip_size, prepare
from sparsectrl_lcm.benchmarks.harness.worker_process import kill_with_children, stop_with_children
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu.cuda import runtime_api
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.machine import report_head

KINDS = ("new_keyframes", "second_seed")
STAGES = ("text", "control", "denoise", "decode")


def run(job: Job, free_memory: Callable[[], int] | None) -> list[Row]:
    """Runs a job in a separate process. Returns its rows, each with the peak of device memory since the previous row.

    If the time runs out, the last row has `out_of_time` beside the reason.

    This process watches the memory, so that the other one is not slowed down.
    """
    rows: list[Row] = []
    deadline = time.monotonic() + job.seconds
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "rows", Path(folder) / "log"
        output.touch()
        command = [sys.executable, __file__, "--job", json.dumps(asdict(replace(job, output=str(output))))]
        before = lowest = free_memory() if free_memory else 0
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None or time.monotonic() > deadline
                lowest = min(lowest, free_memory()) if free_memory else 0
                for line in output.read_text(encoding="utf-8").split("\n")[len(rows) : -1]:
                    rows.append(json.loads(line) | {"peak_bytes": before - lowest if free_memory else None})
                    lowest = before
                time.sleep(0.0 if ended else 0.02)
            if process.poll() is None:
                rows.append({"reason": f"ran out of time ({job.seconds:.0f} s)", "out_of_time": True})
            elif process.returncode or not rows:
                lines = log.read_text(errors="replace").strip().splitlines()
                rows.append({"reason": f"ended with code {process.returncode}: {lines[-1] if lines else 'no message'}"})
        finally:
            end = stop_with_children if job.role == "build" else kill_with_children
            end(process)  # torch.compile starts child processes
    return rows


def contend(job: Job, build: bool, free_memory: Callable[[], int] | None) -> list[Row]:
    """Builds missing engines, then measures a contender. Returns its rows."""
    built: Row = {}
    begin = time.monotonic()
    record = RECORDS[job.contender]
    if build and isinstance(record, ProjectBackend) and record.builds:
        (built, *_) = run(replace(job, role="build"), free_memory)
        built.pop("peak_bytes", None)
        if built.pop("out_of_time", False):
            command = job.build_options.command(Path("BUNDLE"), job.contender)
            built["reason"] += f"; finished engines are kept; build the others first: {command}"
    rows = [built]
    if "reason" not in built:
        left = job.seconds - (time.monotonic() - begin)
        rows = run(replace(job, role="measure", seconds=left), free_memory)
    return rows_of(job, built, rows)


def summarize(rows: list[Row], flops: dict[str, int], peak: float | None) -> None:
    """Adds the p50 and p95 of the samples, ratios to eager diffusers, and shares of the peak."""
    for row in rows:
        for name, percent in (("p50", 50), ("p95", 95)):
            row[name] = {
                kind: {stage: float(np.percentile(values, percent)) for stage, values in stages.items()}
                for kind, stages in row.get("samples", {}).items()
            }
    baseline = next((row["p50"] for row in rows if row["contender"] == BASELINE and row["p50"]), None)
    for row in rows:
        for kind, medians in row["p50"].items():
            row.setdefault("flops_per_s", {})[kind] = rates = flops_per_second(flops, medians)
            if peak is not None:
                row.setdefault("share_of_peak", {})[kind] = {name: value / peak for name, value in rates.items()}
            if baseline:
                row.setdefault("times_baseline", {})[kind] = baseline[kind]["wall"] / medians["wall"]


def print_table(rows: list[Row]) -> None:
    """Prints one row per contender and mode: medians in milliseconds, unless the header says otherwise."""
    heads = ["contender", *(f"{kind.replace('_', ' ')} (p95) | x eager | of peak" for kind in KINDS), *STAGES]
    heads = [*" | ".join([*heads, "GB", "load s", "build s"]).split(" | ")]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        name = f"{row['contender']}, {row['mode']}" if row["mode"] else row["contender"]
        if "reason" in row:
            print(f"| {name} | {row['reason']} |" + " |" * (len(heads) - 2))
            continue
        cells = [name]
        for kind in KINDS:
            cells.append(f"{1e3 * row['p50'][kind]['wall']:.0f} ({1e3 * row['p95'][kind]['wall']:.0f})")
            ratio, share = row.get("times_baseline", {}).get(kind), row.get("share_of_peak", {}).get(kind)
            cells += [f"{ratio:.2f}" if ratio else "-", f"{share['wall']:.1%}" if share else "-"]
        medians = row["p50"]["new_keyframes"]
        cells += [f"{1e3 * medians[stage]:.1f}" if stage in medians else "-" for stage in STAGES]
        memory, built = row["peak_bytes"], row.get("build_s")
        cells += [f"{memory / 1e9:.1f}" if memory is not None else "-", f"{row['load_s']:.1f}"]
        print("| " + " | ".join([*cells, f"{built:.0f}" if built else "-"]) + " |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a full-size bundle; default: make one in --cache")
    parser.add_argument("--checkpoints", type=Path, help="the bundle's checkpoints, for diffusers")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/full-size"), help="folder for checkpoints and bundle"
    )
    parser.add_argument("--size", type=clip_size, default="512x512", help="WIDTHxHEIGHT; default: 512x512")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip; default: 16")
    parser.add_argument("--steps", type=int, default=4, help="LCM steps; default: 4")
    parser.add_argument(
        "--requests", type=int, default=20, help="samples with a second seed; half as many with new keyframes"
    )
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"default: {','.join(CONTENDERS)}")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no contender starts")
    parser.add_argument("--skip-build", action="store_true", help="use only existing engines")
    parser.add_argument("--vae-slicing", action="store_true", help="let diffusers decode frame by frame")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="test run on the CPU with the demo bundle")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.contenders.split(",")) - RECORDS.keys():
        parser.error(f"--contenders: {sorted(unknown)[0]!r} is unknown; allowed are {', '.join(CONTENDERS)}")
    if options.dry_run:
        sizes = Bundle.load().manifest.sizes
        options.size, options.frames = f"{sizes.width}x{sizes.height}", sizes.frames
        options.contenders, options.bundle = ",".join(DRY_RUN), demo_bundle()
    return options


def main() -> None:
    """Runs all contenders, prints the table, writes the results."""
    options = arguments()
    if options.job:
        work(Job(**json.loads(options.job)))
        return
    try:
        device = None if options.dry_run else asdict(probe())
    except SparseCtrlLcmError as error:
        print(f"nothing is measured without an NVIDIA GPU: {error}", file=sys.stderr)
        sys.exit(2)
    if options.bundle is None:
        options.bundle, options.checkpoints = options.cache / "bundle", options.cache / "checkpoints"
        if not options.bundle.exists():
            prepare(options.cache)
    try:
        measure_all(options, device)
    except SparseCtrlLcmError as error:
        sys.exit(str(error))


def free_device_memory() -> int:
    return int(runtime_api().cudaMemGetInfo()[1])


def measure_all(options: argparse.Namespace, device: Row | None) -> None:
    """Runs one contender after the other within the time limit. Writes the report after each."""
    free_memory = free_device_memory if device else None
    checkpoints = str(options.checkpoints) if options.checkpoints else None
    width, height = map(int, options.size.split("x"))
    request = (width, height, options.frames, options.steps, options.requests, options.vae_slicing)
    job = Job("measure", "", str(options.bundle), checkpoints, *request)
    bundle = Bundle.load(options.bundle)
    flops = request_flops(bundle.folder, bundle.manifest, job.clip, job.steps)
    path = output_path(options, device)
    report = report_head(reports.command(), (item.name for item in distributions())) | {
        "device": device,
        "size": f"{options.size}x{options.frames}",
        "steps": options.steps,
        "vae_slicing": options.vae_slicing,
        "flops": flops,
        "rows": [],
    }
    end = time.monotonic() + options.time_limit
    report["peak"] = device_peak(job, device["name"]) if device else None
    chosen = options.contenders.split(",")
    waiting = [name for name in RECORDS if name in chosen]
    while waiting:
        left = end - time.monotonic()
        share = left * RECORDS[waiting[0]].share / sum(RECORDS[name].share for name in waiting)
        contender = replace(job, contender=waiting.pop(0), seconds=share)
        if left > 0:
            print(f"{contender.contender} has {share:.0f} s", file=sys.stderr)
            report["rows"] += contend(contender, not options.skip_build, free_memory)
        else:
            late = {"reason": f"was not started: the limit of {options.time_limit:g} s was reached"}
            report["rows"] += rows_of(contender, {}, [late])
        summarize(report["rows"], flops, report["peak"] and report["peak"]["flops_per_s"])
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report["rows"])
    print(f"\nwritten to {path}")


def device_peak(job: Job, name: str) -> Row:
    """Operations per second of the device in fp16: measured, otherwise from its data sheet."""
    (peak, *_) = run(replace(job, role="peak", seconds=60.0), None)
    return data_sheet_peak(name) if "reason" in peak else peak


def output_path(options: argparse.Namespace, device: Row | None) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device else "dry-run"
    folder = reports.RESULTS if device else Path(tempfile.gettempdir())
    return reports.results_file(f"gpu-{slug}", options.output, folder)


if __name__ == "__main__":
    main()
