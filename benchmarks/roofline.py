"""Models the milliseconds of a request on a GPU from the kernels that TensorRT compiled. Nothing is measured.

    python benchmarks/roofline.py
    python benchmarks/roofline.py benchmarks/results/*-kernels-*.json --device "RTX 4090"
    python benchmarks/roofline.py --assume-fp8
    python benchmarks/roofline.py --compare benchmarks/results/DATE-gpu-NAME.json
    python benchmarks/roofline.py --bundle DIR --engines tensorrt-rtx/512x512-fp16 --save FILE.json

Reads files of kernels, by default all in benchmarks/results, and needs neither TensorRT nor a GPU. --bundle reads the
kernels of built engines instead. Prints a table of milliseconds for each stage, and draws a picture with --picture.
--compare puts measured rows of gpu.py or lease_report.py beside the model.

The model (Williams et al. 2009, one kernel after another):
- A kernel takes the longer of two times: its operations at the device's rate, its bytes at the device's bandwidth.
- Each kernel adds the time of a launch in a CUDA graph.
- Every tensor is read and written once, weights too, and always in the device's memory: caches hold nothing.
- Heads of a fused attention are padded to 64, 128 or 256; its sequences are not padded.
- The shares of the data sheets' rates that kernels reach are assumed (devices.py).
- --assume-fp8 adds a row in which every product and convolution in fp16 takes fp8, with the bytes of fp16.
The host, the noise and the copies between stages are left out: the device does not wait for them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_reports
import reports
from devices import DEVICES, Device
from kernel_reports import Kernels
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.layer_report import KernelGroup
from sparsectrl_lcm.runtime.machine import report_head

STAGES = {
    "text": ("text_encoder",),
    "control": ("controlnet_scribble",),
    "denoise": ("unet", "lcm_update"),
    "decode": ("vae_decoder",),
}
"""The graphs of each stage of a request with scribbles and without guidance."""
KINDS = {"new_keyframes": tuple(STAGES), "second_seed": ("denoise", "decode")}
"""The stages of each kind of request. A second seed uses the kept residuals and embeddings."""
GOALS = {"new_keyframes": 250.0, "second_seed": 200.0}
"""Milliseconds on an H200 that the project aims at."""
HEADS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class Time:
    """Modelled seconds, by what limits the kernels: arithmetic, memory, or the launches between them."""

    arithmetic: float = 0.0
    memory: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Time") -> "Time":
        return Time(self.arithmetic + other.arithmetic, self.memory + other.memory, self.launches + other.launches)

    @property
    def total(self) -> float:
        """All seconds."""
        return self.arithmetic + self.memory + self.launches


def kernel_time(group: KernelGroup, device: Device, fp16_sums: bool = False) -> Time:
    """The modelled seconds of all kernels of a group."""
    moving = group.bytes / device.byte_rate()
    flops, rate = float(group.flops), device.product_rate(group.precision, fp16_sums)
    if group.operation == "attention":
        flops *= max(1.0, next((size for size in HEADS if size >= group.head), group.head) / max(1, group.head))
        rate = device.attention_rate(fp16_sums)
    computing = flops / rate
    launches = group.count * device.launch
    if computing > moving:
        return Time(arithmetic=group.count * computing, launches=launches)
    return Time(memory=group.count * moving, launches=launches)


def stage_times(kernels: Kernels, device: Device, steps: int, fp16_sums: bool = False) -> dict[str, Time]:
    """The modelled seconds of each stage, as far as its graphs are among the kernels."""
    runs = {"text": 1, "control": steps, "denoise": steps, "decode": kernels.decoder_runs}
    times = {}
    for stage, graphs in STAGES.items():
        groups = [group for graph in graphs for group in kernels.graphs.get(graph, ())] * runs[stage]
        if groups:
            times[stage] = sum((kernel_time(group, device, fp16_sums) for group in groups), Time())
    return times


def request_times(stages: dict[str, Time]) -> dict[str, Time]:
    """The modelled seconds of each kind of request."""
    return {kind: sum((stages[stage] for stage in names if stage in stages), Time()) for kind, names in KINDS.items()}


def as_fp8(kernels: Kernels) -> Kernels:
    """The same kernels, with fp8 operands in every product and convolution that has fp16 ones. Attention stays."""

    def changed(group: KernelGroup) -> KernelGroup:
        fits = group.operation in ("product", "convolution") and group.precision == "fp16"
        return group.model_copy(update={"precision": "fp8"}) if fits else group

    graphs = {graph: tuple(map(changed, groups)) for graph, groups in kernels.graphs.items()}
    return replace(kernels, label=f"{kernels.label}, fp8 assumed", graphs=graphs)


def table(sets: Iterable[Kernels], device: Device, steps: int, fp16_sums: bool = False) -> Iterator[str]:
    """A row of milliseconds for each set of engines."""
    yield f"| {device.name}, modelled ms | new keyframes | next seed | {' | '.join(STAGES)} | launches |"
    yield "|---" * (4 + len(STAGES)) + "|"
    for kernels in sets:
        stages = stage_times(kernels, device, steps, fp16_sums)
        kinds = request_times(stages)
        cells = [kernels.label, *(f"{1e3 * time.total:.0f}" for time in kinds.values())]
        cells += [f"{1e3 * stages[stage].total:.1f}" if stage in stages else "-" for stage in STAGES]
        yield f"| {' | '.join(cells)} | {1e3 * kinds['new_keyframes'].launches:.1f} |"


def measured_rows(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Names and median seconds by kind and stage, from the results of gpu.py or lease_report.py."""
    rows = [(row["contender"], row) for row in report.get("rows", [])]
    for name, row in (*rows, *report.get("contenders", {}).items()):
        if row.get("p50"):
            yield f"{name}, {row['mode']}" if row.get("mode") else name, row["p50"]


