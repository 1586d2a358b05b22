"""The clip on the page: previews while it is made, its own pixels, the scrubber, and where a phone looks."""

from typing import Any

from ..conftest import Server
from ..holds import Hold
from .conftest import DESKTOP, PHONE, draw, until, visit


def test_a_preview_of_every_step(page: Any, stub: Server, hold: Hold) -> None:
    """Without them in the code that others copy, and not stored."""
    shown: list[str] = []
    page.expose_function("shown", lambda url: shown.append(url))  # noqa: PLW0108  playwright marks what it is given
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    page.evaluate(
        "new MutationObserver(() => shown(document.querySelector('#preview').src))"
        ".observe(document.querySelector('#preview'), { attributeFilter: ['src'] })"
    )
    page.fill("#prompt", hold.prompt)
    page.click("#submit")
    page.wait_for_selector("#preview", state="visible")
    assert page.is_hidden("#player")
    for step in range(1, 5):
        until(page, lambda step=step: len(shown) >= step)
        hold.let_go(1)
    page.wait_for_selector("#video", state="visible")
    assert page.is_hidden("#preview") and page.is_visible("#player")
    assert {url.partition(",")[0] for url in shown} == {"data:image/jpeg;base64"}
    assert page.problems == []


def test_a_clip_in_its_own_pixels_with_a_scrubber(page: Any, stub: Server) -> None:
    page.set_viewport_size(DESKTOP)
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    draw(page, 1)
    page.fill("#prompt", "a")
    page.click("#submit")
    page.wait_for_selector("#video", state="visible")
    page.wait_for_selector("#video.pixelated")
    size = page.locator("#video").evaluate(
        "one => [one.offsetWidth / one.videoWidth, one.offsetHeight / one.videoHeight]"
    )
    assert size[0] == size[1] == int(size[0]) > 1
    assert page.locator("#video").evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    page.click("#player button")
    assert page.locator("#video").evaluate("one => one.paused")
    assert page.get_attribute("#player button", "aria-label") == "Play"
    scrubber = page.locator("#player input")
    brightness = """video => new Promise(done => {
      const look = () => {
        const canvas = new OffscreenCanvas(64, 64), context = canvas.getContext("2d");
        context.drawImage(video, 0, 0);
        const blue = context.getImageData(0, 0, 64, 64).data.filter((_, place) => place % 4 === 2);
        done(blue.reduce((one, other) => one + other) / 4096);
      };
      if (video.seeking) video.addEventListener("seeked", look, { once: true }); else look();
    })"""
    for frame, dark in ((8, True), (7, False), (9, False)):  # the stub shows the keyframe, white on black, at its frame
        scrubber.fill(str(frame))
        assert (page.locator("#video").evaluate(brightness) < 60) == dark
        page.wait_for_selector(f"#player output:has-text('{frame} / 15')")
    scrubber.focus()
    page.keyboard.press("End")
    page.wait_for_selector("#player output:has-text('15 / 15')")
    assert page.problems == []


def test_a_phone_moves_to_progress_and_clip(page: Any, stub: Server, hold: Hold) -> None:
    page.set_viewport_size(PHONE)
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    page.fill("#prompt", hold.prompt)
    page.click("#submit")
    page.wait_for_selector("#state:has-text('denoise')")
    for part in ("#screen", "#progress", "#cancel"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"], part
    hold.let_go()
    page.wait_for_selector("#video", state="visible")
    box = page.locator("#player").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]
    made = page.get_attribute("#video", "src")
    page.fill("#prompt", "fail")
    page.click("#submit")
    page.wait_for_selector("#error", state="visible")
    box = page.locator("#error").bounding_box()
    assert -1 < box["y"] <= PHONE["height"] - box["height"], "the error can be seen: a scroll ends at whole pixels"
    page.wait_for_selector("#video", state="visible")
    assert page.get_attribute("#video", "src") == made, "the clip from before is there again"


def test_no_width_scrolls_sideways(page: Any, stub: Server) -> None:
    for width in (320, 360, PHONE["width"], 768, DESKTOP["width"]):
        page.set_viewport_size({"width": width, "height": 700})
        visit(page, stub.url)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        hidden = not page.locator("#keyframes").evaluate("row => row.scrollWidth <= row.clientWidth")
        assert page.is_visible(".swipe") == hidden, "a hint tells of keyframes at the side"
