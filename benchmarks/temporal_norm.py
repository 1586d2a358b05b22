"""Measures what the scope of the temporal norm does to clips with pictures as keyframes (huggingface/diffusers#9508).

    python benchmarks/temporal_norm.py [--requests 32] [--threads N]

The demo model was trained with statistics of each frame. Here UNet and SparseCtrl take them over each frame or over the
whole clip. Makes clips of scenes that training never saw, and compares them with the drawn clips that the keyframes
come from. Takes 20 minutes on one core and writes a JSON file into benchmarks/results/.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import reports
from numpy.typing import NDArray
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.options import ExportOptions
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.machine import report_head

from sparsectrl_lcm import Keyframe, VideoPipeline

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "demo"))

from drawing import clip as drawn  # noqa: E402
from evaluate import PATH_PIXELS, judged, on_path  # noqa: E402
from measure import flicker, psnr, still_ground  # noqa: E402
from world import FRAMES, HELD_OUT_SEED, KEYFRAMES, Scene, scene  # noqa: E402

TRAINED = ROOT / "demo" / "trained"
Frames = NDArray[np.uint8]


class Case(NamedTuple):
    """Which keyframes a request has, and whether its prompt describes them."""

    keyframes: tuple[int, ...]
    own_prompt: bool


CASES = {
    "three keyframes": Case(KEYFRAMES, own_prompt=True),
    "one keyframe": Case((0,), own_prompt=True),
    "three keyframes, prompt of another scene": Case(KEYFRAMES, own_prompt=False),
}


def bundles(folder: Path) -> Iterator[tuple[str, Path]]:
    """The demo model for each scope of the temporal norm in UNet and SparseCtrl, with the names of the rows."""
    parts = {name: str(TRAINED / name) for name in ("base", "motion_adapter")}
    options = ExportOptions(**parts, controlnets={"rgb": str(TRAINED / "rgb")}, temporal_norm="clip")  # type: ignore[arg-type]
    frame, clip = ROOT / "runtime" / "demo_bundle", folder / "clip"
    export_bundle(options, clip)
    yield "UNet frame, SparseCtrl frame", frame
    yield "UNet frame, SparseCtrl clip", mixed(frame, clip, folder / "frame_clip")
    yield "UNet clip, SparseCtrl frame", mixed(clip, frame, folder / "clip_frame")
    yield "UNet clip, SparseCtrl clip", clip


def mixed(bundle: Path, other: Path, output: Path) -> Path:
    """Writes `bundle` with the SparseCtrl of `other` to `output`."""
    shutil.copytree(bundle, output)
    manifest, theirs = read_manifest(bundle), read_manifest(other)
    graph = theirs.graphs["controlnet_rgb"]
    files = {name: theirs.files[name] for name in (graph.path, *graph.weights)}
    for name in files:
        shutil.copyfile(other / name, output / name)
    graphs = manifest.graphs | {"controlnet_rgb": graph}
    manifest.model_copy(update={"graphs": graphs, "files": manifest.files | files}).write(output)
    return output


def figures(made: Frames, world: Scene, keyframes: Sequence[int]) -> dict[str, float]:
    """Compares a clip [F, H, W, 3] with the scene's drawn one.

    Returns:
        `keyframes`, `between`: PSNR in dB at the keyframes and at the other frames. `saturation`: that of all pixels
        less that of the drawn clip, in levels. `path`: share of frames whose shape is within `PATH_PIXELS` of its path.
        `colour`: whether most frames show the picture's colour. `flicker`: mean change of still ground in levels.
    """
    truth = drawn(world)
    levels = [psnr(*pair) for pair in zip(made, truth, strict=True)]
    return {
        "keyframes": mean(levels[index] for index in keyframes),
        "between": mean(levels[index] for index in range(FRAMES) if index not in keyframes),
        "saturation": saturation(made) - saturation(truth),
        "path": on_path(made, truth, world),
        "colour": float(judged(made, world)[0]),
        "flicker": flicker(made, still_ground(truth)),
    }


def saturation(frames: Frames) -> float:
    """The mean distance in levels between a pixel's highest and lowest channel."""
    return float(np.ptp(frames, axis=-1).mean())


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    return float(np.mean(list(values)))


def measure(pipeline: VideoPipeline, case: Case, requests: int) -> list[dict[str, float]]:
    """The figures of each request."""
    rows = []
    for number in range(requests):
        world = scene(HELD_OUT_SEED + number)
        prompt = (world if case.own_prompt else scene(HELD_OUT_SEED + requests + number)).caption
        pictures = drawn(world)
        keyframes = [Keyframe(index, pictures[index]) for index in case.keyframes]
        made = pipeline.generate(prompt, keyframes, "rgb", seed=number).frames
        rows.append(figures(made, world, case.keyframes))
    return rows


def summary(rows: list[dict[str, float]], trained: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The mean of each figure, and its mean difference to the scope of the training with the standard error of that."""
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        differences = values - np.array([row[name] for row in trained])
        found[name] = {
            "mean": float(values.mean()),
            "difference": float(differences.mean()),
            "error": float(differences.std(ddof=1) / len(rows) ** 0.5),
        }
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--threads", type=int, help="one per core by default")
    options = parser.parse_args()
    report = report_head(reports.command(), ("sparsectrl-lcm", "torch", "diffusers", "onnxruntime", "numpy"))
    report |= {"requests": options.requests, "path_pixels": PATH_PIXELS, "steps": 4, "cases": {}}
    trained: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for norms, bundle in bundles(Path(folder)):
            pipeline = VideoPipeline.load(bundle, backend="onnxruntime", threads=options.threads)
            for name, case in CASES.items():
                rows = measure(pipeline, case, options.requests)
                found = summary(rows, trained.setdefault(name, rows))
                report["cases"].setdefault(name, {})[norms] = found
                print(name, norms, {key: round(value["mean"], 3) for key, value in found.items()}, flush=True)
            pipeline.close()
    path = reports.results_file("temporal-norm")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
