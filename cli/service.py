"""What `serve` and `keys` have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ..runtime.errors import BackendError, SparseCtrlLcmError, first_line

NEEDS = (
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


def need_service_extra(command: str) -> None:
    """Raises SparseCtrlLcmError where the service extra is not installed."""
    if missing := [name for name in NEEDS if not find_spec(name)]:
        raise SparseCtrlLcmError(f"{command} needs {', '.join(missing)}; run: pip install 'sparsectrl-lcm[service]'")


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Makes one line of a database that cannot be reached or written."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        shown = make_url(url).render_as_string(hide_password=True)
        raise BackendError(f"database {shown}: {reason}; see that it is there and can be written") from None
