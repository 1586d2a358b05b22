"""Requests of the page: from scribbles to a clip, progress, cancellation, errors and options."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest

from ..conftest import APP, Server, ports, started
from ..holds import Hold
from .conftest import ARTIFACTS, DESKTOP, PHONE, SCRIBBLE, draw, reload, until, visit


def test_from_scribbles_to_a_clip_that_plays(page: Any, demo: Server, tmp_path: Path) -> None:
    visit(page, f"{demo.url}/#key={demo.key}")
    assert page.problems == []
    assert page.evaluate("location.hash") == ""
    draw(page, 0)
    page.set_input_files("#keyframe_1_image_url", SCRIBBLE)
    page.locator("#keyframe_1_index").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".handle:not(.empty) >> nth=1")
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
    page.set_viewport_size(DESKTOP)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    for part in ("#result", "#python", "#javascript"):
        cut = "part => part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight"
        assert not page.locator(part).evaluate(cut), f"{part} is whole"
    page.screenshot(path=ARTIFACTS / "page.png", full_page=True)
    assert page.problems == []
    assert all(url.startswith((demo.url, "blob:", "data:")) for url in page.asked)
    run_as_shown(page.inner_text("#python"), demo, tmp_path)


def run_as_shown(code: str, server: Server, folder: Path) -> None:
    """Runs the Python snippet with its placeholders filled in, in a process without other settings."""
    shell = [line.removeprefix("# ") for line in code.splitlines() if line.startswith(("# cat", "# export"))]
    said = "\n".join(shell).replace("FAL_KEY=...", f"FAL_KEY={server.key}").replace("DATA/", f"{server.data}/")
    command = f'{said}\nexec "$0" -c "$1"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "SSL_"))}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, code],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(f"https://127.0.0.1:{server.tls_port}/files/"), done.stdout + done.stderr
    assert (folder / "trusted.pem").read_text() == Path(certifi.where()).read_text() + server.ca.read_text()


def test_progress_reload_and_cancel(page: Any, stub: Server, hold: Hold) -> None:
    visit(page, f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", hold.prompt)
    page.click("#submit")
    page.wait_for_selector("#state:has-text('denoise')")
    reload(page)
    page.wait_for_selector("#state:has-text('denoise')")
    page.wait_for_selector("#runners:has-text('runner: busy')")
    page.click("#cancel")
    page.wait_for_selector("#error:has-text('cancelled')")
    assert page.is_enabled("#submit")


@pytest.mark.parametrize("held", ["**/storage/upload/initiate*", f"**/queue/{APP}"])
def test_cancel_before_there_is_a_request(page: Any, stub: Server, held: str, hold: Hold) -> None:
    """After a cancelled upload nothing is submitted. A request that is being submitted is cancelled right after it."""
    waiting: list[Any] = []
    page.route(held, lambda route: waiting.append(route))  # noqa: PLW0108  playwright marks what it is given
    visit(page, f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", hold.prompt)
    draw(page, 0)
    page.click("#submit")
    until(page, lambda: bool(waiting))
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
    visit(page, stub.url)
    page.click("#submit")
    page.wait_for_selector("#prompt[aria-invalid=true]")
    assert f"{stub.url}/queue/{APP}" not in page.asked
    page.fill("#prompt", "a")
    page.click("#submit")
    for size in (PHONE, DESKTOP):
        page.set_viewport_size(size)
        page.locator("#submit").scroll_into_view_if_needed()
        page.click("#submit")
        page.wait_for_selector("#key[aria-invalid=true]")
        told, key = page.locator("#key-error").bounding_box(), page.locator("#key").bounding_box()
        assert key["y"] >= 0 and told["y"] + told["height"] <= size["height"], "the message can be seen"
        assert 0 <= told["y"] - key["y"] - key["height"] < 60, "it stands below the key"
        assert "first-key" in page.inner_text("#key-error") and page.is_hidden("#error")
    page.fill("#key", stub.key)
    page.fill("#seed", "abc")
    page.click("#submit")
    page.wait_for_selector("#seed[aria-invalid=true]")
    page.fill("#seed", "")
    page.fill("#num_inference_steps", "13")
    page.click("#submit")
    page.wait_for_selector("#num_inference_steps[aria-invalid=true]")
    assert page.is_hidden("#key-error")
    assert page.inner_text("#error").startswith("Steps: ") and "12" in page.inner_text("#error")
    page.fill("#keyframe_0_index", "8")
    draw(page, 0)
    draw(page, 1)
    page.click("#submit")
    page.wait_for_selector("#error:has-text('frame 8')")
    assert [text for text in said if "DOM" in text or "assword" in text] == []


def test_a_seed_keeps_all_of_its_digits(page: Any, stub: Server) -> None:
    visit(page, f"{stub.url}/#key={stub.key}")
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
    visit(page, f"{stub.url}/#key={stub.key}")
    page.fill("#prompt", "a")
    page.click("#submit")
    page.wait_for_selector("#video:not([hidden])")
    page.click("#advanced summary")
    page.fill("#conditioning_scale", "0.5")
    page.check("#prompt_weights")
    assert page.locator("#weights option").all_inner_texts() == ["its own", "anime"]
    page.select_option("#weights", "anime")
    page.click("#submit")  # hides the clip from before at once
    page.wait_for_selector("#video:not([hidden])")
    assert [given.get("sparsectrl_lcm") for given in sent] == [
        {"previews": True},
        {"conditioning_scale": 0.5, "prompt_weights": True, "weights": "anime", "previews": True},
    ]
    page.click("#code summary")
    assert '"prompt_weights": True' in page.inner_text("#python") and "previews" not in page.inner_text("#python")
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
        visit(page, server.url)
        draw(page, 0)
        page.fill("#prompt", "a")
        page.click("#submit")
        page.wait_for_selector("#video:not([hidden])")
        page.locator("#video").evaluate("video => new Promise(done => video.requestVideoFrameCallback(done))")
        assert page.get_attribute("#video", "src").startswith(f"http://localhost:{server.port}/")
        assert httpx.get(f"{server.url}/page/clips.json").json() == {"clips": []}, "those of others without a key"
        reload(page)
        page.wait_for_selector("#clips li")
        assert page.locator("#clips li").count() == 1, "its own, which the browser knows"
        assert page.problems == []


def test_files_of_the_page(stub: Server) -> None:
    answer = httpx.get(stub.url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src" not in answer.headers["content-security-policy"]
    assert httpx.get(stub.url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert httpx.get(f"{stub.url}/page/nothing.js").status_code == 404
    assert httpx.get(f"{stub.url}/page/..%2fapp.py").status_code == 404
