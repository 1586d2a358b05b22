"""Code blocks of the documents run if they can run here. The others use options, targets and files that exist."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from command_options import check_options
from documents import ROOT, Block, blocks, commands

from sparsectrl_lcm import cli

BLOCKS = list(blocks())
SHELL = [block for block in BLOCKS if block.language == "sh"]
OTHERS = {"check-wheel-contents", "cp", "curl", "export", "git", "npm", "pg_dump", "pre-commit", "ray", "scribble()"}
OTHERS |= {"cat", "createdb", "createuser", "docker", "echo", "sqlite3", "systemctl", "twine", "useradd"}
"""Programs whose arguments are not checked."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a clone, and an exported bundle, for which the demo bundle is used."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("demo", "runtime"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "runtime/demo_bundle", folder / "my-bundle", ignore=shutil.ignore_patterns("engines"))
    return folder


@pytest.fixture(autouse=True)
def _in_the_clone(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs blocks at the root of the clone."""
    monkeypatch.chdir(clone)
    for check in ("openvino.compare", "onnxruntime_cuda.check_precision"):  # slow, and tested elsewhere
        monkeypatch.setattr(f"sparsectrl_lcm.engine.{check}", lambda *_: {})


@pytest.fixture(scope="module")
def done() -> list[list[str]]:
    """Commands that have already run, since pages repeat some slow ones."""
    return []


@pytest.mark.parametrize("block", [block for block in SHELL if block.reason is None], ids=str)
def test_commands_run(block: Block, done: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        if words in done:
            continue
        if words[0] == "cp":
            subprocess.run(words, check=True)
        else:
            assert words[0] == "sparsectrl-lcm", f"{words[0]} does not run here: add a comment with the reason"
            assert cli.run(words[1:]) == 0, capfd.readouterr().err
        done.append(words)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python" and block.reason is None], ids=str
)
def test_python_runs(block: Block) -> None:
    exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_name_what_exists(block: Block) -> None:
    for words in commands(block):
        program = Path(words[0]).name
        if program == "sparsectrl-lcm":
            check_options(words[1:])
        elif program == "make":
            for target in words[1:]:
                assert "=" in target or re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
        elif program == "pip":
            check_extras(words)
        elif program.startswith("python"):
            check_script(words[1:])
        else:
            assert program in OTHERS, f"{block}: the test does not know {program}"


def check_extras(words: list[str]) -> None:
    """Checks that the project has the extras that a command installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.match(r"\.\[(.+)\]", word):
            assert set(match[1].split(",")) <= extras.keys(), word


def check_script(words: list[str]) -> None:
    """Checks that a script exists and has the options, and that the marker and files of a pytest run exist."""
    if words[0] == "-m" and words[1] == "pytest":
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        for word, following in zip(words[2:], [*words[3:], ""], strict=True):
            if word == "-m":
                assert any(marker.startswith(f"{following}:") for marker in markers)
            elif word.startswith("tests/"):
                assert (ROOT / word).exists(), word
            elif word.startswith("--"):
                assert word in (ROOT / "tests/conftest.py").read_text(), word
    elif words[0] == "-m":
        assert words[1] in ("build", "venv", "pip", "sparsectrl_lcm"), words
    else:
        file = ROOT / words[0]
        script = (file / "__main__.py" if file.is_dir() else file).read_text()
        for word in words[1:]:
            assert not word.startswith("-") or f'"{word}"' in script, f"{words[0]} {word}"


def test_other_blocks_are_well_formed() -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "mermaid":
            assert block.code.startswith("flowchart "), block
        elif block.language == "python":
            compile(block.code, str(block), "exec")
        elif block.language == "yaml":
            assert yaml.safe_load(block.code), block
        else:
            assert block.language == "sh" or (block.language == "js" and block.reason), f"{block}: {block.language!r}"


def test_every_comment_belongs_to_a_block() -> None:
    pages = {block.page for block in BLOCKS}
    written = sum(len(re.findall("^<!-- not run:", (ROOT / page).read_text(), re.M)) for page in pages)
    assert written == sum(block.reason is not None for block in BLOCKS)
