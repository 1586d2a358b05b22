"""The page in headless Chromium, against a running server."""

import base64
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import APP, Server, missing, ports, started

ARTIFACTS = Path(os.environ.get("ARTIFACTS", Path(__file__).parents[2] / ".cache/artifacts"))
SCRIBBLE = Path(__file__).parents[2] / "demo/scribbles/frame_08.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or missing("chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    opened = context.new_page()
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda said: opened.problems.append(said.text) if said.type == "error" else None)
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    yield opened
    context.close()


def draw(page: Any, slot: int) -> None:
    canvas = page.locator(".keyframe canvas").nth(slot)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=5)
    page.mouse.up()


def frames(page: Any) -> list[int]:
    """The frames of the keyframes, from the number inputs and from the timeline."""
    numbers = [int(page.input_value(f"#keyframe_{slot}_index")) for slot in range(3)]
    handles = page.locator(".handle")
    assert [int(handles.nth(slot).get_attribute("aria-valuenow")) for slot in range(3)] == numbers
    places = handles.evaluate_all(
        "all => all.map(one => { const box = one.getBoundingClientRect(), all = one.parentNode.getBoundingClientRect();"
        " return Math.floor((box.x + box.width / 2 - all.x) / all.width * 16); })"
    )
    assert places == numbers
    return numbers


def give(page: Any, kind: str, selector: str) -> None:
    """Drops or pastes a picture."""
    page.evaluate(
        """([kind, selector, text]) => {
          const bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0)), data = new DataTransfer();
          data.items.add(new File([bytes], "a.png", { type: "image/png" }));
          const about = { bubbles: true, cancelable: true };
          const event = kind === "paste" ? new ClipboardEvent(kind, { ...about, clipboardData: data })
            : new DragEvent(kind, { ...about, dataTransfer: data });
          document.querySelector(selector).dispatchEvent(event);
        }""",
        [kind, selector, base64.b64encode(SCRIBBLE.read_bytes()).decode()],
    )


def test_from_scribbles_to_a_clip_that_plays(page: Any, demo: Server) -> None:
    page.goto(f"{demo.url}/#key={demo.key}")
    assert page.problems == []
    assert page.evaluate("location.hash") == ""
    draw(page, 0)
    page.set_input_files("#keyframe_1_image_url", SCRIBBLE)
    page.locator("#keyframe_1_index").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".handle.empty >> nth=0")
    assert page.locator(".handle:not(.empty)").count() == 2
    page.fill("#prompt", "a yellow star moves up over a navy ground")
    page.fill("#seed", "42")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#video:not([hidden])", timeout=60_000)
    playing = page.locator("#video").evaluate("video => new Promise(done => video.requestVideoFrameCallback(done))")
    assert playing is not None
    assert page.inner_text("#used-seed") == "42"
    assert page.get_attribute("#download", "href").startswith(f"{demo.url}/files/")
    page.click("#code summary")
    for language in ("python", "javascript"):
        code = page.inner_text(f"#{language}")
        assert (
            "a yellow star moves up over a navy ground" in code
            and '"keyframe_1_index": 7' in code
            and "/files/" in code
        )
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.screenshot(path=ARTIFACTS / "page.png", full_page=True)
    assert page.problems == []
    assert all(url.startswith((demo.url, "blob:", "data:")) for url in page.asked)
    run_as_shown(page.inner_text("#python"), demo)


def run_as_shown(code: str, server: Server) -> None:
    """Runs the Python snippet with its placeholders filled in, in a process without other settings."""
    shell = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# export")]
    said = "\n".join(shell).replace("FAL_KEY=...", f"FAL_KEY={server.key}").replace("DATA/", f"{server.data}/")
    command = f'{said}\nexec "$0" -c "$1"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "SSL_"))}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, code], env=clean, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"https://127.0.0.1:{server.tls_port}/files/"), done.stdout + done.stderr


def test_keyframes_are_placed_on_the_timeline(page: Any, stub: Server) -> None:
    page.goto(stub.url)
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
    page.goto(stub.url)
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


