"""Compares this project's CPU backends with diffusers: whole requests, on the same random weights, seeds and threads.

    python benchmarks/compare.py
    python benchmarks/compare.py --contender diffusers-fp32 --contender openvino-bf16 --size 512x512
    python benchmarks/compare.py --plot benchmarks/results/2026-11-22-compare-2cores.json

Makes checkpoints and bundle in --cache (about 20 GB at full size). In each round every contender makes a request with a
new prompt, from the prompt to uint8 frames. This project's contenders then make one with another seed. The order
rotates from round to round. Each contender has its own process, which stays alive between rounds if --memory-gb allows.
Starts and warm-ups are not timed.

diffusers decodes all frames at once. Its contenders named -sliced decode frame by frame (VAE slicing), which takes less
memory. Those named -tiny use AutoencoderTiny; this project's tiny decoder is compared with them.

The frames of one request are compared with those of diffusers in fp32, which are made separately if it is not a
contender. Writes the samples into benchmarks/results/ after each round (those of a small model into --cache), and
pictures beside them at the end.

Operations are counted in the portable graphs for every contender. For the same clip diffusers runs more operations and
engines run fewer, so rates are those of useful work.
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

import frame_differences
import reports
import scaling
from compare_report import Report, evaluate, legend, markdown_table
from cpu_contenders import BASELINE, NAMES, OURS, build_engines, contender, contenders, element_bytes, graphs_of
from flops import graph_work
from models import ARCHITECTURES, clip_size, prepare
from sparsectrl_lcm.benchmarks.harness.measured_requests import RequestSize
from sparsectrl_lcm.benchmarks.harness.rounds import Result, Rounds
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.machine import memory_bytes, physical_cores, report_head

PACKAGES = ("sparsectrl-lcm", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "nncf", "numpy")
CACHES = {"full": Path(".cache/full-size"), "small": Path(".cache/small")}
SIZES = {"full": "256x256", "small": "64x64"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", action="append", choices=NAMES, help="repeatable; default: all")
    parser.add_argument("--size", type=clip_size, help=f"WIDTHxHEIGHT; default: {SIZES['full']}")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip; default: 16")
    parser.add_argument("--steps", type=int, default=4, help="LCM steps; default: 4")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3; 0 measures --scaling alone")
    parser.add_argument(
        "--threads", type=int, default=physical_cores(), help="threads of each contender; default: all cores"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=0.8 * (memory_bytes() or 16e9) / 1e9,
        help="most memory of all processes together; default: 80%% of the machine's memory",
    )
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, default="full", help="small: a test run of a few minutes"
    )
    parser.add_argument("--cache", type=Path, help="folder for checkpoints and bundle")
    parser.add_argument(
        "--differences", action=argparse.BooleanOptionalAction, default=True, help="compare frames; default: on"
    )
    parser.add_argument(
        "--scaling",
        nargs="?",
        const="openvino-bf16",
        choices=OURS,
        help="also measure the cost by frames, pixels and steps",
    )
    parser.add_argument("--scaling-rounds", type=int, default=1, help="samples at each point; default: 1")
    parser.add_argument("--scaling-axis", action="append", choices=scaling.AXES, help="repeatable; default: all")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only print and draw earlier results")
    options = parser.parse_args()
    if options.scaling_axis and options.scaling is None:
        parser.error("--scaling-axis needs --scaling")
    if options.rounds < 1 and options.scaling is None:
        parser.error("--rounds 0 needs --scaling")
    options.scaling_axis = options.scaling_axis or list(scaling.AXES)
    options.cache = options.cache or CACHES[options.architecture]
    options.size = options.size or SIZES[options.architecture]
    options.contender = options.contender or list(NAMES)
    return options


def output_path(options: argparse.Namespace) -> Path:
    """The requested file, or a new one. Results of a small model go into the cache."""
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
    exported = prepare(options.cache, options.architecture)
    try:
        report = begin_report(options, exported)
        measure(options, report)
        measure_scaling(options, report)
    except SparseCtrlLcmError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; finished rounds are in the results")
    show(report, options.output)


def show(report: Report, path: Path) -> None:
    """Prints the table and draws the pictures beside the JSON."""
    from plot import draw

    print(markdown_table(report))
    print(f"\n{legend(report)}\n\n{path}")
    for picture in draw(report, path):
        print(picture)


def begin_report(options: argparse.Namespace, exported: dict[str, Any]) -> Report:
    """A report with the request, the machine, the work of the graphs, and the cost of the export."""
    bundle, size = options.cache / "bundle", request_size(options)
    manifest = read_manifest(bundle)
    graphs = {graph for name in options.contender for graph in graphs_of(name).values()} & manifest.graphs.keys()
    clip = ClipSize(width=size.width, height=size.height, frames=size.frames)
    work = graph_work(bundle, manifest, clip, sorted(graphs))
    report = report_head(reports.command(), PACKAGES) | {
        "architecture": options.architecture,
        "temporal_norm": manifest.temporal_norm,
        "export": exported,
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
    """Runs all rounds, then compares the frames; writes the report after each round."""
    if options.rounds < 1:
        return
    build_engines(options.contender, options.cache / "bundle")
    size, names = request_size(options), options.contender
    # frames match those of diffusers only with its temporal norm
    compared = names if options.differences and report["temporal_norm"] == "clip" else []
    start = time.monotonic()

    def log_event(name: str, what: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {name}: {what}", file=sys.stderr)

    def write_with_differences() -> None:
        for name, levels in frame_differences.levels(files).items():
            if name in report["contenders"]:
                report["contenders"][name]["difference"] = levels
        write(options.output, report)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = frame_differences.warm_up_files(compared, folder)
        chosen = contenders(names, options.cache, size, options.threads)
        with Rounds(chosen, report["request"], options.memory_gb, log_event, files) as rounds:
            for number in range(options.rounds):
                rounds.run(number)
                report["contenders"] = {name: row_of(name, result) for name, result in rounds.results.items()}
                evaluate(report, BASELINE)
                write_with_differences()
        for name, path in frame_differences.extra_files(compared, folder).items():
            log_event(name, "frames to compare")
            drawn = contender(name, options.cache, size, options.threads)
            frame_differences.draw(drawn, report["request"], path)
            files[name] = path
        write_with_differences()


def row_of(name: str, result: Result) -> Report:
    """The measurements of a contender, and the values for its rates."""
    row = asdict(result) | {"graphs": graphs_of(name), "element_bytes": element_bytes(name)}
    if result.failed:  # the message may name paths of this machine
        row["failed"] = re.sub(r"(?<=\s)/\S*/", "", result.failed)
    return row


def measure_scaling(options: argparse.Namespace, report: Report) -> None:
    """Measures the cost of one contender by frames, pixels and steps; writes the report after each point."""
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
    """Writes the whole report, or leaves the old file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
