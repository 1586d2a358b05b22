"""The backend of a process that makes few clips: compiling graphs for them may take longer than it saves."""

from collections.abc import Sequence

from .backends import BACKENDS, choose_backend
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .load_options import LoadOptions
from .request import ClipRequest

COMPILING_PAYS = 2e11
"""Products of a process from which on compiled graphs save more time than their compilation takes. A clip of the demo
bundle has 4e10; compiling for it takes several times as long as it saves (docs/benchmarks.md)."""


def one_shot_backend(bundle: Bundle, options: LoadOptions, requests: Sequence[ClipRequest]) -> str:
    """What `choose_backend` gives, or the next backend if that would compile for these requests and hardly use it.

    Args:
        bundle: the bundle.
        options: how it is going to be opened.
        requests: all that the process makes, of one size.
    """
    sizes, first = bundle.manifest.sizes, requests[0]
    size = ClipSize(
        width=first.width or sizes.width, height=first.height or sizes.height, frames=first.num_frames or sizes.frames
    )
    few = sum(_products(bundle, size, request) for request in requests) < COMPILING_PAYS
    skipped = {
        name
        for name, record in BACKENDS.items()
        if few and record.compiles and not record.has_engines(bundle.folder, options.precision)
    }
    chosen = choose_backend(bundle, options)
    if chosen not in skipped or options.precision is not None or options.device is not None:
        return chosen
    compiled = BACKENDS[chosen].implementation.is_compiled(bundle, options, size)
    return chosen if compiled else choose_backend(bundle, options, skipped)


def _products(bundle: Bundle, size: ClipSize, request: ClipRequest) -> float:
    """About the products of the UNet: each of its weights with each position of the latents, at each step."""
    manifest = bundle.manifest
    weights = sum(manifest.files[name].bytes for name in manifest.graphs["unet"].weights) / 4
    positions = size.width * size.height * size.frames / manifest.sizes.vae_scale_factor**2
    return weights * positions * request.num_inference_steps * (2 if request.guidance_scale > 1 else 1)
