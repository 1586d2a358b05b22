"""Many requests in a row: the next one runs while the caller uses a clip, and the keyframes of the one after are read.

A GPU stays busy while clips are encoded. On a CPU, encoding fills the moments in which a request leaves cores idle.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from .errors import DeviceLost
from .output.clip import Clip
from .progress import OnProgress, Progress
from .request import ClipRequest
from .request_warnings import OnWarning, RequestWarning, warnings_to

if TYPE_CHECKING:
    from .checked_request import CheckedRequest

AHEAD = 2
"""Requests that are taken before the caller has asked for their results: one runs, one has its keyframes read."""

OnManyProgress = Callable[[int, Progress], Any]
"""Called with the position of a request, from 0, and its progress; returning False cancels this request."""
OnManyWarning = Callable[[int, RequestWarning], None]
"""Called with the position of a request, from 0, and a warning of it."""


@dataclass(frozen=True, slots=True, eq=False)
class RequestResult:
    """The clip of a request, or the error that it ended with; the other one is None.

    Attributes:
        request: the request.
        clip: its clip.
        error: why there is no clip: InvalidRequest, Cancelled, BackendError, or any other exception.
    """

    request: ClipRequest
    clip: Clip | None
    error: Exception | None

    def get(self) -> Clip:
        """Returns the clip, or raises the error."""
        if self.error is not None:
            raise self.error
        assert self.clip is not None
        return self.clip


def run_many(
    check: Callable[[ClipRequest], "CheckedRequest"],
    make: Callable[["CheckedRequest", OnProgress], Clip],
    requests: Iterable[ClipRequest],
    on_progress: OnManyProgress | None,
    on_warning: OnManyWarning | None = None,
) -> Generator[RequestResult, None, None]:
    """Yields the results of requests, in order; see `VideoPipeline.generate_many`.

    Args:
        check: checks a request and reads its keyframes; called on one thread.
        make: makes a checked request's clip; called on another thread.
        requests: taken on the caller's thread.
        on_progress: called on the thread of `make`.
        on_warning: called on both threads; None logs the warnings.
    """
    closed = Event()

    def receiver(index: int) -> OnWarning | None:
        return None if on_warning is None else partial(on_warning, index)

    def run_check(index: int, request: ClipRequest) -> "CheckedRequest":
        with warnings_to(receiver(index)):
            return check(request)

    def run(index: int, checked: "Future[CheckedRequest]") -> Clip:
        def report(progress: Progress) -> Any:
            return not closed.is_set() and (on_progress is None or on_progress(index, progress))

        with warnings_to(receiver(index)):
            return make(checked.result(), report)

    source = enumerate(requests)
    taken: deque[tuple[ClipRequest, Future[Clip]]] = deque()
    failure: Exception | None = None
    checker, maker = ThreadPoolExecutor(1, "keyframes"), ThreadPoolExecutor(1, "clips")
    try:
        while True:
            try:
                index, request = next(source)
            except StopIteration:
                break
            except Exception as error:  # raised after the results of the requests before it
                failure = error
                break
            taken.append((request, maker.submit(run, index, checker.submit(run_check, index, request))))
            if len(taken) > AHEAD:
                yield _result(*taken.popleft())
        while taken:
            yield _result(*taken.popleft())
        if failure is not None:
            raise failure
    finally:
        closed.set()
        maker.shutdown(cancel_futures=True)
        checker.shutdown(cancel_futures=True)


def _result(request: ClipRequest, clip: "Future[Clip]") -> RequestResult:
    try:
        return RequestResult(request, clip.result(), None)
    except DeviceLost:
        raise
    except Exception as error:
        return RequestResult(request, None, error)
