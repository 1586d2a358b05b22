"""The scenes of the demo, and the measurements that evaluate clips of them."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sparsectrl_lcm.runtime.format.bundle import Bundle

DEMO = Path(__file__).parents[2] / "demo"
sys.path.append(str(DEMO))

import drawing  # noqa: E402
import evaluate  # noqa: E402
import measure  # noqa: E402
from world import (  # noqa: E402
    COLOURS,
    FRAMES,
    HELD_OUT_SEED,
    MOTIONS,
    SHAPES,
    SIZE,
    WORDS,
    Scene,
    Shape,
    is_held_out,
    scene,
)

SEEDS = range(400)


def combinations(world: Scene) -> list[tuple[str, str, str]]:
    return [(shape.colours[0], shape.kind, world.motion) for shape in world.shapes]


@cache
def worlds() -> list[Scene]:
    return [scene(seed) for seed in range(2000)]


def test_held_out_combinations_are_never_trained_on() -> None:
    trained = {combination for seed in SEEDS for combination in combinations(scene(seed))}
    held_out = {combinations(scene(HELD_OUT_SEED + seed))[0] for seed in SEEDS}
    assert not trained & held_out
    for place, names in enumerate((COLOURS, SHAPES, MOTIONS)):
        for some in (trained, held_out):
            assert {parts[place] for parts in some} == set(names)
    assert all(is_held_out(*parts) for parts in held_out)


def test_a_scene_depends_on_its_seed_alone() -> None:
    assert scene(7) == scene(7)
    assert scene(7) != scene(8)


def test_captions_say_what_is_drawn_in_known_words() -> None:
    for seed in SEEDS:
        world = scene(seed)
        words = world.caption.split()
        assert set(words) <= set(WORDS)
        for shape in world.shapes:
            assert {shape.kind, *shape.colours} <= set(words)
        assert set(world.grounds) <= set(words)


def test_the_demo_bundle_says_what_its_model_was_trained_for() -> None:
    trained = Bundle.load().manifest.trained_for
    assert trained is not None and trained.words is not None
    assert (trained.width, trained.height, trained.frames) == (SIZE, SIZE, FRAMES)
    assert (trained.min_keyframes, trained.max_keyframes) == (3, 3)
    assert list(trained.words) == sorted({word for world in worlds() for word in world.caption.split()})


@pytest.mark.parametrize("seed", range(5))
def test_frames_and_scribbles(seed: int) -> None:
    world = scene(seed)
    frames = drawing.clip(world)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    lines = drawing.scribble(world, 8)
    assert lines.shape == (SIZE, SIZE) and lines.max() == 255 and (lines == 0).mean() > 0.9
    outlines = measure.edges(measure.foreground(frames[8]))
    assert (lines[outlines] > 0).mean() > 0.8


def test_drawn_clips_have_perfect_figures() -> None:
    figures = evaluate.evaluate(lambda world, kind, seed: drawing.clip(world), 12)
    assert figures.scribble_f1 == figures.prompt == figures.on_path == 1
    assert figures.rgb_psnr > 60 and figures.flicker < 0.01


def test_other_clips_have_poor_figures() -> None:
    def another(world: Scene, kind: str | None, seed: int) -> np.ndarray:
        return drawing.clip(scene(seed + 1000))

    figures = evaluate.evaluate(another, 12)
    assert figures.scribble_f1 < 0.35 and figures.on_path < 0.3 and figures.rgb_psnr < 20 and figures.prompt < 0.3


def test_edges_within_two_pixels_are_met() -> None:
    frame = drawing.frame(scene(3), 0)
    for shift, met in ((1, True), (2, True), (5, False)):
        f1 = measure.edge_f1(np.roll(frame, shift, 1), frame)
        assert (f1 > 0.95) == met


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_told_apart_at_any_size_and_angle(kind: str) -> None:
    chosen = [world for world in worlds() if len(world.shapes) == 1 and world.shapes[0].kind == kind][:8]
    for world in chosen:
        for index in (0, FRAMES - 1):
            assert measure.kind_of(measure.foreground(drawing.frame(world, index))) == kind


def test_crosses_at_any_angle_are_no_squares() -> None:
    for degrees in range(0, 90, 5):
        angle = float(np.deg2rad(degrees))
        shape = Shape("cross", ("red", "red"), ((64.3, 63.6),) * 2, (15.0, 15.0), (angle, angle))
        world = Scene("moves", "", (shape,), ("black",))
        assert measure.kind_of(measure.foreground(drawing.frame(world, 0))) == "cross"


def test_two_shapes_are_told_apart_whatever_colours_their_rims_fade_through() -> None:
    for world in [world for world in worlds() if world.motion == "crosses"][:60]:
        found = measure.parts(drawing.frame(world, 0), world, 0)
        assert [measure.kind_of(mask) for mask in found] == [shape.kind for shape in world.shapes], world.caption


def test_flicker_is_that_of_the_ground() -> None:
    frames = drawing.clip(scene(0))
    ground = measure.still_ground(frames)
    assert measure.flicker(frames, ground) < 0.01
    shaken = frames.astype(int) + np.array([0, 6] * (FRAMES // 2))[:, None, None, None]
    assert measure.flicker(shaken.clip(0, 255).astype(np.uint8), ground) == pytest.approx(6, abs=0.1)
