"""Load the parts of a checkpoint from folders in diffusers format, hub names or single files, one part at a time.

Every loader refuses weights that are missing, left over, or not finite.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import original_formats, sources, taesd
from .check import ExportError
from .configurations import load_config, load_text_config, load_unet_config, load_vae_config
from .embeddings import Embedding, add_tokens, add_vectors
from .loading import DEFAULTS, LoadOptions, attempt, load
from .lora import Lora, fuse
from .sources import check_place, is_file, quoted

Model = TypeVar("Model")
Network = TypeVar("Network", bound=nn.Module)

TINY_DECODER = "tiny_decoder"


def load_text_encoder(
    base: str, loras: list[Lora], options: LoadOptions = DEFAULTS, embeddings: Sequence[Embedding] = ()
) -> CLIPTextModel:
    """Loads the CLIP text encoder of `base`, fuses the LoRAs and adds the vectors of textual inversions."""
    if is_file(base):
        config = load_text_config(base, options)
        model = attempt("base", base, lambda: original_formats.load_clip(base, config))
    else:
        model = _pretrained("base", CLIPTextModel, base, "text_encoder", options)
    fuse(model, "text_encoder", loras)
    if embeddings:
        add_vectors(model, load_tokenizer(base, options, embeddings), embeddings)
    return model.eval()


def load_tokenizer(base: str, options: LoadOptions = DEFAULTS, embeddings: Sequence[Embedding] = ()) -> CLIPTokenizer:
    """Loads the CLIP tokenizer of `base` and adds the tokens of textual inversions."""
    source = options.config_of(base)
    field = options.config_field(base)
    tokenizer = load(field, source, lambda: CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"))
    add_tokens(tokenizer, embeddings)
    return tokenizer


def load_unet(base: str, motion_adapter: str, loras: list[Lora], options: LoadOptions = DEFAULTS) -> UNetMotionModel:
    """Loads the UNet of `base` with the motion modules of `motion_adapter` and fuses the LoRAs.

    The weights of both are assigned instead of copied, so memory holds them once.
    """
    if is_file(base):
        config = load_unet_config(base, options)
        unet = attempt("base", base, lambda: original_formats.load_unet2d(base, config))
    else:
        unet = _pretrained("base", UNet2DConditionModel, base, "unet", options)
    adapter = load_motion_adapter(motion_adapter, options)
    try:
        with torch.device("meta"):
            model = UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)
        model.load_state_dict({**unet.state_dict(), **adapter.state_dict()}, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(
            "motion_adapter", f"{quoted(motion_adapter)} does not fit base {quoted(base)}: {reason}"[:190]
        ) from None
    fuse(model, "unet", loras)
    return model.eval()


def load_motion_adapter(source: str, options: LoadOptions = DEFAULTS) -> MotionAdapter:
    """Loads the motion modules of AnimateDiff, also from a file in its own format."""
    if is_file(source):
        return attempt("motion_adapter", source, lambda: original_formats.load_motion_modules("motion_adapter", source))
    return _pretrained("motion_adapter", MotionAdapter, source, None, options)


def load_controlnet(kind: str, source: str, options: LoadOptions = DEFAULTS) -> SparseControlNetModel:
    """Loads SparseCtrl for `scribble` or `rgb` keyframes, also from a file in AnimateDiff's own format."""
    field = f"controlnet_{kind}"
    if is_file(source):
        return attempt(field, source, lambda: original_formats.load_sparsectrl(field, source))
    return _pretrained(field, SparseControlNetModel, source, None, options).eval()


def load_vae(base: str, vae: str | None, options: LoadOptions = DEFAULTS) -> AutoencoderKL:
    """Loads `vae`, or the VAE of `base` if `vae` is None."""
    field, source = ("base", base) if vae is None else ("vae", vae)
    if is_file(source):
        config = load_vae_config(base, vae, options)
        return attempt(field, source, lambda: original_formats.load_vae_file(field, source, config)).eval()
    return _pretrained(field, AutoencoderKL, source, "vae" if vae is None else None, options).eval()


def load_tiny_decoder(source: str, options: LoadOptions = DEFAULTS) -> AutoencoderTiny:
    """Loads an AutoencoderTiny in diffusers' format, or only its decoder from a file in TAESD's own format."""
    if is_file(source):
        return attempt(TINY_DECODER, source, lambda: taesd.load(Path(source))).eval()
    return _pretrained(TINY_DECODER, AutoencoderTiny, source, None, options).eval()


def load_tiny_config(source: str) -> dict[str, Any]:
    """Returns the configuration of the model that `load_tiny_decoder` loads from the same source."""
    if is_file(source):
        return dict(load_tiny_decoder(source).config)
    return load_config(AutoencoderTiny, TINY_DECODER, source)


def _pretrained(field: str, kind: type[Network], source: str, subfolder: str | None, options: LoadOptions) -> Network:
    """Loads a part in diffusers' or transformers' format as float32.

    Raises:
        ExportError: the part cannot be loaded, lacks weights, has others than its model, or has values that are not
            finite.
    """
    check_place(field, source)
    folder = Path(source) / (subfolder or "")
    variant = sources.choose_variant(field, source, subfolder, options.variant)
    dtype = {"dtype": "float32"} if kind is CLIPTextModel else {"torch_dtype": torch.float32}

    def read(variant: str | None) -> tuple[Network, dict[str, Any]]:
        loader: Any = kind
        found: tuple[Network, dict[str, Any]] = loader.from_pretrained(
            source, subfolder=subfolder or "", variant=variant, output_loading_info=True, **dtype
        )
        return found

    if folder.is_dir():
        for path, found in sources.weight_files(folder):
            if found == variant:
                sources.is_safetensors(field, str(path), path)
        model, info = attempt(field, source, lambda: read(variant))
    else:  # a hub repository may lack the variant that others have, or hold only fp16 weights
        model, info = _first_success(field, source, read, (variant, None if variant else "fp16"))
    place = str(folder) if folder.is_dir() else source
    sources.check_complete(field, place, info["missing_keys"], info["unexpected_keys"])
    cached = sources.cached_folder(source, subfolder)
    files = sources.weight_files(cached) if cached.is_dir() else []
    read_from = [path for path, found in files if found == variant]
    sources.check_finite_once(field, read_from, model.state_dict(), lambda name: sources.file_of(place, variant, name))
    return model


def _first_success(
    field: str, source: str, read: Callable[[str | None], Model], variants: tuple[str | None, ...]
) -> Model:
    """Returns the first variant that can be loaded.

    Raises:
        ExportError: no variant can be loaded; tells what is wrong with the first.
    """
    failures = []
    for variant in variants:
        try:
            return attempt(field, source, partial(read, variant))
        except ExportError as error:
            failures.append(error)
    raise failures[0]
