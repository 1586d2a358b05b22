"""Plots the loss curves of a training: for each stage, in total and for each kind of keyframes.

python demo/curves.py FOLDER -o PICTURE

Needs the `bench` extra.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from training import read_curve

NOT_LOSSES = ("step", "seconds", "gradient", "psnr", "kl")


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the curves of a training, STAGE.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    draw(options.folder, options.output)


def draw(folder: Path, output: Path) -> None:
    """Writes a picture with one diagram for each stage that has a curve."""
    curves = {path.stem: list(read_curve(folder, path.stem)) for path in sorted(folder.glob("*.jsonl"))}
    curves = {name: rows for name, rows in curves.items() if rows}
    if not curves:
        raise SystemExit(f"{folder}: has no curves, STAGE.jsonl")
    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False, layout="constrained")
    for place, (name, rows) in zip(axes[0], curves.items(), strict=True):
        for key in sorted({key for row in rows for key in row} - set(NOT_LOSSES)):
            points = [(row["step"], row[key]) for row in rows if key in row]
            place.plot(*zip(*points, strict=True), label=key, linewidth=2 if key == "loss" else 1)
        place.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        place.legend(fontsize="small")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
