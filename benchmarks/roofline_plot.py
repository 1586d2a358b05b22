"""The picture of roofline.py: modelled stages of requests, and what limits them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from devices import Device
from kernel_reports import Kernels
from matplotlib.axes import Axes
from plot import STAGES as COLOURS
from roofline import GOALS, KINDS, request_times, stage_times

LIMITS = {"arithmetic": "#7a5195", "memory": "#c8553d", "launches": "#bfb38f"}
GOAL = "goal"


def draw(sets: Sequence[Kernels], device: Device, steps: int, path: Path) -> None:
    """Draws a bar for each set of engines and kind of request, by stages and by limits, and saves it as a PNG."""
    bars = [(kernels, kind) for kernels in sets for kind in KINDS]
    size = (11, 1.9 + 0.36 * len(bars))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True, layout="constrained")
    for place, (kernels, kind) in enumerate(bars):
        stages = stage_times(kernels, device, steps)
        whole = request_times(stages)[kind]
        _bar(left, place, {stage: time.total for stage, time in stages.items() if stage in KINDS[kind]}, COLOURS)
        _bar(right, place, {name: getattr(whole, name) for name in LIMITS}, LIMITS)
        left.text(1e3 * whole.total, place, f" {1e3 * whole.total:.0f}", va="center", fontsize=8)
        if device.name == "H200":
            goal, ends = [GOALS[kind]] * 2, [place - 0.45, place + 0.45]
            left.plot(goal, ends, color="black", linewidth=1, linestyle=":", label=GOAL)
    left.set_yticks(range(len(bars)), [f"{kernels.label}, {kind.replace('_', ' ')}" for kernels, kind in bars])
    left.invert_yaxis()
    left.margins(x=0.12)
    _finish(left, "stages", [*COLOURS, GOAL])
    _finish(right, "what limits the kernels", list(LIMITS))
    figure.supxlabel(f"modelled ms on {device.name}, {sets[0].size}, {steps} steps", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _finish(axes: Axes, title: str, names: Sequence[str]) -> None:
    """Adds title and legend, which has what was drawn of these names."""
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9, pad=26)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    order = [name for name in names if name in shown]
    handles = [shown[name] for name in order]
    axes.legend(handles, order, ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))


def _bar(axes: Axes, place: int, seconds: dict[str, float], colours: dict[str, str]) -> None:
    start = 0.0
    for name, part in seconds.items():
        axes.barh(place, 1e3 * part, left=start, color=colours[name], label=name)
        start += 1e3 * part
