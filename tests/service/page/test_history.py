"""What a reload of the page brings back, and the last clips of a key."""

from typing import Any

import httpx

from ..conftest import APP, Server
from .conftest import SCRIBBLE, draw, frames, reload, saved, visit

COLOURS = """all => all.map(one => {
  const { data } = one.getContext("2d").getImageData(0, 0, 512, 512);
  return data.reduce((sum, value, place) => sum + value * (place % 8191), 0);
})"""
"""A number for each drawing that changes with every pixel."""


def clip(page: Any, prompt: str, seed: str = "") -> None:
    """Makes a clip. The click hides the clip from before at once, so that a video that is seen is the new one."""
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    page.click("#submit")
    page.wait_for_selector("#video", state="visible")


def thumbnails(page: Any, count: int) -> Any:
    """The last clips: their names, newest first."""
    page.wait_for_selector(f"#clips li >> nth={count - 1}")
    return page.locator("#clips button").evaluate_all("all => all.map(one => one.title)")


def test_a_reload_keeps_form_drawings_and_clips(page: Any, stub: Server) -> None:
    key = stub.new_key()
    visit(page, f"{stub.url}/#key={key}")
    draw(page, 0)
    page.set_input_files("#keyframe_1_image_url", SCRIBBLE)
    page.fill("#keyframe_0_index", "3")
    page.check("input[value=rgb]", force=True)
    page.click("#advanced summary")
    page.fill("#clip_skip", "1")
    clip(page, "first", "5")
    page.fill("#keyframe_2_index", "14")
    clip(page, "second")
    page.fill("#prompt", "a third one, not made yet")
    drawings = page.locator(".drawing").evaluate_all(COLOURS)
    saved(page)
    reload(page)
    page.wait_for_selector("#video", state="visible")
    assert page.input_value("#prompt") == "a third one, not made yet"
    assert (page.input_value("#clip_skip"), page.is_checked("input[value=rgb]")) == ("1", True)
    assert page.locator(".drawing").evaluate_all(COLOURS) == drawings
    assert frames(page) == [3, 8, 14]
    names = thumbnails(page, 2)
    assert [name.split(",")[:2] for name in names] == [["second", " seed 1234"], ["first", " seed 5"]]
    page.locator("[data-do=undo]").nth(0).click()
    assert page.locator(".handle.empty").count() == 2, "strokes can be undone after a reload"
    page.locator("#clips button").nth(1).click()
    assert page.inner_text("#used-seed") == "5"
    assert page.locator("#clips button").nth(1).get_attribute("aria-pressed") == "true"
    page.click("#code summary")
    assert '"prompt": "first"' in page.inner_text("#python") and '"seed": 5' in page.inner_text("#python")
    assert page.problems == []


def test_the_next_user_of_a_browser_is_not_shown_what_others_made(page: Any, stub: Server) -> None:
    def shown() -> tuple[str, int, int]:
        """The prompt, the number of drawings, and the number of clips."""
        drawings = page.locator(".handle:not(.empty)").count()
        return page.input_value("#prompt"), drawings, page.locator("#clips li").count()

    def closed() -> None:
        """Opens the page as a new tab does, and waits until it has shown what it will."""
        page.evaluate("sessionStorage.clear()")
        visit(page, stub.url)
        page.wait_for_selector("#runners:not(:empty)")
        page.wait_for_timeout(300)

    key, other = stub.new_key(), stub.new_key()
    visit(page, stub.url)
    draw(page, 0)
    page.fill("#prompt", "a secret")
    saved(page)  # without a key
    page.fill("#key", key)
    clip(page, "a secret", "5")
    thumbnails(page, 1)
    closed()
    assert shown() == ("", 0, 0)
    page.fill("#key", other)
    page.locator("#key").blur()
    page.wait_for_timeout(300)
    assert shown() == ("", 0, 0)
    closed()
    page.fill("#key", key)
    page.locator("#key").blur()
    thumbnails(page, 1)
    assert shown() == ("a secret", 1, 1)
    assert page.problems == []


def test_the_code_has_the_seed_that_was_drawn(page: Any, stub: Server) -> None:
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    clip(page, "a random one")
    page.click("#code summary")
    for language in ("python", "javascript"):
        assert '"seed": 1234' in page.inner_text(f"#{language}")


def test_a_browser_that_keeps_nothing(page: Any, stub: Server) -> None:
    page.add_init_script(
        "indexedDB.open = () => { const asked = {}; setTimeout(() => asked.onerror()); return asked; }"
    )
    visit(page, f"{stub.url}/#key={stub.new_key()}")
    clip(page, "a", "5")
    assert (page.inner_text("#used-seed"), page.problems) == ("5", [])
    assert page.get_attribute("#download", "href").startswith(f"{stub.url}/files/")


def test_clips_are_those_of_the_key(stub: Server) -> None:
    """The newest dozen, without failures and without requests that keep nothing."""
    one, other = stub.new_key(), stub.new_key()

    def run(key: str, seed: int, prompt: str = "a", **headers: str) -> httpx.Response:
        given = {"prompt": prompt, "seed": seed}
        return httpx.post(f"{stub.url}/{APP}", json=given, headers={**stub.headers(key), **headers}, timeout=30)

    def listed(key: str) -> Any:
        answer = httpx.get(f"{stub.url}/page/clips.json", headers=stub.headers(key))
        assert answer.headers["cache-control"] == "no-store"
        return answer.raise_for_status().json()["clips"]

    run(other, 99)
    for seed in (*range(14), 2**64 - 1):
        made = run(one, seed).json()
    assert run(one, 77, "fail").status_code == 500
    run(one, 78, **{"X-Fal-Store-IO": "0"})
    clips = listed(one)
    assert [item["seed"] for item in clips] == [str(2**64 - 1), *(str(seed) for seed in range(13, 2, -1))]
    assert clips[0]["url"] == made["video"]["url"]
    assert [item["at"] for item in clips] == sorted((item["at"] for item in clips), reverse=True)
    assert [item["seed"] for item in listed(other)] == ["99"]
    assert httpx.get(f"{stub.url}/page/clips.json").status_code == 401
    away = httpx.get(f"{stub.url}/page/clips.json", headers={**stub.headers(one), "Host": "example.org:1"})
    assert away.json()["clips"][0]["url"].startswith("http://example.org:1/files/"), "on the host that the page has"
