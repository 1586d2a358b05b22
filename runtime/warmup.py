"""What the first request of a size would load, compile or capture, done before it."""

from contextlib import suppress
from dataclasses import replace
from itertools import product

from .backend_interface import Executor
from .backends import BACKENDS
from .errors import Cancelled
from .example_requests import plain_requests
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .progress import OnPreview, Progress
from .request import ClipRequest
from .request_checks import check_request

GPU_PROMPTS = ("a", "a", "b", "b")
"""A new prompt and one that was there before take other CUDA graphs. Each is proved once more after other captures."""


def warm_up(bundle: Bundle, executor: Executor, size: ClipSize, previews: bool = False) -> None:
    """Opens the graphs for clips of a size: without keyframes, and with each kind of them.

    On a GPU whole requests run, so that their CUDA graphs are captured; on a CPU they end when their graphs are open.

    Args:
        bundle: the bundle.
        executor: runs the requests.
        size: of the clips.
        previews: whether to prepare requests with previews, too. On a GPU they take CUDA graphs of their own; they are
            captured without keyframes and for scribbles, since those of more would displace the others.
    """
    on_gpu = BACKENDS[executor.backend].on_gpu
    requests = list(plain_requests(bundle, size))
    kinds: list[tuple[OnPreview | None, str, ClipRequest]] = [(None, "", request) for request in requests]
    if previews:  # with prompts of their own, whose conditioning no other request has left
        kinds += [(_ignore, " preview", request) for request in (requests[:2] if on_gpu else requests)]
    for prompt, (on_preview, more, request) in product(GPU_PROMPTS if on_gpu else GPU_PROMPTS[:1], kinds):
        checked = check_request(replace(request, prompt=prompt + more), bundle.manifest, executor.in_one_piece)
        with suppress(Cancelled):
            executor.run(checked, None if on_gpu else _is_loading, None, on_preview)


def _is_loading(progress: Progress) -> bool:
    return progress.stage == "load"


def _ignore(*_: object) -> None:
    """Takes a preview."""
