"""Load every model of an export before the first graph is traced, which takes minutes."""

import gc
from collections.abc import Callable

from torch import nn

from .plan import Job

OnOpen = Callable[[str, int], None]
"""Called with the name of a graph and the bytes of its weights as float32."""


def open_sources(jobs: list[Job], on_open: OnOpen = lambda *_: None) -> dict[str, nn.Module]:
    """Loads every model, so that every source is found whole, finite and fitting.

    Memory holds one model at a time. The last one, which takes the longest to load, stays loaded.

    Returns:
        The module of the UNet, by the name of its graph. Whoever traces it takes it out, so that its memory is freed.

    Raises:
        ExportError: a checkpoint cannot be loaded or does not fit.
    """
    graphs = {job.spec.name for job in jobs}
    same = {"vae_encoder"} if "vae_decoder" in graphs else set()  # both come from one VAE
    needed = [job for job in jobs if job.spec.name not in same]
    kept = {}
    for job in sorted(needed, key=lambda job: job.spec.name == "unet"):
        kept = {job.spec.name: job.build()}
        (module,) = kept.values()
        on_open(job.spec.name, sum(value.numel() * value.element_size() for value in module.state_dict().values()))
        del module
        if job.spec.name != "unet":
            kept.clear()
            gc.collect()
    return kept
