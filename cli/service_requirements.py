"""Shared by `serve` and `keys`: their checks, hints to each other, and database errors as one line."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..runtime.errors import BackendError, SparseCtrlLcmError, first_line

NEEDS = (
    "alembic",
    "cryptography",
    "fastapi",
    "fsspec",
    "httpcore",
    "httptools",
    "httpx",
    "prometheus_client",
    "sqlalchemy",
    "uvicorn",
)
"""Modules of the service extra."""


def need_service(command: str) -> None:
    """Checks that the service can run here.

    Raises:
        SparseCtrlLcmError: the system is Windows, or the service extra is not installed.
    """
    if sys.platform == "win32":
        raise SparseCtrlLcmError("", f"{command} needs Linux or macOS", "on Windows run it in WSL or in a container")
    if missing := [name for name in NEEDS if not find_spec(name)]:
        remedy = "run: pip install 'sparsectrl-lcm[service]'"
        raise SparseCtrlLcmError("", f"{command} needs {', '.join(missing)}", remedy)


def keys_command(action: str, data: Path, database: str | None) -> str:
    """Returns a command of `keys` for the database of a server, whose password it hides."""
    words = ["sparsectrl-lcm", "keys", action, "--data", str(data)]
    if database is not None:
        words += ["--database", _without_password(database)]
    return shlex.join(words)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turns the error of a database that cannot be reached or written into a BackendError of one line."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        remedy = "check that it exists and can be written"
        raise BackendError("", f"database {_without_password(url)}: {reason}", remedy) from None


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)
