"""This project's CPU backends against diffusers: whole requests, on the same random weights, seeds and threads.

    python benchmarks/compare.py
    python benchmarks/compare.py --contender diffusers-fp32 --contender openvino-bf16 --size 512x512
    python benchmarks/compare.py --plot benchmarks/results/2026-11-22-compare-2cores.json

Checkpoints and bundle are made in --cache (about 20 GB at full size). In each round the contenders answer in turn, each
in a process of its own: a first request with a new prompt, from the prompt to uint8 frames, and for this project's
another seed after it. A process stays alive from round to round where --memory-gb allows; starts and warm-ups do not
count. Samples are written into benchmarks/results/ (of a small model into --cache) after each round, pictures beside
them at the end.

Operations are those of the portable graphs for every contender; diffusers runs more for the same clip, and engines
fewer, so that a rate is that of useful work.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import reports
import scaling
from compare_report import Report, evaluate, legend, markdown_table
from cpu_contenders import BASELINE, NAMES, OURS, build_engines, contender, contenders, element_bytes, graphs_of
from flops import graph_work
from models import ARCHITECTURES, clip_size, prepare
from sparsectrl_lcm.benchmarks.harness.processes import Worker, WorkerFailed
from sparsectrl_lcm.benchmarks.harness.requests import RequestSize
from sparsectrl_lcm.benchmarks.harness.rounds import Contender, Result, Rounds
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.engine_keys import ClipSize
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.machine import memory_bytes, physical_cores, report_head

PACKAGES = ("sparsectrl-lcm", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "nncf", "numpy")
CACHES = {"full": Path(".cache/full-size"), "small": Path(".cache/small")}
SIZES = {"full": "256x256", "small": "64x64"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", action="append", choices=NAMES, help="repeatable; by default all")
    parser.add_argument("--size", type=clip_size, help=f"WIDTHxHEIGHT; by default {SIZES['full']}")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="none with 0, as for --scaling alone")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of each contender; by default all cores")
    parser.add_argument("--memory-gb", type=float, default=0.8 * (memory_bytes() or 16e9) / 1e9)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="full", help="small: to try it in minutes")
    parser.add_argument("--cache", type=Path, help="where checkpoints and bundle are kept")
    parser.add_argument(
        "--scaling", nargs="?", const="openvino-bf16", choices=OURS, help="also its cost over frames, pixels and steps"
    )
    parser.add_argument("--scaling-rounds", type=int, default=1)
    parser.add_argument("--scaling-axis", action="append", choices=scaling.AXES, help="repeatable; by default all")
    parser.add_argument("--output", type=Path, help="a JSON file; by default a new one in benchmarks/results")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw and print earlier results, measure nothing")
    options = parser.parse_args()
    if options.scaling_axis and options.scaling is None:
        parser.error("--scaling-axis wants --scaling")
    if options.rounds < 1 and options.scaling is None:
        parser.error("--rounds 0 wants --scaling")
    options.scaling_axis = options.scaling_axis or list(scaling.AXES)
    options.cache = options.cache or CACHES[options.architecture]
    options.size = options.size or SIZES[options.architecture]
    options.contender = options.contender or list(NAMES)
    return options


def output_path(options: argparse.Namespace) -> Path:
    """The file that was asked for, or a new one; a small model's is no result to keep."""
    other = "" if options.size == SIZES["full"] else f"-{options.size}"
    folder = reports.RESULTS if options.architecture == "full" else options.cache
    return reports.results_file(f"compare-{options.threads}cores{other}", options.output, folder)


def main() -> None:
    """Runs all rounds, writes the results, prints the table, draws the pictures."""
    options = arguments()
    if options.plot:
        show(json.loads(options.plot.read_text(encoding="utf-8")), options.plot)
        return
    options.output = output_path(options)
    prepare(options.cache, options.architecture)
    try:
        report = begin_report(options)
        measure(options, report)
        measure_scaling(options, report)
    except SparseCtrlLcmError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; what was measured is kept")
    show(report, options.output)


def show(report: Report, path: Path) -> None:
    """Prints the table and draws the pictures beside the JSON."""
    from plot import draw

    print(markdown_table(report))
    print(f"\n{legend(report)}\n\n{path}")
    for picture in draw(report, path):
        print(picture)


