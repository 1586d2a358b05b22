"""Keyframes on the page: drawing, pictures, the timeline and the example."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ..conftest import Server
from .conftest import draw, frames, give, visit

DEMO = Path(__file__).parents[3] / "demo"


def test_keyframes_are_placed_on_the_timeline(page: Any, stub: Server) -> None:
    visit(page, stub.url)
    assert frames(page) == [0, 8, 15]
    track = page.locator("#timeline").bounding_box()

    def cell(frame: int) -> tuple[float, float]:
        return track["x"] + track["width"] * (frame + 0.5) / 16, track["y"] + track["height"] - 8

    box = page.locator(".handle").nth(0).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(*cell(4), steps=4)
    page.mouse.up()
    assert frames(page) == [4, 8, 15]
    page.mouse.click(*cell(5))  # moves the keyframe that was moved last
    assert frames(page) == [5, 8, 15]
    page.locator("#keyframe_2_index").focus()
    page.keyboard.press("Tab")
    page.locator(".handle").nth(1).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert frames(page) == [5, 10, 15]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    page.locator(".handle").nth(2).focus()
    page.keyboard.press("PageDown")
    assert frames(page) == [5, 0, 11]
    page.fill("#keyframe_0_index", "11")
    assert frames(page) == [11, 0, 11]
    assert page.locator(".handle.clash").count() == 0
    draw(page, 0)
    draw(page, 2)
    assert page.locator(".handle.clash").count() == 2
    assert page.problems == []


def test_pictures_are_dropped_and_pasted(page: Any, stub: Server) -> None:
    visit(page, stub.url)
    for kind, selector, filled in (
        ("drop", ".keyframe:nth-child(2)", [1]),
        ("paste", "body", [0, 1]),
        ("drop", "header", [0, 1, 2]),
    ):
        give(page, kind, selector)
        page.wait_for_selector(f".handle:not(.empty) >> nth={len(filled) - 1}")
        empty = page.locator(".handle").evaluate_all("all => all.map(one => one.classList.contains('empty'))")
        assert [slot for slot in range(3) if not empty[slot]] == filled
    page.locator("[data-do=clear]").nth(1).click()
    assert page.locator(".handle.empty").count() == 1
    assert page.problems == []


def pixels(page: Any, slot: int, *places: tuple[int, int]) -> list[int]:
    """The red of some points of a drawing, which has 512 of them on each side."""
    return list(
        page.evaluate(
            """([slot, places]) => {
              const context = document.querySelectorAll(".drawing")[slot].getContext("2d");
              return places.map(([x, y]) => context.getImageData(x, y, 1, 1).data[0]);
            }""",
            [slot, places],
        )
    )


def line(page: Any, slot: int, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws between points of a drawing, given as fractions of its sides."""
    box = page.locator(".drawing").nth(slot).bounding_box()
    for move, (x, y) in ((page.mouse.down, start), (page.mouse.up, end)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        move()


def test_brush_eraser_and_undo(page: Any, stub: Server) -> None:
    visit(page, stub.url)
    page.locator(".drawing").nth(0).scroll_into_view_if_needed()
    line(page, 0, (0.25, 0.5), (0.75, 0.5))
    middle, near = (256, 256), (256, 256 + 20)
    assert pixels(page, 0, middle, near) == [255, 0]
    page.fill("#brush", "60")
    assert page.inner_text("#brush-size") == "60"
    line(page, 0, (0.25, 0.5), (0.75, 0.5))
    assert pixels(page, 0, near) == [255]
    page.click("#tools >> text=Erase")
    line(page, 0, (0.5, 0.25), (0.5, 0.75))
    assert pixels(page, 0, middle, (150, 256)) == [0, 255]
    for expected in ([255, 255], [255, 0], [0, 0]):
        page.keyboard.press("Control+z")
        assert pixels(page, 0, middle, near) == expected
    assert page.locator(".handle.empty").count() == 3
    line(page, 0, (0.5, 0.25), (0.5, 0.75))
    assert page.locator(".handle.empty").count() == 3, "an eraser draws nothing"
    page.locator("[data-do=undo]").nth(0).click()
    page.click("#tools >> text=Draw")
    line(page, 0, (0.25, 0.5), (0.75, 0.5))
    page.locator("[data-do=clear]").nth(0).click()
    assert pixels(page, 0, middle) == [0]
    page.locator("[data-do=undo]").nth(0).click()
    assert pixels(page, 0, middle) == [255], "clearing can be undone"
    assert page.problems == []


def test_the_onion_skin_shows_the_neighbours_in_time(page: Any, stub: Server) -> None:
    def skins() -> Any:
        """For each keyframe, whether it shows a keyframe before it in orange, and one after it in blue."""
        return page.locator(".skin").evaluate_all(
            """all => all.map(one => {
              const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height), found = [false, false];
              for (let place = 0; place < data.length; place += 4) {
                found[0] ||= data[place] > data[place + 2];
                found[1] ||= data[place] < data[place + 2];
              }
              return found;
            })"""
        )

    visit(page, stub.url)
    assert page.locator(".skin").nth(0).is_hidden()
    page.check("#onion")
    line(page, 0, (0.2, 0.3), (0.8, 0.3))
    line(page, 2, (0.2, 0.7), (0.8, 0.7))
    assert skins() == [[False, True], [True, True], [True, False]]
    page.fill("#keyframe_0_index", "12")  # now the first drawing lies between the empty one and the last
    assert skins() == [[False, True], [False, True], [True, False]]
    assert pixels(page, 1, (256, 154), (256, 358)) == [0, 0], "the skin is no part of the drawing"
    page.uncheck("#onion")
    assert page.locator(".skin").nth(0).is_hidden()
    assert page.problems == []


def test_the_example_is_that_of_the_demo(page: Any, stub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyframes, prompt and seed. What was drawn before comes back with undo."""
    monkeypatch.syspath_prepend(DEMO)
    sent = runpy.run_path(str(DEMO / "run.py"))["request"]()
    visit(page, stub.url)
    draw(page, 0)
    before = pixels(page, 0, (256, 256))
    page.click("#example")
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    assert (page.input_value("#prompt"), page.input_value("#seed")) == (sent.prompt, str(sent.seed))
    assert frames(page) == [keyframe.index for keyframe in sent.keyframes]
    for slot, keyframe in enumerate(sent.keyframes):
        expected = np.asarray(Image.open(keyframe.image).convert("L"))
        places = [(x, y) for x in range(16, 512, 16) for y in range(16, 512, 16)]
        assert pixels(page, slot, *places) == [int(expected[y, x]) for x, y in places]
    page.locator("[data-do=undo]").nth(0).click()
    assert pixels(page, 0, (256, 256)) == before
    assert page.problems == []
