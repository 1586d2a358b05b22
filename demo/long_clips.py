"""Measures clips of 64 frames on the demo model: are shapes on the path through the keyframes, and are seams seen?

    python demo/long_clips.py [--bundle DIR] [--backend NAME] [--requests 4] [--json FILE]

`straight` scenes are held-out scenes of the demo's world at a quarter of their speed. In `winding` scenes a shape turns
at each keyframe, which no clip of the training does and no caption tells. Other ways to make the same clips are
measured beside the runtime's own: see `VARIANTS`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
from drawing import frame, scribble
from evaluate import PATH_PIXELS, Frames, mean
from measure import centre, edge_f1, parts
from numpy.typing import NDArray
from rich.progress import track
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline, checked_request
from sparsectrl_lcm.runtime.cpu import executor
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator
from sparsectrl_lcm.runtime.loop.windows import Windows, default_overlap, overlapping_windows, spread_windows
from sparsectrl_lcm.runtime.machine import peak_bytes, report_head
from world import FRAMES, HELD_OUT_SEED, SIZE, Scene, Shape, State, scene

LENGTH, WINDOW = 64, FRAMES
"""Frames of a clip, and of a context window."""
KEYFRAMES = (0, 16, 32, 48, 63)
MEMORY_LENGTHS = (32, 64, 128)
PACKAGES = ("sparsectrl-lcm", "numpy", "openvino", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Slow:
    """A shape whose motion takes `LENGTH` frames."""

    shape: Shape
    kind: str

    def at(self, index: int) -> State:
        """Returns its state in a frame."""
        return self.shape.at(index * (FRAMES - 1) / (LENGTH - 1))


@dataclass(frozen=True, slots=True)
class Winding:
    """A shape that goes straight from keyframe to keyframe."""

    kind: str
    first: State
    centres: NDArray[np.float64]

    def at(self, index: int) -> State:
        """Returns its state in a frame."""
        x, y = (float(np.interp(index, KEYFRAMES, self.centres[:, axis])) for axis in (0, 1))
        return replace(self.first, centre=(x, y))


def straight(number: int) -> Scene:
    """Returns a held-out scene at a quarter of its speed."""
    world = scene(HELD_OUT_SEED + number)
    return replace(world, shapes=tuple(Slow(shape, shape.kind) for shape in world.shapes))  # type: ignore[arg-type]


def winding(number: int) -> Scene:
    """Returns a scene whose shape turns at each keyframe."""
    rng = np.random.default_rng(number)
    seeds = (HELD_OUT_SEED + number + 1000 * attempt for attempt in range(1000))
    world = next(world for world in map(scene, seeds) if world.motion == "moves")
    centres = [rng.uniform(36, SIZE - 36, 2)]
    while len(centres) < len(KEYFRAMES):
        place = rng.uniform(30, SIZE - 30, 2)
        if 20 < np.linalg.norm(place - centres[-1]) < 50:
            centres.append(place)
    shape = world.shapes[0]
    return replace(world, shapes=(Winding(shape.kind, shape.at(0), np.array(centres)),))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a clip, or their means over clips.

    Attributes:
        on_path: share of shapes, over all frames, within `PATH_PIXELS` of the path through the keyframes.
        keyframe_f1: F1 of edges at the keyframes.
        jump_at_seams: largest mean change from one frame to the next in levels, where a window begins or ends.
        jump_within: the same everywhere else.
        ratio: the first by the second.
    """

    on_path: float
    keyframe_f1: float
    jump_at_seams: float
    jump_within: float
    ratio: float