def begin_report(options: argparse.Namespace) -> Report:
    """What the figures hold for, and the work of the graphs."""
    bundle, size = options.cache / "bundle", request_size(options)
    manifest = read_manifest(bundle)
    graphs = {graph for name in options.contender for graph in graphs_of(name).values()} & manifest.graphs.keys()
    clip = ClipSize(width=size.width, height=size.height, frames=size.frames)
    work = graph_work(bundle, manifest, clip, sorted(graphs))
    report = report_head(reports.command(), PACKAGES) | {
        "architecture": options.architecture,
        "temporal_norm": manifest.temporal_norm,
        "request": size.as_dict(),
        "threads": options.threads,
        "memory_gb": options.memory_gb,
        "work": {graph: asdict(found) for graph, found in work.items()},
        "contenders": {},
    }
    evaluate(report, BASELINE)
    return report


def request_size(options: argparse.Namespace) -> RequestSize:
    width, height = map(int, options.size.split("x"))
    return RequestSize(width, height, options.frames, options.steps)


def measure(options: argparse.Namespace, report: Report) -> None:
    """All rounds; the report is written after each."""
    if options.rounds < 1:
        return
    build_engines(options.contender, options.cache / "bundle")
    chosen = contenders(options.contender, options.cache, request_size(options), options.threads)
    start = time.monotonic()

    def tell(name: str, what: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {name}: {what}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        frames = {item.name: str(Path(folder) / f"{item.name}.npy") for item in chosen}
        tiny = [item for item in chosen if item.request.get("decoder") == "tiny"]
        save = {name: path for name, path in frames.items() if name not in {item.name for item in tiny}}
        with Rounds(chosen, report["request"], options.memory_gb, tell, save) as rounds:
            for number in range(options.rounds):
                rounds.run(number)
                report["contenders"] = {name: row_of(name, result) for name, result in rounds.results.items()}
                add_differences(report, frames)
                evaluate(report, BASELINE)
                write(options.output, report)
        for item in tiny if BASELINE in save else ():
            tell(item.name, "frames of the full decoder")
            draw_with_full_decoder(item, report["request"], frames[item.name])
            add_differences(report, frames)
            write(options.output, report)


def row_of(name: str, result: Result) -> Report:
    """What a contender's process gave, and what its rates are counted from."""
    row = asdict(result) | {"graphs": graphs_of(name), "element_bytes": element_bytes(name)}
    if result.failed:  # a message for the user of this machine names places here
        row["failed"] = re.sub(r"(?<=\s)/\S*/", "", result.failed)
    return row


def draw_with_full_decoder(item: Contender, request: dict[str, Any], path: str) -> None:
    """Makes frames that can be compared: with random weights those of a tiny decoder resemble none."""
    worker = Worker(item.command)
    try:
        worker.ask("load", **item.load)
        worker.ask("warm_up", **request, decoder="full", save=path)
    except WorkerFailed as error:
        print(f"{item.name}: {error}", file=sys.stderr)
    finally:
        worker.close()


def add_differences(report: Report, frames: dict[str, str]) -> None:
    """How far the frames of each contender are from the baseline's, in levels of 255."""
    if report["temporal_norm"] != "clip" or not Path(frames.get(BASELINE, "")).is_file():
        return  # with another norm than that of diffusers the frames are others
    reference = np.load(frames[BASELINE]).astype(int)
    for name, path in frames.items():
        if name != BASELINE and Path(path).is_file():
            difference = np.abs(np.load(path) - reference)
            levels = {"mean": float(difference.mean()), "max": int(difference.max())}
            report["contenders"][name]["difference"] = levels


def measure_scaling(options: argparse.Namespace, report: Report) -> None:
    """The cost of one contender over frames, pixels and steps; the report is written after each point."""
    if options.scaling is None:
        return
    build_engines([options.scaling], options.cache / "bundle")
    size = request_size(options)
    sizes = read_manifest(options.cache / "bundle").sizes
    found: list[dict[str, Any]] = []
    report["scaling"] = {"contender": options.scaling, "points": found}
    measured = contender(options.scaling, options.cache, size, options.threads)
    for point in scaling.measure(measured, size, sizes, options.scaling_rounds, options.scaling_axis):
        print("scaling:", point.get("failed") or f"{point['axis']} {point['value']}", file=sys.stderr)
        found.append(point)
        write(options.output, report)


def write(path: Path, report: Report) -> None:
    """Writes the report, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
