"""Warnings of what requests ask for: logged, or given to a caller who has many requests."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

request_log = logging.getLogger("sparsectrl_lcm.request")
"""Warns of what a request asks for. It says nothing of how the request runs."""


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """A doubt about a request whose clip is made all the same.

    Attributes:
        kind: a few words that are the same for requests with the same doubt, such as `odd scribble`.
        text: the sentence, with the request's own values.
    """

    kind: str
    text: str


OnWarning = Callable[[RequestWarning], None]
_receiver: ContextVar[OnWarning | None] = ContextVar("receiver", default=None)


def warn(kind: str, text: str, log: Callable[[str], object] = request_log.warning) -> None:
    """Gives a warning to the receiver of this thread; without one it is logged.

    Args:
        kind, text: as in `RequestWarning`.
        log: logs `text`, or leaves it out if it was logged before.
    """
    receiver = _receiver.get()
    if receiver is None:
        log(text)
    else:
        receiver(RequestWarning(kind, text))


@contextmanager
def warnings_to(receiver: OnWarning | None) -> Iterator[None]:
    """In this block, on this thread, `receiver` gets every warning, and none is logged; None logs them."""
    token = _receiver.set(receiver)
    try:
        yield
    finally:
        _receiver.reset(token)
