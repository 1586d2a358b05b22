"""The documents as data: their links, anchors and code blocks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "demo/trained/README.md",
    ROOT / "benchmarks/results/README.md",
)
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page.

    Attributes:
        page: the page's path from the root.
        line: number of its first line.
        language: the language after the fence.
        code: the text between the fences.
        reason: why it cannot run here, from the comment `<!-- not run: REASON -->` above it; None if it can.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> Iterator[Block]:
    """Every code block of every page."""
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            yield Block(name_of(page), line, match["language"], match["code"], match["reason"])


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _BLOCK.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, each as a list of words."""
    pending = ""
    for line in block.code.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quoted text continues on the next line
            pending += "\n"
            continue
        pending = ""
        if words:
            yield words
    assert not pending, f"{block}: the last command is incomplete"


def tables(text: str) -> Iterator[list[list[str]]]:
    """The cells of each table, without the line below the header."""
    for match in re.finditer(r"(?:^\|.*\|\n)+", text, re.M):
        rows = [row for row in match[0].splitlines() if not re.fullmatch(r"[|\-]+", row)]
        yield [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
