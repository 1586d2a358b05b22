"""The GPU backends against diffusers: latency, device memory, and share of what the device's matrix units can do.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --bundle DIR --checkpoints DIR --contenders diffusers-eager,tensorrt

The real architecture at full size with random weights: without --bundle, made in --cache as models.py makes it,
before the time limit begins to count. Each contender runs in a process of its own; engines that are missing are built
in another. Prints one table and writes all samples as JSON into benchmarks/results/.

Device memory is the drop in free memory of the whole device since a contender's process began, at its peak: its CUDA
context counts, and nothing else may use the device. Operations are those of the exported graphs for every contender;
diffusers runs more for the same clip, so its share of the peak is that of useful work.
"""

import argparse
import json
import os
import re
import signal
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
from flops import data_sheet_peak, flops_per_second, request_flops
from gpu_contenders import BASELINE, CONTENDERS, KINDS, MODES, OUT_OF_TIME, STAGES, Job, Row, modes, work
from models import clip_size, prepare
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu.cuda import runtime_api
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.machine import report_head


def run(job: Job, free_memory: Callable[[], int] | None) -> list[Row]:
    """Runs a job in a process of its own; its rows, each with the device memory at its peak since the row before.

    The memory is watched from here, so that it costs the process nothing.
    """
    rows: list[Row] = []
    end = time.monotonic() + job.seconds
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
                ended = process.poll() is not None or time.monotonic() > end
                lowest = min(lowest, free_memory()) if free_memory else 0
                for line in output.read_text(encoding="utf-8").split("\n")[len(rows) : -1]:
                    rows.append(json.loads(line) | {"peak_bytes": before - lowest if free_memory else None})
                    lowest = before
                time.sleep(0.0 if ended else 0.02)
            if process.poll() is None:
                rows.append({"reason": f"{OUT_OF_TIME} ({job.seconds:.0f} s)"})
            elif process.returncode or not rows:
                said = log.read_text(errors="replace").strip().splitlines()
                rows.append({"reason": f"ended with code {process.returncode}: {said[-1] if said else 'no message'}"})
        finally:
            stop(process)
    return rows


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with those that it started, as torch.compile's."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contend(job: Job, build: bool, free_memory: Callable[[], int] | None) -> list[Row]:
    """Builds what is missing and measures a contender; its rows."""
    built: Row = {}
    begin = time.monotonic()
    if build and modes(job.contender) == MODES:
        (built, *_) = run(replace(job, role="build"), free_memory)
        built.pop("peak_bytes", None)
        if built.get("reason", "").startswith(OUT_OF_TIME):
            size = f"--size {job.width}x{job.height} --frames {job.frames}"
            command = f"sparsectrl-lcm build {job.bundle} --backend {job.contender} {size}"
            built["reason"] += f"; build beforehand: {command}"
    rows = [built]
    if "reason" not in built:
        left = job.seconds - (time.monotonic() - begin)
        rows = run(replace(job, role="measure", seconds=left), free_memory)
    return rows_of(job, built, rows)


def rows_of(job: Job, built: Row, rows: list[Row]) -> list[Row]:
    """One row for each mode of a contender, with figures or a reason."""
    failed = {"reason": next((row["reason"] for row in rows if "mode" not in row), "gave no result")}
    by_mode = {row["mode"]: row for row in rows if "mode" in row}
    return [
        {"contender": job.contender, "mode": mode, **built, **by_mode.get(mode, failed)}
        for mode in modes(job.contender)
    ]


def summarize(rows: list[Row], flops: dict[str, int], peak: float | None) -> None:
    """Adds p50 and p95 of all samples, ratios to diffusers eager, and shares of the peak."""
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
    """One row per contender and mode; milliseconds, medians where nothing else is said."""
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
    parser.add_argument("--bundle", type=Path, help="a full-size bundle; else one is made in --cache")
    parser.add_argument("--checkpoints", type=Path, help="what the bundle was exported from, for diffusers")
    parser.add_argument("--cache", type=Path, default=Path(".cache/full-size"))
    parser.add_argument("--size", type=clip_size, default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--requests", type=int, default=20, help="second seeds; half as many with new keyframes")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--time-limit", type=float, default=480.0, help="seconds after which none is started")
    parser.add_argument("--skip-build", action="store_true", help="take engines as they are")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="the whole flow on the CPU with the demo bundle")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.contenders.split(",")) - {*CONTENDERS, "onnxruntime"}:
        parser.error(f"--contenders: {sorted(unknown)[0]!r} is unknown; allowed are {', '.join(CONTENDERS)}")
    if options.dry_run:
        sizes = Bundle.load().manifest.sizes
        options.size, options.frames = f"{sizes.width}x{sizes.height}", sizes.frames
        options.contenders, options.bundle, options.skip_build = "onnxruntime", demo_bundle(), True
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
    """Runs the contenders one after the other within the time limit; what was measured is written after each."""
    free_memory = free_device_memory if device else None
    checkpoints = str(options.checkpoints) if options.checkpoints else None
    width, height = map(int, options.size.split("x"))
    sizes = (width, height, options.frames, options.steps, options.requests)
    job = Job("measure", "", str(options.bundle), checkpoints, *sizes)
    bundle = Bundle.load(options.bundle)
    flops = request_flops(bundle.folder, bundle.manifest, job.size, job.steps)
    path = output_path(options, device)
    head = report_head(reports.command(), (item.name for item in distributions()))
    sizes = {"size": f"{options.size}x{options.frames}", "steps": options.steps}
    report = head | {"device": device} | sizes | {"flops": flops, "rows": []}
    end = time.monotonic() + options.time_limit
    report["peak"] = device_peak(job, device["name"]) if device else None
    waiting = [name for name in (*CONTENDERS, "onnxruntime") if name in options.contenders.split(",")]
    while waiting:
        left = end - time.monotonic()
        share = left * CONTENDERS.get(waiting[0], 1) / sum(CONTENDERS.get(name, 1) for name in waiting)
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
    """What the device's matrix units can do in fp16, measured or from a data sheet."""
    (peak, *_) = run(replace(job, role="peak", seconds=60.0), None)
    return data_sheet_peak(name) if "reason" in peak else peak


def output_path(options: argparse.Namespace, device: Row | None) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device else "dry-run"
    folder = reports.RESULTS if device else Path(tempfile.gettempdir())
    return reports.results_file(f"gpu-{slug}", options.output, folder)


if __name__ == "__main__":
    main()
