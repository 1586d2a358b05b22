"""The page of a server with several endpoints: which one it calls, and of which one a clip is."""

from typing import Any

import httpx

from ..conftest import APP, Server
from ..holds import Hold
from .conftest import OTHER, draw, frames, reload, saved, visit
from .test_history import clip, thumbnails


def test_the_chosen_endpoint_is_called_and_named(page: Any, stub: Server) -> None:
    key = stub.new_key()
    visit(page, f"{stub.url}/#key={key}")
    assert page.locator("#endpoint option").all_inner_texts() == [APP, OTHER]
    clip(page, "first")
    page.select_option("#endpoint", OTHER)
    assert page.is_hidden("#weights-choice"), "only the first endpoint has weights"
    clip(page, "second")
    page.click("#code summary")
    assert f'"{OTHER}",' in page.inner_text("#python")
    assert f'fal.subscribe("{OTHER}"' in page.inner_text("#javascript")
    made = httpx.get(f"{stub.url}/page/clips.json", headers=stub.headers(key)).json()["clips"]
    assert [each["endpoint"] for each in made] == [OTHER, APP]
    assert [name.split(", ")[2] for name in thumbnails(page, 2)] == [OTHER, APP]
    saved(page)
    reload(page)
    page.wait_for_selector("#video", state="visible")
    assert page.input_value("#endpoint") == OTHER
    page.locator("#clips button").nth(1).click()
    page.click("#code summary")
    assert f'"{APP}",' in page.inner_text("#python"), "of the clip, not of the choice"
    assert page.problems == []


def test_a_reload_goes_on_with_the_request_of_its_endpoint(page: Any, stub: Server, hold: Hold) -> None:
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    page.select_option("#endpoint", OTHER)
    page.fill("#prompt", hold.prompt)
    page.click("#submit")
    page.wait_for_selector("#state:has-text('denoise')")
    page.select_option("#endpoint", APP)
    saved(page)
    reload(page)
    page.wait_for_selector("#state:has-text('denoise')")
    hold.let_go()
    page.wait_for_selector("#video", state="visible")
    assert page.input_value("#endpoint") == APP
    page.click("#code summary")
    assert f'"{OTHER}",' in page.inner_text("#python")
    assert page.problems == []


def test_the_chosen_endpoint_has_its_keyframes_and_timeline(page: Any, stub: Server) -> None:
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    needed = "The model was trained with 3 keyframes: with other numbers its clips may be poor."
    assert page.inner_text("#needed-keyframes") == needed
    assert (page.locator(".cell").count(), frames(page)) == (16, [0, 8, 15])
    page.select_option("#endpoint", OTHER)
    assert page.inner_text("#needed-keyframes") == "Keyframes are optional."
    assert (page.locator(".cell").count(), frames(page, 8)) == (8, [0, 4, 7])
    draw(page, 2)
    clip(page, "short")
    assert page.locator("#video").evaluate("one => one.duration") == 1
    page.locator("#player input").fill("7")
    page.wait_for_selector("#player output:has-text('7 / 7')")
    page.locator("[data-do=clear]").nth(2).click()
    page.click("#example")
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    assert frames(page, 8) == [0, 4, 7]
    page.select_option("#endpoint", APP)
    assert frames(page) == [0, 9, 15], "keyframes keep their place in the clip"
    assert page.problems == []


def test_a_reload_moves_keyframes_into_clips_that_became_shorter(page: Any, stub: Server) -> None:
    def shorter(route: Any) -> None:
        known = route.fetch().json()
        for each in known["endpoints"]:
            each["frames"] = 2
        route.fulfill(json=known)

    visit(page, f"{stub.url}/#key={stub.new_key()}")
    page.click("#example")
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    saved(page)
    page.route("**/page/about.json", shorter)
    reload(page)
    page.wait_for_selector(".handle:not(.empty) >> nth=2")
    assert [page.input_value(f"#keyframe_{slot}_index") for slot in range(3)] == ["0", "1", "1"]
    page.click("#example")
    page.wait_for_selector(".handle.empty")
    assert page.locator(".handle:not(.empty)").count() == 2, "a clip of two frames has no place for a third keyframe"
    assert page.problems == []