def comparison(report: dict[str, Any], kernels: Kernels, device: Device, steps: int) -> Iterator[str]:
    """A row for each measured stage: milliseconds as measured, as modelled, and their ratio."""
    stages = stage_times(kernels, device, steps)
    modelled = {stage: time.total for stage, time in stages.items()}
    yield f"| {device.name}, {kernels.label} | request | stage | measured ms | modelled ms | measured / modelled |"
    yield "|---" * 6 + "|"
    for name, kinds in measured_rows(report):
        for kind, time in request_times(stages).items():
            for stage in ("wall", *KINDS[kind]):
                seconds = kinds.get(kind, {}).get(stage)
                model = time.total if stage == "wall" else modelled.get(stage)
                if seconds is not None and model:
                    cells = [name, kind.replace("_", " "), stage, f"{1e3 * seconds:.1f}", f"{1e3 * model:.1f}"]
                    yield f"| {' | '.join(cells)} | {seconds / model:.2f} |"


def main() -> None:
    """Prints the tables, and writes what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of kernels; default: all in benchmarks/results")
    parser.add_argument("--device", choices=[*DEVICES, "all"], default="H200", help="default: H200")
    parser.add_argument("--steps", type=int, default=4, help="LCM steps; default: 4")
    parser.add_argument("--fp16-sums", action="store_true", help="fp16 products are added in fp16")
    parser.add_argument("--assume-fp8", action="store_true", help="add rows with all products in fp8")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], help="results of gpu.py or lease_report.py")
    parser.add_argument("--bundle", type=Path, help="a bundle with built engines, instead of files")
    parser.add_argument("--engines", help="the set of engines in --bundle, such as tensorrt-rtx/512x512-fp16")
    parser.add_argument("--label", help="the name of the row of --bundle; default: the set's")
    parser.add_argument("--save", type=Path, help="write the kernels of --bundle to this file")
    parser.add_argument("--picture", type=Path, help="draw a PNG")
    options = parser.parse_args()
    if bool(options.bundle) != bool(options.engines) or (options.engines and "/" not in options.engines):
        parser.error("--bundle and --engines BACKEND/SET belong together")
    try:
        run(options)
    except (SparseCtrlLcmError, OSError, KeyError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}" if isinstance(error, KeyError | ValueError) else str(error))


def run(options: argparse.Namespace) -> None:
    """Models what the options name."""
    if options.bundle:
        sets = [from_bundle(options)]
    else:
        files = options.files or sorted(reports.RESULTS.glob("*-kernels-*.json"), key=lambda path: path.stem)
        sets = [kernel_reports.read(path) for path in files]
    if options.assume_fp8:
        sets += [as_fp8(kernels) for kernels in sets]
    names = list(DEVICES) if options.device == "all" else [options.device]
    for name in names:
        print("\n".join(table(sets, DEVICES[name], options.steps, options.fp16_sums)) + "\n")
    if names == ["H200"]:
        print(f"The goals are {GOALS['new_keyframes']:.0f} and {GOALS['second_seed']:.0f} ms.")
    for path in options.compare:
        print("\n".join(comparison(json.loads(path.read_text()), sets[-1], DEVICES[names[0]], options.steps)))
    if options.picture:
        import roofline_plot  # needs matplotlib

        roofline_plot.draw(sets, DEVICES[names[0]], options.steps, options.picture)
        print(f"drawn to {options.picture}")


def from_bundle(options: argparse.Namespace) -> Kernels:
    """The kernels of built engines, saved if that was asked for."""
    kernels = kernel_reports.of_engines(options.bundle, *options.engines.split("/", 1))
    kernels = replace(kernels, label=options.label or kernels.label)
    if options.save:
        packages = ("tensorrt-rtx-cu13-bindings", "tensorrt", "sparsectrl-lcm")
        kernel_reports.write(options.save, kernels, report_head(reports.command(), packages))
    return kernels


if __name__ == "__main__":
    main()
