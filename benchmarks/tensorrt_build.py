"""Builds TensorRT-RTX engines of the real architecture at full size without a GPU: time, memory, size and kernels.

    python benchmarks/tensorrt_build.py --size 512x512 --precision fp16 --precision fp32
    python benchmarks/tensorrt_build.py --precision fp16 --graph unet --no-check
    python benchmarks/tensorrt_build.py --bundle my-bundle --precision fp16 --transposed-upsampling --kernels

Uses a full-size bundle with random weights in --cache, which is made if missing, or your --bundle. The engines in that
bundle stay as they are. Builds each precision in a separate process. Prints two tables and writes them as JSON into
benchmarks/results/, with --kernels also the kernels that roofline.py reads.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import kernel_reports
import reports
from kernel_reports import Kernels
from models import clip_size, prepare
from sparsectrl_lcm.benchmarks.harness.worker_process import stop_with_children
from sparsectrl_lcm.runtime.machine import report_head

BACKEND = "tensorrt-rtx"
FRAMES = 16
PACKAGES = ("tensorrt-rtx-cu13-bindings", "onnx-ir", "onnxruntime", "numpy", "sparsectrl-lcm")


class MemoryByGraph:
    """Watches the peak memory of this process while each graph is built."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self.graph: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def progress(self, text: str, fraction: float) -> None:
        """The build's progress callback. The text begins with the name of the graph."""
        self.graph = text.split(" ", maxsplit=1)[0]
        self.starts.setdefault(self.graph, time.perf_counter())

    def end(self) -> dict[str, dict[str, float]]:
        """Stops watching. Returns peak GB and seconds of each graph, including checks and weights."""
        self._ended.set()
        self._thread.join()
        ends = [*list(self.starts.values())[1:], time.perf_counter()]
        return {
            graph: {"peak_gb": self.peaks.get(graph, 0.0), "total_seconds": end - start}
            for (graph, start), end in zip(self.starts.items(), ends, strict=True)
        }

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._ended.wait(0.02):
            if self.graph is not None:
                self.peaks[self.graph] = max(self.peaks.get(self.graph, 0.0), process.memory_info().rss / 1e9)


def build_all(bundle: Path, precision: str, size: str, kernels: Path, **options: Any) -> dict[str, Any]:
    """Builds the engines of a bundle with `options` of `BuildOptions`, and writes the file of their kernels.

    Returns:
        A row for each graph.
    """
    from sparsectrl_lcm.engine.build import build
    from sparsectrl_lcm.runtime.format.build_options import BuildOptions
    from sparsectrl_lcm.runtime.format.bundle import Bundle

    width, height = map(int, size.split("x"))
    memory = MemoryByGraph()
    built = BuildOptions(width, height, FRAMES, precision=precision, **options)
    index = build(bundle, BACKEND, built, memory.progress).index
    rows = memory.end()
    for graph, record in index.engines.items():
        rows[graph]["build_seconds"] = record.report["seconds"]
        rows[graph]["engine_gb"] = record.files[record.path].bytes / 1e9
        if record.report.get("errors"):
            rows[graph]["largest_error"] = max(record.report["errors"].values())
        rows[graph] |= kernel_columns(record.report)
    label = precision + (", transposed upsampling" if built.transposed_upsampling else "")
    kernel_reports.write(kernels, kernel_reports.of_index(Bundle.load(bundle), index, label), {})
    return rows


def kernel_columns(report: dict[str, Any]) -> dict[str, Any]:
    """What an engine is made of, from the report in its record."""
    from sparsectrl_lcm.runtime.format.layer_report import LayerReport

    layers = LayerReport.of(report) or LayerReport(layers={}, attention={})
    return {
        "kernels": layers.layers,
        "fused_attentions": {kind: counts.fused for kind, counts in layers.attention.items()},
        "split_attentions": layers.split_attention,
        "norms": layers.norms,
        "fp32_norms": len(layers.fp32_norms),
        "fp32_group_norms": sum("GroupNormalization" in name for name in layers.fp32_norms),
        "gb_moved": (layers.bytes_moved or 0) / 1e9,
        "fp8_share": layers.share("fp8"),
        "fp8_share_with_attention": layers.share("fp8", attention=True),
    }


