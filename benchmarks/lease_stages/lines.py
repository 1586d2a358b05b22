"""Files with an object of JSON a line, and errors that end a program in one line. Needs only the standard library."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Unusable(Exception):
    """Something given on the command line cannot be used. The message says what and why."""


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends the program with one line and code 2 if a file cannot be read or written, or is of no use."""
    try:
        yield
    except Unusable as error:
        text = str(error)
    except OSError as error:
        text = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)
    else:
        return
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def read_objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file, and how many of its lines could not be read; blank lines are not counted.

    A killed program or a full disk cuts a line, and another program may have written after it.
    """
    found: list[dict[str, Any]] = []
    unreadable = 0
    for text in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            unreadable += 1
    return found, unreadable


def ends_within_a_line(path: Path) -> bool:
    """Whether the last line of a file has no end, so that the next one has to begin with it."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
