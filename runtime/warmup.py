"""What the first request of a size would load, compile or capture, done before it."""

from contextlib import suppress
from dataclasses import replace

from .backend_interface import Executor
from .backends import BACKENDS
from .checked_request import check_request
from .errors import Cancelled
from .example_requests import plain_requests
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .progress import Progress

GPU_PROMPTS = ("a", "a", "b", "b")
"""A new prompt and one that was there before take other CUDA graphs. Each is proved once more after other captures."""


def warm_up(bundle: Bundle, executor: Executor, size: ClipSize) -> None:
    """Opens the graphs for clips of a size: without keyframes, and with each kind of them.

    On a GPU whole requests run, so that their CUDA graphs are captured; on a CPU they end when their graphs are open.
    """
    on_gpu = BACKENDS[executor.backend].on_gpu
    for prompt in GPU_PROMPTS if on_gpu else GPU_PROMPTS[:1]:
        for request in plain_requests(bundle, size):
            checked = check_request(replace(request, prompt=prompt), bundle.manifest, executor.in_one_piece)
            with suppress(Cancelled):
                executor.run(checked, None if on_gpu else _is_loading)


def _is_loading(progress: Progress) -> bool:
    return progress.stage == "load"
