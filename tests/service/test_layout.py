"""The structure of the service, and its behaviour on systems that it does not support."""

import ast
import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.service.http.middleware.request_id import RequestId
from sparsectrl_lcm.service.http.middleware.unexpected_errors import UnexpectedErrors

SERVICE = Path(__file__).parents[2] / "service"
ROOMS = ("store", "protocol", "auth", "objects", "runner", "network", "http", "queue", "routes")
"""The folders of the service, in order: each may import those before it."""
BASE = {"settings", "clock", "metrics", "json_logs", "components", "synced_files"}
"""Files beside the folders that every folder may import. The other files put the folders together."""
POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog")


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports; relative imports stay as they are written."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def parts_imported(path: Path, *, for_types: bool = True) -> set[str]:
    """The folders of the service, and files beside them, that a file imports. Without its own folder."""
    here = path.relative_to(SERVICE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(here):
            continue
        if for_types or node not in typing_only:
            above = here[: len(here) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*above, *name.split("."))[0] for name in names}
    return found - {here[0]}


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in SERVICE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_folders_import_one_way(room: str) -> None:
    allowed = BASE | set(ROOMS[: ROOMS.index(room)])
    files = sorted((SERVICE / room).rglob("*.py"))
    assert {path.name: parts_imported(path) - allowed for path in files if parts_imported(path) - allowed} == {}


@pytest.mark.parametrize("name", sorted(BASE))
def test_what_every_folder_imports_is_below_them_all(name: str) -> None:
    """`components` names what is in the folders, but only as types."""
    assert parts_imported(SERVICE / f"{name}.py", for_types=False) <= BASE


def test_routes_import_no_routes() -> None:
    names = {path.stem for path in (SERVICE / "routes").glob("*.py")}
    for path in (SERVICE / "routes").glob("*.py"):
        assert not {module for module in modules_of(path) if module in {".", *(f".{name}" for name in names)}}, path


def test_routes_reach_the_store_and_credentials_only_through_their_homes() -> None:
    for path in (SERVICE / "routes").glob("*.py"):
        text = path.read_text()
        assert "service.store" not in text and "keyring" not in text and "Authorization" not in text, path


def test_the_event_loop_has_one_way_to_the_store() -> None:
    for path in SERVICE.rglob("*.py"):
        assert "to_thread(service.store" not in path.read_text(), path


def test_an_input_is_parsed_in_one_place() -> None:
    users = {path.name for path in SERVICE.rglob("*.py") if "parse_input(" in path.read_text()}
    assert users == {"input_parsing.py", "submission.py"}


@pytest.mark.parametrize("arguments", [["serve", "--data", "x"], ["keys", "list", "--data", "x"]])
def test_windows_is_told_in_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(arguments) == 2
    remedy = "on Windows run it in WSL or in a container"
    assert capfd.readouterr() == ("", f"error: {arguments[0]} needs Linux or macOS; {remedy}\n")


def test_the_command_line_needs_no_posix_module() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({POSIX_ONLY})); import sparsectrl_lcm.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_named_like_the_standard_library_hide_none_of_it() -> None:
    code = (
        "import sparsectrl_lcm.service.server, sparsectrl_lcm.service.runner.process_main, http, queue\n"
        "print(hasattr(http, 'HTTPStatus'), hasattr(queue, 'SimpleQueue'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_an_unexpected_error_is_json_with_the_usual_headers() -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("a surprise")

    async def ask() -> httpx.Response:
        app = RequestId(UnexpectedErrors(fails), endpoints=["a/b"])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/a/b/requests/one/status")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["x-fal-request-id"]) == (500, "one")
    assert answer.json() == {"detail": "Internal Server Error", "error_type": "internal_error"}


def test_an_error_after_the_first_byte_sends_no_second_head() -> None:
    sent: list[str] = []

    async def fails(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a surprise")

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope: Any = {"type": "http", "method": "GET", "path": "/a", "headers": []}
    asyncio.run(UnexpectedErrors(fails)(scope, SimpleNamespace(), send))
    assert sent == ["http.response.start"]
