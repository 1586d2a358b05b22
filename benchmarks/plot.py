"""Pictures of the results of compare.py: stages, roofline, scaling."""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from compare_report import STEPWISE, Report
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scaling import AXES

STAGES = {"text": "#9e9e9e", "keyframes": "#c7b299", "control": "#e0a030", "denoise": "#3070b0", "decode": "#50a070"}
OTHER = "#d9d9d9"
MARKERS = {"text_encoder": "v", "controlnet_scribble": "s", "unet": "o", "vae_decoder": "D", "vae_decoder_tiny": "d"}


def draw(report: Report, path: Path) -> list[Path]:
    """Draws pictures of a report beside its file. Returns their paths."""
    figures = {}
    if any(row["summary"] for row in report["contenders"].values()):
        figures["stages"] = draw_stages(report)
    if report["limits"]:
        figures["roofline"] = draw_roofline(report)
    if any("axis" in point for point in report.get("scaling", {}).get("points", [])):
        figures["scaling"] = draw_scaling(report["scaling"])
    paths = []
    for name, figure in figures.items():
        paths.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def draw_stages(report: Report) -> Figure:
    """Draws a bar for each contender and kind of request: medians of the stages, and the spread of the total."""
    bars = [
        (f"{name}{', second seed' if kind == 'second_seed' else ''}", stages)
        for name, row in report["contenders"].items()
        for kind, stages in row["summary"].items()
    ]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.34 * len(bars)), layout="constrained")
    for place, (_, stages) in enumerate(bars):
        left = 0.0
        for stage, colour in STAGES.items():
            if stage in stages:
                axes.barh(place, stages[stage]["median"], left=left, color=colour)
                left += stages[stage]["median"]
        total = stages["total"]
        axes.barh(place, max(0.0, total["median"] - left), left=left, color=OTHER)
        spread = [[total["median"] - total["min"]], [total["max"] - total["median"]]]
        axes.errorbar(total["median"], place, xerr=spread, color="black", capsize=3, linewidth=1)
        axes.text(total["max"], place, f"  {total['median']:.3g} s", va="center", fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (*STAGES.values(), OTHER)]
    axes.legend(handles, [*STAGES, "rest"], ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds, {_request(report)}", fontsize=8)
    return figure


def draw_roofline(report: Report) -> Figure:
    """Draws the rate of each graph over its arithmetic intensity, with the machine's limits (Williams et al. 2009)."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    peak, bandwidth = report["limits"]["flops_per_s"], report["limits"]["bytes_per_s"]
    seen: list[float] = []
    for place, (name, row) in enumerate(report["contenders"].items()):
        if not row["flops_per_s"]:
            continue
        for stage, rate in row["flops_per_s"].items():
            graph = row["graphs"][stage]
            work = report["work"][graph]
            seen.append(work["flops"] / (work["elements"] * row["element_bytes"]))
            axes.plot(seen[-1], rate / 1e12, MARKERS[graph], color=f"C{place}", markersize=6)
        axes.plot([], [], "o", color=f"C{place}", label=name)
    for graph in report["work"]:
        axes.plot([], [], MARKERS[graph], color="grey", label=graph)
    ends = np.geomspace(min([*seen, peak / bandwidth]) / 3, max([*seen, peak / bandwidth]) * 3, 200)
    axes.plot(ends, np.minimum(peak, ends * bandwidth) / 1e12, color="black", linewidth=1)
    label = f"torch, product in bf16: {peak / 1e12:.3g} TFLOP/s; copy: {bandwidth / 1e9:.3g} GB/s"
    end = (ends[-1], peak / 1e12)
    axes.annotate(label, end, fontsize=8, ha="right", xytext=(0, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s, counted from the portable graphs")
    axes.set_xlabel("operations per byte that convolutions and products read and write", fontsize=8)
    axes.set_title(_request(report), fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(which="both", linewidth=0.2)
    return figure


def draw_scaling(found: dict[str, Any]) -> Figure:
    """Draws the seconds by frames, pixels and steps."""
    by_axis = {axis: [point for point in found["points"] if point.get("axis") == axis] for axis in AXES}
    measured = {axis: points for axis, points in by_axis.items() if points}
    size = (1 + 3 * len(measured), 3.4)
    figure, (panels,) = plt.subplots(1, len(measured), figsize=size, layout="constrained", squeeze=False)
    for (axis, points), axes in zip(measured.items(), panels, strict=True):
        _draw_curves(axes, points)
        axes.set_xlabel(AXES[axis], fontsize=8)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(linewidth=0.2)
    panels[0].set_ylabel(f"seconds, {found['contender']}", fontsize=8)
    panels[0].legend(fontsize=7)
    return figure


def _draw_curves(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Draws the total of both kinds of requests, and the stages of first requests."""
    values = [point["value"] for point in points]

    def seconds(kind: str, stage: str) -> list[float]:
        return [median(sample.get(stage, 0.0) for sample in point["samples"][kind]) for point in points]

    axes.plot(values, seconds("first", "total"), "o-", color="black", label="first request")
    axes.plot(values, seconds("second_seed", "total"), "o--", color="black", label="second seed")
    for stage in (*STEPWISE, "decode"):
        axes.plot(values, seconds("first", stage), ".-", color=STAGES[stage], label=stage)


def _request(report: Report) -> str:
    request = report["request"]
    size = f"{request['frames']} frames of {request['width']}x{request['height']}, {request['steps']} steps"
    if device := report.get("device"):
        return f"{size}, {device['name']}"
    return f"{size}, {report['threads']} threads, {report['machine']['processor']}"
