"""Profiles a request on OpenVINO: seconds by graph and type of operation, from OpenVINO's own counters.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --precision bf16 --precision int8 --size 256x256 --frames 16

Makes checkpoints and bundle in --cache as compare.py does, and builds missing engines. After a warm-up, it runs one
request per precision with counters on, which makes the request slower. Prints one table per graph and writes all
counters as JSON into benchmarks/results/ (those of a small model into --cache).
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import reports
from cpu_contenders import build_engines
from models import ARCHITECTURES, clip_size, prepare
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT, SEED, RequestSize, scribbles
from sparsectrl_lcm.runtime.errors import SparseCtrlLcmError
from sparsectrl_lcm.runtime.machine import peak_bytes, physical_cores, report_head

PACKAGES = ("sparsectrl-lcm", "openvino", "onnxruntime", "numpy")
CACHES = {"full": Path(".cache/full-size"), "small": Path(".cache/small")}
CONTENDERS = {"fp32": "openvino-fp32", "bf16": "openvino-bf16", "int8": "openvino-int8-tiny"}
"""The contenders of compare.py whose engines are profiled, here with the full decoder."""

Totals = dict[str, float]
"""Seconds by type of operation."""


class ProfiledSessions:
    """OpenVINO's sessions with a count of their runs."""

    def __init__(self, sessions: Any) -> None:
        self.backend: str = sessions.backend
        self.precision: str = sessions.precision
        self._sessions = sessions
        self._graphs: dict[str, ProfiledSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph."""
        self._sessions.open(graph, dimensions)
        if graph not in self._graphs:
            self._graphs[graph] = ProfiledSession(self._sessions.session(graph))

    def session(self, graph: str) -> "ProfiledSession":
        """The session of an open graph."""
        return self._graphs[graph]

    def totals(self) -> dict[str, Totals]:
        """Seconds of all runs so far, by graph."""
        return {graph: session.totals() for graph, session in self._graphs.items()}

    def close(self) -> None:
        """Frees all sessions."""
        self._graphs.clear()
        self._sessions.close()


class ProfiledSession:
    """One graph with a count of its runs, since OpenVINO's counters are means over all runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._runs = 0

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs of the graph, for one prompt."""
        outputs: list[Any] = self._session.run(feeds)
        self._runs += 1
        return outputs

    def totals(self) -> Totals:
        """Seconds of all runs so far."""
        found: Totals = {}
        for counter in self._session._request.get_profiling_info() if self._runs else ():
            seconds = self._runs * counter.real_time.total_seconds()
            found[counter.node_type] = found.get(counter.node_type, 0.0) + seconds
        return found


def profile(bundle: Path, precision: str, size: RequestSize, threads: int) -> dict[str, Any]:
    """Seconds by stage of one request, and of each graph by type of operation.

    Raises:
        SparseCtrlLcmError: OpenVINO or the engines are missing.
    """
    from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
    from sparsectrl_lcm.runtime.cpu import openvino_compile

    openvino_compile.core().set_property("CPU", {"PERF_COUNT": True})  # before the graphs are compiled
    pipeline = VideoPipeline.load(bundle, "openvino", precision=precision, threads=threads)
    executor: Any = pipeline.executor
    sessions = executor.sessions = ProfiledSessions(executor.sessions)
    keyframes = [Keyframe(*item) for item in scribbles(size.width, size.height, size.frames).items()]

    def generate(prompt: str) -> dict[str, float]:
        clip = pipeline.generate(
            prompt,
            keyframes,
            seed=SEED,
            num_inference_steps=size.steps,
            width=size.width,
            height=size.height,
            num_frames=size.frames,
        )
        return dict(clip.timings)

    generate(PROMPT)
    before = sessions.totals()
    seconds = generate(f"{PROMPT}, again")  # a new prompt, so that SparseCtrl runs too
    after = sessions.totals()
    pipeline.close()
    ordered = {}
    for graph, totals in after.items():
        spent = {kind: total - before[graph].get(kind, 0.0) for kind, total in totals.items()}
        ordered[graph] = {kind: value for kind, value in sorted(spent.items(), key=lambda item: -item[1]) if value > 0}
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "graphs": ordered}


def table(found: Mapping[str, Any]) -> str:
    """A Markdown table for each graph: one row per type of operation, one column of seconds per precision."""
    lines = []
    for graph in next(iter(found.values()))["graphs"]:
        totals = {precision: row["graphs"][graph] for precision, row in found.items()}
        types = list(dict.fromkeys(kind for row in totals.values() for kind in row))
        lines += [f"| {graph}, seconds | " + " | ".join(totals) + " |", "|---" * (len(totals) + 1) + "|"]
        for kind in types:
            cells = [f"{row[kind]:.3f}" if kind in row else "-" for row in totals.values()]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        sums = [f"{sum(row.values()):.3f}" for row in totals.values()]
        lines += ["| all | " + " | ".join(sums) + " |", ""]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precision", action="append", choices=CONTENDERS, help="repeatable; default: those that can run here"
    )
    parser.add_argument("--size", type=clip_size, default="256x256", help="WIDTHxHEIGHT; default: 256x256")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip; default: 16")
    parser.add_argument("--steps", type=int, default=1, help="LCM steps; default: 1")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: all cores")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="full", help="small: a test run")
    parser.add_argument("--cache", type=Path, help="folder for checkpoints and bundle")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    options = parser.parse_args()
    options.cache = options.cache or CACHES[options.architecture]
    return options


def main() -> None:
    """Profiles each precision, prints the tables, writes the results."""
    options = arguments()
    prepare(options.cache, options.architecture)
    width, height = map(int, options.size.split("x"))
    size = RequestSize(width, height, options.frames, options.steps)
    bundle = options.cache / "bundle"
    folder = reports.RESULTS if options.architecture == "full" else options.cache
    path = reports.results_file("where-time-goes", options.output, folder)
    found: dict[str, Any] = {}
    report = report_head(reports.command(), PACKAGES) | {
        "architecture": options.architecture,
        "request": size.as_dict(),
        "threads": options.threads,
        "precisions": found,
    }
    try:
        from sparsectrl_lcm.runtime.cpu.openvino import best_precision

        for precision in options.precision or [best_precision()]:
            build_engines([CONTENDERS[precision]], bundle)
            found[precision] = profile(bundle, precision, size, options.threads)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except SparseCtrlLcmError as error:
        sys.exit(str(error))
    print(table(found))
    print(path)


if __name__ == "__main__":
    main()
