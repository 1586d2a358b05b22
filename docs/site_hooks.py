"""Hooks of mkdocs: pages and results that lie outside docs/ become part of the site, so that links work on both.

A notebook becomes a page with its outputs.
"""

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "readme.md",  # mkdocs would make README.md the home page
    "docs/notebook.ipynb": "notebook.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "demo/trained/README.md": "demo/trained/README.md",
    "benchmarks/results/README.md": "benchmarks/results/README.md",
}
"""Where pages of the repository lie on the site."""
RESULTS = "benchmarks/results"
SAMPLES = "deploy"
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, the results and the samples."""
    from mkdocs.structure.files import File

    for name, place in PAGES.items():
        path = ROOT / name
        given = {"content": notebook_page(path)} if path.suffix == ".ipynb" else {"abs_src_path": str(path)}
        files.append(File.generated(config, place, **given))
    for path in (ROOT / RESULTS).iterdir():
        if path.suffix in (".json", ".png"):
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    for path in (ROOT / SAMPLES).iterdir():
        files.append(File.generated(config, f"{SAMPLES}/{path.name}", abs_src_path=str(path)))
    return files


def notebook_page(path: Path) -> str:
    """Returns a notebook as Markdown: its text, its code, and the outputs that it has."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += map(_output, cell.get("outputs", ()))
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return "".join(data["text/html"])
    if "image/png" in data:
        return f'<img alt="Output of the code above" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links between files of the repository to their places on the site, where docs/ is the root."""
    place = page.file.src_uri
    names = {site: name for name, site in PAGES.items()}
    folder = str(PurePosixPath(names.get(place, f"docs/{place}")).parent)

    def lead(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target:
            return match[0]
        wanted = normpath(f"{folder}/{target}")
        wanted = PAGES.get(wanted, wanted.removeprefix("docs/"))
        return before + relpath(wanted, str(PurePosixPath(place).parent)) + after

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)
