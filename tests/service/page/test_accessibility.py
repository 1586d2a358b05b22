"""The page for everybody: axe-core finds nothing, and the keyboard is enough."""

from typing import Any

import pytest

from ..conftest import Server
from .conftest import DESKTOP, FINDINGS, PHONE, SCRIBBLE, visit


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(page: Any, stub: Server, axe: str, size: Any) -> None:
    """On the empty page, and with drawings, a clip, its code, the advanced options and an error, in both schemes."""
    page.set_viewport_size(size)
    visit(page, f"{stub.url}/#key={stub.key}")
    page.wait_for_selector("#runners:has-text('runner')")
    page.evaluate(f"() => {{ {axe} }}")
    assert page.evaluate(FINDINGS) == []
    page.click("#example")
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    page.check("#onion")
    page.click("#submit")
    page.wait_for_selector("#video", state="visible")
    page.wait_for_selector("#clips", state="visible")
    page.click("#code summary")
    page.click("#advanced summary")
    page.fill("#seed", "abc")
    page.click("#submit")
    page.wait_for_selector("#error", state="visible")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(FINDINGS) == []
    assert page.evaluate("async () => (await axe.run()).passes.length") > 20
    assert page.problems == []


def test_a_clip_without_a_mouse(page: Any, stub: Server) -> None:
    """Every control can be reached with Tab, in order, and shows that it has the focus."""
    visit(page, f"{stub.url}/#key={stub.new_key()}")

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            found = page.evaluate("one => document.activeElement.matches(one)", selector)
            if found:
                return
        raise AssertionError(f"{selector} cannot be reached")

    tab_to("#example")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    tab_to("[name=tool]")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[name=tool][value=erase]")
    tab_to("#brush")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#brush-size") == "9"
    tab_to("[data-do=clear]")
    page.keyboard.press("Enter")
    assert page.locator(".handle.empty").count() == 1
    page.set_input_files("#keyframe_0_image_url", SCRIBBLE)
    tab_to(".handle")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#keyframe_0_index") == "1"
    tab_to("#prompt")
    page.keyboard.type(", slowly")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#video", state="visible")
    for selector in ("#player button", "#player input", "#download", "#reuse", "#clips button", "#code summary"):
        tab_to(selector)
    page.keyboard.press("Enter")
    assert ", slowly" in page.inner_text("#python")
    assert page.problems == []
