"""Bytecode of a fresh clone. Test workers start together, and each would compile every file for itself."""

import compileall
import re
import sys
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

FOLDERS = ["batch", "benchmarks", "cli", "demo", "engine", "export", "runtime", "service", "sparsectrl_lcm", "tests"]
TEST_FILE = re.compile(r"/(test_\w+|conftest)\.py$")
"""Files whose asserts pytest rewrites."""


def write_bytecode(root: Path, config: pytest.Config) -> None:
    """Writes the bytecode that is missing: Python's of the package and the tests' helpers, pytest's of the tests."""
    state = config.stash.get(rewrite.assertstate_key, None)
    if sys.dont_write_bytecode or state is None:
        return
    for folder in FOLDERS:
        compileall.compile_dir(root / folder, quiet=2, rx=TEST_FILE)
    for path in (root / "tests").rglob("*.py"):
        if TEST_FILE.search(path.as_posix()):
            bytecode = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
            if rewrite._read_pyc(path, bytecode) is None:
                bytecode.parent.mkdir(exist_ok=True)
                source, code = rewrite._rewrite_test(path, config)
                rewrite._write_pyc(state, code, source, bytecode)
