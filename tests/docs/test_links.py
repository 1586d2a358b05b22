"""Links point to existing files and headings, and paths in the text exist."""

import fnmatch
import pkgutil
import re
from contextlib import suppress
from importlib.util import find_spec

import pytest
from documents import PAGES, ROOT, anchors, links, name_of, prose

FOLDERS = (
    "benchmarks",
    "cli",
    "demo",
    "deploy",
    "docs",
    "engine",
    "export",
    "runtime",
    "service",
    "sparsectrl_lcm",
    "tests",
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_text_exist(page) -> None:
    if page.name == "CHANGELOG.md":
        return  # it also has paths of earlier releases
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


def test_every_results_file_is_listed() -> None:
    folder = ROOT / "benchmarks/results"
    files = [path.name for path in folder.glob("*.json")]
    listed = {
        name: fnmatch.filter(files, name) for name in re.findall(r"`(\d{4}-[^`]+\.json)`", prose(folder / "README.md"))
    }
    assert [name for name, found in listed.items() if not found] == []
    assert set(files) - {name for found in listed.values() for name in found} == set()


def test_classes_are_in_the_files_that_the_architecture_names() -> None:
    page = prose(ROOT / "docs/architecture.md")
    found = re.findall(r"((?:`[A-Z]\w+`(?:, | and | ))+)(?:\(|in )`([\w/]+\.py)`", page)
    places = {name: path for names, path in found for name in re.findall(r"`(\w+)`", names) if name != "ValueError"}
    assert len(places) >= 8
    for name, path in places.items():
        assert re.search(rf"^class {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{name}: {path}"


def test_every_page_is_in_the_index_and_on_the_site() -> None:
    index, site = (ROOT / "docs/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")):
        assert page.name == "index.md" or f"]({page.name})" in index
        assert f": {page.stem}.md\n" in site


def test_moved_names_are_where_the_changelog_says() -> None:
    rows = re.findall(
        r"^\| `sparsectrl_lcm\..+ \| (`sparsectrl_lcm\..+) \|$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert rows
    moved = [name for row in rows for name in re.findall(r"`(sparsectrl_lcm\.[\w.]+)`", row)]
    assert [name for name in moved if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a name is that of a module, or of something in one."""
    with suppress(ModuleNotFoundError):  # raised if the name before the last dot is no package
        if find_spec(name) is not None:
            return True
    with suppress(AttributeError, ImportError):
        pkgutil.resolve_name(name)
        return True
    return False
