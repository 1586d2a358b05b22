"""Skip tests that need a program which is not installed."""

import os
from typing import NoReturn

import pytest


def missing(program: str) -> NoReturn:
    """Skips the test if the program is not installed; in CI, fails it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{program} is not installed")
    pytest.skip(f"{program} is not installed")
