"""Evaluates the demo model through the runtime, on requests that training never saw.

    python demo/evaluate.py [--bundle DIR] [--backend NAME] [--precision NAME] [--requests 200] [--json FILE]

`--undistilled FOLDER`, the folder of a training from scratch, also evaluates the model before its distillation, with 25
DDIM steps. `precisions.py` compares the frames of precisions.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from drawing import clip, scribble
from measure import centre, edge_f1, flicker, parts, psnr, shows, still_ground
from numpy.typing import NDArray
from rich.progress import track
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.machine import report_head
from world import FRAMES, HELD_OUT_SEED, KEYFRAMES, Scene, scene

JUDGED = (0, 4, 8, 12, 15)
PATH_PIXELS = 6.0
Frames = NDArray[np.uint8]
Make = Callable[[Scene, str | None, int], Frames]
"""Makes a clip from a scene, a kind of keyframes (or None) and a seed."""
PACKAGES = ("sparsectrl-lcm", "numpy", "openvino", "onnxruntime", "torch", "diffusers")


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over requests.

    Attributes:
        scribble_f1: F1 of edges at the keyframes, given scribbles.
        free_f1: the same without keyframes.
        rgb_psnr: PSNR at the keyframes, given pictures, in dB.
        prompt: share of requests with the requested colour and shape.
        colour, kind: shares of requests with the requested colour, and with the requested shape.
        on_path: share of frames whose shape is within `PATH_PIXELS` of the path through the keyframes.
        flicker: mean change of still ground from frame to frame, in levels.
        prompt_by_motion: `prompt` for each motion.
    """

    scribble_f1: float
    free_f1: float
    rgb_psnr: float
    prompt: float
    colour: float
    kind: float
    on_path: float
    flicker: float
    prompt_by_motion: dict[str, float] = field(default_factory=dict)


MEANS = tuple(field.name for field in fields(Figures) if field.name != "prompt_by_motion")


def with_runtime(pipeline: VideoPipeline) -> Make:
    """Returns a maker of clips that uses the runtime."""

    def make(world: Scene, kind: str | None, seed: int) -> Frames:
        truth = clip(world)
        pictures = {"scribble": lambda index: scribble(world, index), "rgb": lambda index: truth[index]}
        keyframes = [Keyframe(index, pictures[kind](index)) for index in KEYFRAMES] if kind else []
        return pipeline.generate(world.caption, keyframes, controlnet=kind or "scribble", seed=seed).frames

    return make


def evaluate(make: Make, requests: int) -> Figures:
    """Evaluates `requests` held-out scenes, each with scribbles, with pictures, and with the prompt alone."""
    rows, motions = [], []
    for number in track(range(requests), "requests"):
        world = scene(HELD_OUT_SEED + number)
        truth = clip(world)
        drawn, painted, free = (make(world, kind, number) for kind in ("scribble", "rgb", None))
        motions.append(world.motion)
        rows.append(
            Figures(
                free_f1=mean(edge_f1(free[index], truth[index]) for index in KEYFRAMES),
                rgb_psnr=mean(psnr(painted[index], truth[index]) for index in KEYFRAMES),
                **with_scribbles(drawn, world),
            )
        )
    means = {name: mean(getattr(row, name) for row in rows) for name in MEANS}
    by_motion = {
        motion: mean(row.prompt for row, its in zip(rows, motions, strict=True) if its == motion)
        for motion in sorted(set(motions))
    }
    return Figures(**means, prompt_by_motion=by_motion)


def with_scribbles(drawn: Frames, world: Scene) -> dict[str, float]:
    """Returns the figures of one clip that was made with scribbles, by their names in `Figures`."""
    truth = clip(world)
    colour, kind = judged(drawn, world)
    return {
        "scribble_f1": mean(edge_f1(drawn[index], truth[index]) for index in KEYFRAMES),
        "prompt": float(colour and kind),
        "colour": float(colour),
        "kind": float(kind),
        "on_path": on_path(drawn, truth, world),
        "flicker": flicker(drawn, still_ground(truth)),
    }


def mean(values: Iterable[float]) -> float:
    """Returns the arithmetic mean."""
    return float(np.mean(list(values)))


def judged(frames: Frames, world: Scene) -> tuple[bool, bool]:
    """Whether most of the judged frames show the requested colours, and the requested shapes."""
    colours, kinds = [], []
    for index in JUDGED if len(world.shapes) == 1 else (0, FRAMES - 1):  # two shapes hide each other in between
        for colour, kind in shows(frames[index], world, index):
            colours.append(colour)
            kinds.append(kind)
    return mean(colours) > 0.5, mean(kinds) > 0.5


def on_path(frames: Frames, truth: Frames, world: Scene) -> float:
    """Returns the share of shapes, over all frames, within `PATH_PIXELS` of the path through the keyframes."""
    known = {index: [centre(mask) for mask in parts(truth[index], world, index)] for index in KEYFRAMES}
    near = []
    for index in range(FRAMES):
        for place, mask in enumerate(parts(frames[index], world, index)):
            points = [(at, known[at][place]) for at in KEYFRAMES if known[at][place] is not None]
            wanted = [
                np.interp(index, [at for at, _ in points], [point[axis] for _, point in points]) for axis in (0, 1)
            ]
            found = centre(mask)
            near.append(found is not None and float(np.linalg.norm(found - wanted)) <= PATH_PIXELS)
    return mean(near)


def main() -> None:
    """Prints the figures, and writes them to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--undistilled", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = VideoPipeline.load(options.bundle, backend=options.backend, precision=options.precision)
    makers = {"4 steps": with_runtime(pipeline)}
    if options.undistilled:
        from undistilled import with_ddim

        makers["25 steps, undistilled"] = with_ddim(options.undistilled)
    report = report_head(f"python {' '.join(sys.argv)}", PACKAGES)
    report |= {"backend": pipeline.backend, "precision": pipeline.precision, "requests": options.requests}
    for name, make in makers.items():
        report[name] = asdict(evaluate(make, options.requests))
        if options.json:  # after each maker, in case the next is interrupted
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
