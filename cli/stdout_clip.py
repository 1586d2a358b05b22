"""`generate -o -`: the clip goes to stdout."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..runtime.errors import InvalidRequest, OutputError, reason_of
from ..runtime.output.writers import ENDINGS

STDOUT = Path("-")
"""The output that means stdout."""


@contextmanager
def clip_for_stdout(format: str) -> Iterator[Path]:
    """A file to write, since most formats need to seek; it goes to stdout when the block succeeds.

    Raises:
        InvalidRequest: the format is not known.
        OutputError: stdout is a terminal, closed or full.
    """
    ending = f".{format.lower()}"
    if ending not in ENDINGS:
        allowed = ", ".join(name.removeprefix(".") for name in ENDINGS)
        raise InvalidRequest("format", f"{format!r} is not allowed", f"give {allowed}")
    if sys.stdout.isatty():
        raise OutputError("output", "stdout is a terminal", "send it to a file or program, or name a file")
    with TemporaryDirectory(prefix="sparsectrl-lcm-") as folder:
        path = Path(folder) / f"clip{ending}"
        yield path
        try:
            with path.open("rb") as clip, os.fdopen(os.dup(sys.stdout.fileno()), "wb") as stdout:
                shutil.copyfileobj(clip, stdout)
        except BrokenPipeError:  # its reader has enough; the command line ends without a word
            raise
        except OSError as error:
            raise OutputError("output", f"stdout cannot be written: {reason_of(error)}") from None
