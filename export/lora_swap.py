"""Replace the LoRAs of a bundle: they are fused into the weights of its base again, which have to be given for that."""

import gc
from pathlib import Path

import torch

from ..runtime.format.manifest import Manifest
from . import checkpoints
from .check import ExportError
from .loading import DEFAULTS, LoadOptions
from .lora_files import Lora, read_lora
from .options import public_name
from .sources import is_file, quoted
from .swap import Swap, open_swap, weights_of

_TOKENS = "token_embedding.weight"


def replace_loras(
    bundle: Path,
    loras: list[Lora],
    base: str | None = None,
    motion_adapter: str | None = None,
    options: LoadOptions = DEFAULTS,
    output: Path | None = None,
    *,
    dry_run: bool = False,
) -> tuple[Manifest, list[str]]:
    """Replaces all LoRAs that are fused into a bundle.

    Args:
        bundle: the bundle's folder.
        loras: the new ones, in this order; none leaves the base as it is.
        base: what the bundle was exported from; None takes the name in its manifest, which is one on the hub.
        motion_adapter: what its motion modules are; None takes the name in its manifest.
        options: how to load these two.
        output: a new or empty folder for the bundle with its new weights; None changes `bundle`.
        dry_run: whether everything is checked and nothing written.

    Returns:
        The new manifest, and a line for each file of weights that is replaced.

    Raises:
        ExportError: a source cannot be loaded, base or motion modules are not those of the bundle, a LoRA does not fit,
            or the bundle cannot be written.
        BundleError: `bundle` is not a bundle.
    """
    for lora in loras:
        read_lora(lora)
    with open_swap(bundle, output, dry_run=dry_run) as swap:
        sources = swap.manifest.sources
        base = base or _known(sources, "base")
        motion_adapter = motion_adapter or _known(sources, "motion_adapter")
        _replace_text_encoder(swap, base, loras, options)
        gc.collect()  # the text encoder, before the UNet is loaded
        weights = weights_of(checkpoints.load_unet(base, motion_adapter, loras, options))
        for file in swap.manifest.graphs["unet"].weights:
            field, source = ("motion_adapter", motion_adapter) if ".motion." in file else ("base", base)
            swap.replace("unet", file, field, source, weights, same=True)
        named = {f"lora_{index}": f"{public_name(lora.source)}={lora.weight:g}" for index, lora in enumerate(loras)}
        swap.sources = {name: value for name, value in sources.items() if not name.startswith("lora_")} | named
    return swap.changed(), swap.report


def _known(sources: dict[str, str], name: str) -> str:
    """Returns a source that the manifest names. It has no paths: folders and files have to be given.

    Raises:
        ExportError: the source was a folder or a file.
    """
    source = sources.get(name, "")
    if source.count("/") != 1 and not (source.count("/") > 1 and is_file(source)):
        option = f"--{name.replace('_', '-')}"
        raise ExportError(name, f"the bundle does not hold where {quoted(source)} lies", f"give it with {option}")
    return source


def _replace_text_encoder(swap: Swap, base: str, loras: list[Lora], options: LoadOptions) -> None:
    """Replaces the weights of the text encoder but for the vectors of tokens, to which the export may have added."""
    weights = weights_of(checkpoints.load_text_encoder(base, loras, options))
    for file in swap.manifest.graphs["text_encoder"].weights:
        own = {name: place for name, place in swap.weights("text_encoder", file) if name.endswith(_TOKENS)}
        kept: dict[str, torch.Tensor] = {name: swap.read(file, place) for name, place in own.items()}
        swap.replace("text_encoder", file, "base", base, weights | kept, same=True)
