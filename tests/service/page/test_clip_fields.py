"""The page of a server with `--extensions`: fields for the size, length and format of the clip."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.runtime.format.manifest import MAX_SIDE
from sparsectrl_lcm.runtime.request import MAX_FRAMES

from ..conftest import APP, Server, started
from .conftest import ARTIFACTS, DESKTOP, FINDINGS, PHONE, draw, frames, reload, saved, visit

PIXELS = 400_000


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a stub pipeline and extensions."""
    folder = tmp_path_factory.mktemp("extended")
    yield from started(folder, pipeline="stub_pipeline:load", extensions=True, clip_pixels=PIXELS)


@pytest.fixture
def opened(page: Any, extended: Server) -> Any:
    """The page with its advanced part open."""
    visit(page, f"{extended.url}/#key={extended.new_key()}")
    page.click("#advanced summary")
    page.wait_for_selector("#extensions", state="visible")
    return page


def set_frames(page: Any, count: int) -> None:
    page.fill("#num_frames", str(count))
    page.locator("#num_frames").blur()


def clip(page: Any, shown: str) -> Any:
    """Makes a clip, waits until it is shown, and returns the input that was sent."""
    page.fill("#prompt", "a")
    with page.expect_request(lambda request: request.method == "POST" and "/queue/" in request.url) as asked:
        page.click("#submit")
    page.wait_for_selector(shown, state="visible")
    return asked.value.post_data_json


def test_without_extensions_there_are_no_fields(page: Any, stub: Server) -> None:
    visit(page, stub.url)
    page.click("#advanced summary")
    assert page.is_visible("#clip_skip") and page.is_hidden("#extensions")


def test_limits_are_those_of_the_server(opened: Any, axe: str) -> None:
    told = opened.inner_text("#limits")
    for limit in (f"from 8 to {MAX_SIDE}, in multiples of 8", f"up to {MAX_FRAMES}", f"{PIXELS:,} pixels"):
        assert limit in told
    opened.evaluate(f"() => {{ {axe} }}")
    for size in (PHONE, DESKTOP):
        opened.set_viewport_size(size)
        assert opened.evaluate(FINDINGS) == []
        assert opened.evaluate("document.documentElement.scrollWidth") <= size["width"]
    opened.fill("#width", "1024")
    opened.fill("#height", "1024")
    opened.fill("#prompt", "a")
    opened.click("#submit")
    opened.wait_for_selector("#width[aria-invalid=true]")
    assert opened.inner_text("#error").startswith("Width: The clip would have 16777216 pixels")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_timeline_follows_the_number_of_frames(opened: Any, size: Any) -> None:
    """Keyframes keep their place in the clip, also through a clip that is too short for them."""
    opened.set_viewport_size(size)
    followed = {32: [0, 17, 31], 1: [0, 0, 0], 128: [0, 68, 127], 16: [0, 8, 15], 24: [0, 12, 23]}
    for count, expected in followed.items():
        set_frames(opened, count)
        assert frames(opened, count) == expected
        assert opened.locator(".cell").count() == count
        assert opened.locator(".cell:not(:empty)").count() <= 16
    draw(opened, 1)
    opened.locator(".handle").nth(1).focus()
    opened.keyboard.press("End")
    assert frames(opened, 24) == [0, 23, 23]
    opened.keyboard.press("ArrowLeft")
    track = opened.locator("#timeline").bounding_box()
    opened.mouse.click(track["x"] + track["width"] * 20.5 / 24, track["y"] + track["height"] - 6)
    assert frames(opened, 24) == [0, 20, 23]
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=ARTIFACTS / f"clip-fields-{size['width']}.png", full_page=True)
    assert opened.evaluate("document.documentElement.scrollWidth") <= size["width"]
    saved(opened)
    reload(opened)
    opened.wait_for_selector("#timeline .cell >> nth=23")
    assert frames(opened, 24) == [0, 20, 23]
    assert opened.problems == []


def test_the_clip_has_what_was_asked_for(opened: Any) -> None:
    beyond_fals = {"width", "height", "num_frames", "fps", "output_format"}
    assert beyond_fals.isdisjoint(clip(opened, "#video")), "what was not changed is not sent"
    set_frames(opened, 24)
    opened.fill("#fps", "12.5")
    opened.select_option("#output_format", "webm")
    draw(opened, 2)
    sent = clip(opened, "#player output:has-text('/ 23')")
    assert sent.items() >= {"num_frames": 24, "fps": 12.5, "output_format": "webm", "keyframe_2_index": 23}.items()
    assert opened.get_attribute("#download", "href").endswith(".webm")
    assert opened.locator("#video").evaluate("one => one.duration") == pytest.approx(24 / 12.5, abs=0.1)
    opened.locator("#player input").fill("23")
    opened.wait_for_selector("#player output:has-text('23 / 23')")
    opened.click("#code summary")
    assert '"fps": 12.5' in opened.inner_text("#python")
    assert opened.problems == []


def test_a_gif_is_shown_as_a_picture(opened: Any) -> None:
    opened.select_option("#output_format", "gif")
    clip(opened, "#picture")
    assert opened.is_hidden("#video") and opened.is_hidden("#player")
    opened.wait_for_function("document.querySelector('#picture').naturalWidth === 64")
    opened.wait_for_function("document.querySelector('#clips img').naturalWidth === 64")
    opened.select_option("#output_format", "mp4")
    clip(opened, "#video")
    assert opened.is_hidden("#picture")
    assert opened.problems == []


def test_the_example_has_its_own_number_of_frames(opened: Any) -> None:
    set_frames(opened, 32)
    opened.click("#example")
    opened.wait_for_selector(".handle:not(.empty) >> nth=2")
    assert frames(opened) == [0, 8, 15]
    assert (opened.input_value("#num_frames"), opened.get_attribute("#num_frames", "placeholder")) == ("", "16")


def test_the_scrubber_has_the_frames_of_a_clip_of_another_browser(page: Any, extended: Server) -> None:
    key = extended.new_key()
    for count in (24, 32):
        given = {"prompt": "a", "num_frames": count}
        httpx.post(f"{extended.url}/{APP}", json=given, headers=extended.headers(key), timeout=30).raise_for_status()
    visit(page, f"{extended.url}/#key={key}")
    page.wait_for_selector("#player output:has-text('/ 31')")
    page.locator("#clips button").nth(1).click()
    page.wait_for_selector("#player output:has-text('/ 23')")
    page.locator("#player input").fill("23")
    page.wait_for_selector("#player output:has-text('23 / 23')")
    assert page.problems == []