def measured(frames: Frames, world: Scene) -> Figures:
    """Returns the figures of a clip of a scene."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))  # [F - 1]
    edges = seams(overlapping_windows(LENGTH, WINDOW, default_overlap(WINDOW)))
    at_seams, within = float(changes[edges].max()), float(np.delete(changes, edges).max())
    return Figures(
        on_path=on_path(frames, world),
        keyframe_f1=mean(edge_f1(frames[index], frame(world, index)) for index in KEYFRAMES),
        jump_at_seams=at_seams,
        jump_within=within,
        ratio=at_seams / within,
    )


def seams(windows: Windows) -> list[int]:
    """Returns the frames whose next frame belongs to other windows."""
    members = [[index in window.frames for window in windows] for index in range(LENGTH)]
    return [index for index in range(LENGTH - 1) if members[index] != members[index + 1]]


def on_path(frames: Frames, world: Scene) -> float:
    """Returns the share of shapes, over all frames, near the path through the keyframes."""
    known = {index: [centre(mask) for mask in parts(frame(world, index), world, index)] for index in KEYFRAMES}
    near = []
    for index in range(LENGTH):
        for place, mask in enumerate(parts(frames[index], world, index)):
            points = [(at, known[at][place]) for at in KEYFRAMES if known[at][place] is not None]
            wanted = [np.interp(index, [at for at, _ in points], [each[axis] for _, each in points]) for axis in (0, 1)]
            found = centre(mask)
            near.append(found is not None and float(np.linalg.norm(found - wanted)) <= PATH_PIXELS)
    return mean(near)


def overlapping_only(frames: int, length: int, overlap: int, keyframes: Sequence[int], steps: int) -> list[Windows]:
    """Overlapping windows of consecutive frames at every step, as FreeNoise and AnimateDiff-Evolved have them."""
    return [overlapping_windows(frames, length, overlap)] * steps


def spread_only(frames: int, length: int, overlap: int, keyframes: Sequence[int], steps: int) -> list[Windows]:
    """Spread windows at every step."""
    return [spread_windows(frames, length, overlap, keyframes)] * steps


class FreeNoise(TorchGenerator):
    """Shuffles the initial noise of a window into the next one, four frames at a time, as diffusers' FreeNoise does."""

    every_step = False

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._order = np.random.default_rng(seed)
        self._drawn = 0

    def randn(self, shape: tuple[int, ...], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Standard normal values [1, 4, F, h, w], of which each frame takes one of 16 frames earlier."""
        values = super().randn(shape, out)
        self._drawn += 1
        if self._drawn == 1 or self.every_step:
            for start in range(WINDOW, shape[2], 4):
                order = start - WINDOW + self._order.permutation(4)
                part = slice(start, min(start + 4, shape[2]))
                values[:, :, part] = values[:, :, order[: part.stop - start]]
        return values


class FreeNoiseAtEveryStep(FreeNoise):
    """Does the same to the noise that later steps add."""

    every_step = True


VARIANTS: dict[str, dict[str, object]] = {
    "runtime": {},
    "overlapping windows only": {"windows": overlapping_only},
    "spread windows only": {"windows": spread_only},
    "FreeNoise": {"noise": FreeNoise},
    "FreeNoise at every step": {"noise": FreeNoiseAtEveryStep},
    "overlap 4": {"overlap": 4},
}


@contextmanager
def changed(windows: object = None, noise: object = None) -> Iterator[None]:
    """Replaces the runtime's windows or noise."""
    with (
        mock.patch.object(checked_request, "windows_of_steps", windows or checked_request.windows_of_steps),
        mock.patch.object(executor, "TorchGenerator", noise or executor.TorchGenerator),
    ):
        yield


def clip(pipeline: VideoPipeline, world: Scene, seed: int, overlap: int | None = None) -> Frames:
    """Makes the clip of a scene from its scribbles at `KEYFRAMES`."""
    keyframes = [Keyframe(index, scribble(world, index)) for index in KEYFRAMES]
    return pipeline.generate(
        world.caption, keyframes, seed=seed, num_frames=LENGTH, context_length=WINDOW, context_overlap=overlap
    ).frames


def evaluate(pipeline: VideoPipeline, requests: int, overlap: int | None = None) -> dict[str, dict[str, float]]:
    """Returns the mean figures of both kinds of scenes, the lowest share on the path, and the highest ratio."""
    report = {}
    for make in (straight, winding):
        rows = []
        for number in track(range(requests), make.__name__):
            world = make(number)
            rows.append(measured(clip(pipeline, world, number, overlap), world))
        means = {item.name: round(mean(getattr(row, item.name) for row in rows), 3) for item in fields(Figures)}
        worst = {"lowest_on_path": min(row.on_path for row in rows), "highest_ratio": max(row.ratio for row in rows)}
        report[make.__name__] = means | {name: round(value, 3) for name, value in worst.items()}
    return report


def memory(bundle: Path | None, backend: str, frames: int) -> None:
    """Prints the seconds of a clip and the peak of this process in megabytes, with no residuals kept."""
    pipeline = VideoPipeline.load(bundle, backend, kept_bytes=0)
    world = straight(0)
    keyframes = [Keyframe(index, scribble(world, index)) for index in (0, 31)]
    options = {"context_length": WINDOW, "num_inference_steps": 4}
    pipeline.generate(world.caption, keyframes, num_frames=2 * WINDOW, **options)
    start = perf_counter()
    pipeline.generate(world.caption, keyframes, num_frames=frames, **options)
    print(json.dumps({"seconds": round(perf_counter() - start, 2), "peak_mb": round((peak_bytes() or 0) / 1e6)}))


def main() -> None:
    """Prints the figures, and writes them to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--memory", type=int, metavar="FRAMES", help="only measure memory, for a number of frames")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.memory:
        memory(options.bundle, options.backend, options.memory)
        return
    report = report_head(f"python {' '.join(sys.argv)}", PACKAGES)
    report |= {"frames": LENGTH, "window": WINDOW, "keyframes": KEYFRAMES, "requests": options.requests}
    for name in options.variant or VARIANTS:
        settings = dict(VARIANTS[name])
        overlap: int | None = settings.pop("overlap", None)  # type: ignore[assignment]
        pipeline = VideoPipeline.load(options.bundle, options.backend)
        report |= {"backend": pipeline.backend, "precision": pipeline.precision}
        with changed(**settings):
            report[name] = evaluate(pipeline, options.requests, overlap)
        if options.json:  # after each variant, in case the next is interrupted
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    given = [f"--backend={options.backend}", *([f"--bundle={options.bundle}"] if options.bundle else [])]
    report["lengths"] = {
        str(frames): json.loads(
            subprocess.run(
                [sys.executable, __file__, *given, f"--memory={frames}"], check=True, capture_output=True
            ).stdout
        )
        for frames in MEMORY_LENGTHS
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
