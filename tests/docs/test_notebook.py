"""docs/notebook.ipynb was executed as it is committed, and its cells give the same kinds of outputs again."""

import ast
import asyncio
import builtins
import inspect
import io
import json
import re
import runpy
import sys
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pytest
from documents import ROOT, anchors, links, prose

NOTEBOOK = ROOT / "docs/notebook.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
MOST_BYTES = 300_000
MACHINE = re.compile(r"(?<![\w.])/(home|opt|private|root|tmp|Users|usr|var|work)/|site-packages")
"""A path of the machine that executed it."""
SHOWN_AS = {"text/html": "_repr_html_", "image/png": "_repr_png_", "text/plain": "__repr__"}
"""How a notebook shows an object: the first kind that it has, and the method that gives it."""


def committed_kinds(cell: dict[str, Any]) -> list[str]:
    """The kinds of a cell's outputs: streams, which may come in several parts, and how objects are shown."""
    streams = dict.fromkeys(output["name"] for output in cell["outputs"] if "name" in output)
    data = (output["data"] for output in cell["outputs"] if "name" not in output)  # errors have none
    return [*streams, *(next(kind for kind in SHOWN_AS if kind in one) for one in data)]


def test_it_is_committed_as_it_was_executed() -> None:
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    assert {kind for cell in CELLS for kind in committed_kinds(cell)} == {"stdout", *SHOWN_AS}
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert MACHINE.findall(NOTEBOOK.read_text()) == []


def test_it_is_a_page_of_the_site(tmp_path: Path) -> None:
    page = tmp_path / "notebook.md"
    page.write_text(runpy.run_path(str(ROOT / "docs/site_hooks.py"))["notebook_page"](NOTEBOOK))
    for link in links(page):
        path, _, anchor = link.partition("#")
        assert not anchor or anchor in anchors(ROOT / "docs" / path), link
    outputs = Counter(kind for cell in CELLS for kind in committed_kinds(cell))
    text = prose(page)
    assert (text.count("<video "), text.count("<img ")) == (outputs["text/html"], outputs["image/png"])


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On one event loop, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    monkeypatch.setattr(sys, "displayhook", lambda value: None if value is None else shown.append(value))
    monkeypatch.setattr(builtins, "display", lambda *values: shown.extend(values), raising=False)
    names: dict[str, Any] = {"__name__": "__main__"}

    async def run(source: str, place: str) -> list[str]:
        """Runs a cell, and returns the kinds of its outputs."""
        shown.clear()
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(source, place, "exec", flags | ast.PyCF_ONLY_AST)
        done = eval(compile(ast.Interactive(tree.body), place, "single", flags), names)
        if inspect.isawaitable(done):
            await done
        printed = ["stdout"] if capsys.readouterr().out else []
        return printed + [next(kind for kind, method in SHOWN_AS.items() if hasattr(value, method)) for value in shown]

    async def run_all() -> None:
        for cell in CELLS:
            place = f"cell {cell['execution_count']}"
            assert await run("".join(cell["source"]), place) == committed_kinds(cell), place

    asyncio.run(run_all())
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".mp4", ".webm", ".gif", ".webp", ".png"}
    video = re.search('src="data:video/mp4;base64,([^"]+)"', names["clip"]._repr_html_())
    assert video is not None
    with av.open(io.BytesIO(b64decode(video[1]))) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 16
