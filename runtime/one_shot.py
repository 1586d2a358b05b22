"""The backend of a process that makes few clips: compiling graphs for them may take longer than it saves."""

from collections.abc import Sequence
from typing import NamedTuple

from .backends import BACKENDS, choose_backend
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .load_options import LoadOptions
from .request import ClipRequest

COMPILING_PAYS = 2e11
"""Products of a process from which on compiled graphs save more time than their compilation takes. A clip of the demo
bundle has 4e10; compiling for it takes several times as long as it saves (docs/benchmarks.md)."""


class Choice(NamedTuple):
    """A backend, and why it was chosen."""

    backend: str
    reason: str


def one_shot_backend(bundle: Bundle, options: LoadOptions, requests: Sequence[ClipRequest]) -> Choice:
    """What `choose_backend` gives, or the next backend if that would compile for these requests and hardly use it.

    Args:
        bundle: the bundle.
        options: how it is going to be opened.
        requests: all that the process makes, of one size.
    """
    chosen = choose_backend(bundle, options)
    if not _compiles(bundle, chosen, options) or options.precision is not None or options.device is not None:
        return Choice(chosen, "the fastest that can run here")
    sizes, first = bundle.manifest.sizes, requests[0]
    size = ClipSize(
        width=first.width or sizes.width, height=first.height or sizes.height, frames=first.num_frames or sizes.frames
    )
    if sum(_products(bundle, size, request) for request in requests) >= COMPILING_PAYS:
        return Choice(chosen, "compiling its graphs pays for this much work")
    if BACKENDS[chosen].implementation.is_compiled(bundle, options, size):
        return Choice(chosen, "its graphs are compiled already")
    without = [name for name in BACKENDS if _compiles(bundle, name, options)]
    reason = f"{chosen} would compile its graphs for longer than it saves"
    return Choice(choose_backend(bundle, options, without), reason)


def _compiles(bundle: Bundle, backend: str, options: LoadOptions) -> bool:
    """Whether a backend would compile portable graphs. Engines were built to be used: they are worth a compilation."""
    record = BACKENDS[backend]
    return record.compiles and not record.has_engines(bundle.folder, options.precision)


def _products(bundle: Bundle, size: ClipSize, request: ClipRequest) -> float:
    """About the products of the UNet: each of its weights with each position of the latents, at each step."""
    manifest = bundle.manifest
    weights = sum(manifest.files[name].bytes for name in manifest.graphs["unet"].weights) / 4
    positions = size.width * size.height * size.frames / manifest.sizes.vae_scale_factor**2
    return weights * positions * request.num_inference_steps * (2 if request.guidance_scale > 1 else 1)