def test_progress_reload_and_cancel(page: Any, stub: Server) -> None:
    page.goto(f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", "slow 1")
    page.click("#submit")
    page.wait_for_selector("#state:has-text('denoise')")
    page.reload()
    page.wait_for_selector("#state:has-text('denoise')")
    page.wait_for_selector("#runners:has-text('runner: busy')")
    page.click("#cancel")
    page.wait_for_selector("#error:has-text('cancelled')")
    assert page.is_enabled("#submit")


@pytest.mark.parametrize("held", ["**/storage/upload/initiate*", f"**/queue/{APP}"])
def test_cancel_before_there_is_a_request(page: Any, stub: Server, held: str) -> None:
    """After a cancelled upload nothing is submitted. A request that is being submitted is cancelled right after it."""
    waiting: list[Any] = []
    page.route(held, lambda route: waiting.append(route))  # noqa: PLW0108  playwright marks what it is given
    page.goto(f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", "slow 1")
    draw(page, 0)
    page.click("#submit")
    while not waiting:
        page.wait_for_timeout(20)
    page.keyboard.press("Control+Enter")  # the first attempt still runs
    page.click("#cancel")
    page.wait_for_timeout(100)
    with contextlib.suppress(Exception):  # the page has aborted it
        waiting[0].continue_()
    page.wait_for_selector("#error:has-text('Request was cancelled')")
    assert page.is_enabled("#submit") and page.is_hidden("#cancel")
    submitted = [url for url in page.asked if url == f"{stub.url}/queue/{APP}"]
    cancelled = [url for url in page.asked if url.endswith("/cancel")]
    assert len(submitted) == len(cancelled) == (0 if "storage" in held else 1)


def test_errors_stand_at_their_fields(page: Any, stub: Server) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(stub.url)
    page.click("#submit")
    page.wait_for_selector("#prompt[aria-invalid=true]")
    assert f"{stub.url}/queue/{APP}" not in page.asked
    page.fill("#prompt", "a")
    page.click("#submit")
    page.wait_for_selector("#key[aria-invalid=true]")
    page.fill("#key", stub.key)
    page.fill("#seed", "abc")
    page.click("#submit")
    page.wait_for_selector("#seed[aria-invalid=true]")
    page.fill("#seed", "")
    page.fill("#num_inference_steps", "13")
    page.click("#submit")
    page.wait_for_selector("#num_inference_steps[aria-invalid=true]")
    assert page.inner_text("#error").startswith("Steps: ") and "12" in page.inner_text("#error")
    page.fill("#keyframe_0_index", "8")
    draw(page, 0)
    draw(page, 1)
    page.click("#submit")
    page.wait_for_selector("#error:has-text('frame 8')")
    assert [text for text in said if "DOM" in text or "assword" in text] == []


def test_a_seed_keeps_all_of_its_digits(page: Any, stub: Server) -> None:
    page.goto(f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", "a")
    page.fill("#seed", "18446744073709551615")
    page.click("#submit")
    page.wait_for_selector("#video:not([hidden])")
    assert page.inner_text("#used-seed") == "18446744073709551615"
    page.click("#code summary")
    assert '"seed": 18446744073709551615' in page.inner_text("#python")
    assert '"seed": "18446744073709551615"' in page.inner_text("#javascript")


def test_advanced_options_are_sent_if_they_were_changed(page: Any, stub: Server) -> None:
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url == stub.queue else None)
    page.goto(f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", "a")
    page.click("#submit")
    page.wait_for_selector("#video:not([hidden])")
    page.click("#advanced summary")
    page.fill("#conditioning_scale", "0.5")
    page.check("#prompt_weights")
    page.click("#submit")
    page.wait_for_selector("#cancel:not([hidden])")
    page.wait_for_selector("#video:not([hidden])")
    assert [given.get("sparsectrl_lcm") for given in sent] == [
        None,
        {"conditioning_scale": 0.5, "prompt_weights": True},
    ]
    page.click("#code summary")
    assert '"prompt_weights": True' in page.inner_text("#python")
    page.fill("#conditioning_scale", "11")
    page.click("#advanced summary")
    page.click("#submit")
    page.wait_for_selector("#conditioning_scale[aria-invalid=true]", state="visible")
    assert page.inner_text("#error").startswith("Strength of keyframes: ")


def test_a_page_of_another_origin_than_its_files(page: Any, tmp_path: Path) -> None:
    """The page is opened at 127.0.0.1, but its URLs are at localhost."""
    port = ports()[0]
    options = {"pipeline": "stub_pipeline:load", "anonymous": True, "public_url": f"http://localhost:{port}"}
    for server in started(tmp_path, port=port, **options):
        page.goto(server.url)
        draw(page, 0)
        page.fill("#prompt", "a")
        page.click("#submit")
        page.wait_for_selector("#video:not([hidden])")
        page.locator("#video").evaluate("video => new Promise(done => video.requestVideoFrameCallback(done))")
        assert page.get_attribute("#video", "src").startswith(f"http://localhost:{server.port}/")
        assert page.problems == []


def test_a_narrow_screen_has_no_horizontal_scroll(page: Any, stub: Server) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(stub.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_files_of_the_page(stub: Server) -> None:
    answer = httpx.get(stub.url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src" not in answer.headers["content-security-policy"]
    assert httpx.get(stub.url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert httpx.get(f"{stub.url}/page/nothing.js").status_code == 404
    assert httpx.get(f"{stub.url}/page/..%2fapp.py").status_code == 404
