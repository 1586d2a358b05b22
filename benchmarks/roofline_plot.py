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

LIMITS = {"arithmetic": "#3070b0", "memory": "#e0a030", "launches": "#9e9e9e"}


def draw(sets: Sequence[Kernels], device: Device, steps: int, path: Path) -> None:
    """Draws a bar for each set of engines and kind of request, by stages and by limits, and saves it as a PNG."""
    bars = [(kernels, kind) for kernels in sets for kind in KINDS]
    size = (11, 1.6 + 0.36 * len(bars))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for place, (kernels, kind) in enumerate(bars):
        stages = stage_times(kernels, device, steps)
        whole = request_times(stages)[kind]
        _bar(left, place, {stage: time.total for stage, time in stages.items() if stage in KINDS[kind]}, COLOURS)
        _bar(right, place, {name: getattr(whole, name) for name in LIMITS}, LIMITS)
        left.text(1e3 * whole.total, place, f" {1e3 * whole.total:.0f}", va="center", fontsize=8)
        if device.name == "H200":
            left.plot([GOALS[kind]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1, linestyle=":")
    left.set_yticks(range(len(bars)), [f"{kernels.label}, {kind.replace('_', ' ')}" for kernels, kind in bars])
    left.tick_params(labelsize=8)
    left.invert_yaxis()
    left.margins(x=0.12)
    for axes, names in ((left, list(COLOURS)), (right, list(LIMITS))):
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        order = [name for name in names if name in shown]
        axes.legend(
            [shown[name] for name in order], order, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1)
        )
        axes.set_xlabel(f"modelled ms on {device.name}, {sets[0].size}, {steps} steps", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axes: Axes, place: int, seconds: dict[str, float], colours: dict[str, str]) -> None:
    start = 0.0
    for name, part in seconds.items():
        axes.barh(place, 1e3 * part, left=start, color=colours[name], label=name)
        start += 1e3 * part