def main() -> None:
    """Builds all precisions, prints the table, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=clip_size, default="512x512", help="WIDTHxHEIGHT; default: 512x512")
    parser.add_argument(
        "--precision", action="append", choices=["fp16", "bf16", "fp32", "fp8"], help="repeatable; default: fp16, fp32"
    )
    parser.add_argument("--graph", action="append", default=[], help="build only this graph; repeatable")
    parser.add_argument("--cache", type=Path, default=Path(".cache/full-size"), help="folder of the bundle")
    parser.add_argument("--bundle", type=Path, help="build this bundle instead of the one with random weights")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with fp32")
    parser.add_argument("--transposed-upsampling", action="store_true", help="as in `sparsectrl-lcm build`")
    parser.add_argument("--kernels", action="store_true", help="also write the kernels, for roofline.py")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kernels-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        chosen = {"check": not options.no_check, "graphs": tuple(options.graph)}
        chosen["transposed_upsampling"] = options.transposed_upsampling
        print(json.dumps(build_all(options.bundle, options.child, options.size, options.kernels_file, **chosen)))
        return
    if options.bundle is None:
        prepare(options.cache)
    results: dict[str, Any] = {}
    head = report_head(reports.command(), PACKAGES)
    suffix = "-transposed" if options.transposed_upsampling else ""
    for precision in options.precision or ["fp16", "fp32"]:
        results[precision], kernels = build_copy(options.bundle or options.cache / "bundle", precision, options)
        if options.kernels and kernels:
            path = reports.results_file(f"kernels-{precision}{suffix}")
            kernel_reports.write(path, kernels, head)
            print(f"kernels written to {path}")
    path = reports.results_file(f"tensorrt-rtx-build-cpu{suffix}")
    path.write_text(json.dumps(head | {"size": f"{options.size}x{FRAMES}", "builds": results}, indent=2) + "\n")
    print_table(results)
    print_kernels(results)
    print(f"\nwritten to {path}")


def build_copy(source: Path, precision: str, options: argparse.Namespace) -> tuple[dict[str, Any], Kernels | None]:
    """Builds the engines of a copy of a bundle in a process. Returns its rows and, if it did not fail, the kernels."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        bundle, kernels = Path(folder) / "bundle", Path(folder) / "kernels.json"
        # no hard links: onnx_ir does not read weights through them
        shutil.copytree(source, bundle, ignore=shutil.ignore_patterns("engines"))
        command = [sys.executable, __file__, "--child", precision, "--size", options.size, "--bundle", str(bundle)]
        command += ["--kernels-file", str(kernels), *(["--no-check"] if options.no_check else [])]
        command += ["--transposed-upsampling"] if options.transposed_upsampling else []
        command += [word for graph in options.graph for word in ("--graph", graph)]
        return run(command), kernel_reports.read(kernels) if kernels.exists() else None


def run(command: list[str]) -> dict[str, Any]:
    """Runs a build. Returns its rows, or the code that it failed with."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        finally:
            stop_with_children(process)
    return dict(json.loads(output)) if process.returncode == 0 else {"failed": process.returncode}


def print_table(results: dict[str, Any]) -> None:
    """Prints one row for each precision and graph."""
    columns = ("build_seconds", "total_seconds", "peak_gb", "engine_gb", "largest_error")
    print("| precision | graph | build s | with check s | peak GB | engine GB | largest error |")
    print("|---" * 7 + "|")
    for precision, rows in results.items():
        if "failed" in rows:
            print(f"| {precision} | failed with {rows['failed']} |")
            continue
        for graph, row in rows.items():
            cells = [f"{row[column]:.3g}" if column in row else "" for column in columns]
            print(f"| {precision} | {graph} | " + " | ".join(cells) + " |")


def print_kernels(results: dict[str, Any]) -> None:
    """Prints what each engine is made of."""
    columns = ("kernels", "fused attentions", "split attentions", "norms that write fp32", "GB moved", "fp8 share")
    print(f"\n| precision | graph | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for precision, rows in results.items():
        for graph, row in rows.items() if "failed" not in rows else ():
            fused, split = sum(row["fused_attentions"].values()), len(row["split_attentions"])
            cells = [str(sum(row["kernels"].values())), str(fused), str(split)]
            cells += [f"{row['fp32_norms']} of {row['norms']}", f"{row['gb_moved']:.3g}", f"{row['fp8_share']:.1%}"]
            print(f"| {precision} | {graph} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
