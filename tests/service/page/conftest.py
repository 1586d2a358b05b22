"""The page in headless Chromium. All tests of this folder share the servers and the browser."""

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import APP, Server, demo_server, manifest_alone, missing, stub_server
from ..waiting import SECONDS

ARTIFACTS = Path(os.environ.get("ARTIFACTS", Path(__file__).parents[3] / ".cache/artifacts"))
SCRIBBLE = Path(__file__).parents[3] / "demo/scribbles/frame_08.png"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FINDINGS = """async () => (await axe.run()).violations.map(found =>
  [found.id, ...found.nodes.map(node => `${node.target} ${node.failureSummary}`)].join("\\n"))"""


OTHER = "me/portraits"
"""A further endpoint of `stub`, with clips of 8 frames."""


@pytest.fixture(scope="package")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    short = manifest_alone(tmp_path_factory.mktemp("bundles") / "8-frames", frames=8)
    yield from stub_server(tmp_path_factory, endpoints={APP: None, OTHER: short})


demo = pytest.fixture(scope="package")(demo_server)


@pytest.fixture(scope="package")
def axe(modules: Path) -> str:
    return (modules / "node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture(scope="package")
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
    context.set_default_timeout(SECONDS * 1000)
    opened = context.new_page()
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda said: opened.problems.append(said.text) if said.type == "error" else None)
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    yield opened
    context.close()


def visit(page: Any, url: str) -> None:
    """Opens the page, and waits for its scripts: a busy Chromium may run modules after the page has loaded."""
    page.goto(url)
    _scripts(page)


def reload(page: Any) -> None:
    page.reload()
    _scripts(page)


def _scripts(page: Any) -> None:
    page.wait_for_selector(".keyframe >> nth=2")


def until(page: Any, condition: Callable[[], bool]) -> None:
    """Waits for what the page or its server tells this process."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def saved(page: Any) -> None:
    """Waits until the page has saved what was changed: its timer for that runs out before a later one of its own."""
    page.evaluate(
        """async () => {
          await new Promise(done => setTimeout(done, 500));
          const asked = indexedDB.open("sparsectrl-lcm");
          await new Promise(done => { asked.onsuccess = done; });
          const after = asked.result.transaction("page");
          after.objectStore("page").count();
          await new Promise(done => { after.oncomplete = done; });
          asked.result.close();
        }"""
    )


def draw(page: Any, slot: int) -> None:
    canvas = page.locator(".drawing").nth(slot)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=5)
    page.mouse.up()


def frames(page: Any, count: int = 16) -> list[int]:
    """The frames of the keyframes, from the number inputs and from the timeline of so many frames."""
    numbers = [int(page.input_value(f"#keyframe_{slot}_index")) for slot in range(3)]
    handles = page.locator(".handle")
    assert [int(handles.nth(slot).get_attribute("aria-valuenow")) for slot in range(3)] == numbers
    places = handles.evaluate_all(
        "all => all.map(one => { const box = one.getBoundingClientRect(), all = one.parentNode.getBoundingClientRect();"
        f" return Math.floor((box.x + box.width / 2 - all.x) / all.width * {count}); }})"
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
