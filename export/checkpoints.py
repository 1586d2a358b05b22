"""Load the parts of a checkpoint from diffusers-format folders or hub names, one part at a time."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LCMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.configuration_utils import ConfigMixin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..runtime.errors import first_line
from . import taesd
from .check import ExportError
from .lora import Lora, fuse

Model = TypeVar("Model")

TINY_DECODER = "tiny_decoder"


def load_text_encoder(base: str, loras: list[Lora]) -> CLIPTextModel:
    """Loads the CLIP text encoder of `base` and fuses the LoRAs."""
    model = _load("base", base, lambda: CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype="float32"))
    fuse(model, "text_encoder", loras)
    return model.eval()


def load_tokenizer(base: str) -> CLIPTokenizer:
    """Loads the CLIP tokenizer of `base`."""
    return _load("base", base, lambda: CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"))


def load_unet(base: str, motion_adapter: str, loras: list[Lora]) -> UNetMotionModel:
    """Loads the UNet of `base` with the motion modules of `motion_adapter` and fuses the LoRAs.

    The weights of both are assigned instead of copied, so memory holds them once.
    """
    unet = _load(
        "base",
        base,
        lambda: UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32),
    )
    adapter = load_motion_adapter(motion_adapter)
    try:
        with torch.device("meta"):
            model = UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)
        model.load_state_dict({**unet.state_dict(), **adapter.state_dict()}, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError("motion_adapter", f"{motion_adapter!r} does not fit base {base!r}: {reason}") from None
    fuse(model, "unet", loras)
    return model.eval()


def load_motion_adapter(source: str) -> MotionAdapter:
    """Loads the motion modules of AnimateDiff."""
    return _load("motion_adapter", source, lambda: MotionAdapter.from_pretrained(source, torch_dtype=torch.float32))


def load_controlnet(kind: str, source: str) -> SparseControlNetModel:
    """Loads SparseCtrl for `scribble` or `rgb` keyframes."""
    field = f"controlnet_{kind}"
    return _load(field, source, lambda: SparseControlNetModel.from_pretrained(source, torch_dtype=torch.float32)).eval()


def load_vae(base: str, vae: str | None) -> AutoencoderKL:
    """Loads `vae`, or the VAE of `base` if `vae` is None."""
    if vae is None:
        return _load(
            "base", base, lambda: AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)
        ).eval()
    return _load("vae", vae, lambda: AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32)).eval()


def load_tiny_decoder(source: str) -> AutoencoderTiny:
    """Loads an AutoencoderTiny in diffusers' format, or only its decoder from a file in TAESD's own format."""
    if _is_file(source):
        return _attempt(TINY_DECODER, source, lambda: taesd.load(Path(source))).eval()
    return _load(
        TINY_DECODER, source, lambda: AutoencoderTiny.from_pretrained(source, torch_dtype=torch.float32)
    ).eval()


def load_tiny_config(source: str) -> dict[str, Any]:
    """Returns the configuration of the model that `load_tiny_decoder` loads from the same source."""
    if _is_file(source):
        return dict(load_tiny_decoder(source).config)
    return load_config(AutoencoderTiny, TINY_DECODER, source)


def _is_file(source: str) -> bool:
    return Path(source).suffix in taesd.SUFFIXES or Path(source).is_file()


def load_lcm_config(base: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns the LCM scheduler's configuration for `base`, as diffusers documents it for AnimateDiff with LCM.

    Raises:
        ExportError: the configuration cannot be loaded, an override is not a setting of LCMScheduler, or a switch is
            set to something other than true or false.
    """
    known = inspect.signature(LCMScheduler.__init__).parameters
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ExportError("scheduler", f"{unknown[0]!r} is not a setting of LCMScheduler")
    for name, value in overrides.items():
        if isinstance(known[name].default, bool) and value not in (True, False):
            raise ExportError("scheduler", f"{name}={value!r} is not supported", "give true or false")

    def load() -> dict[str, Any]:
        config = LCMScheduler.load_config(base, subfolder="scheduler")
        own = getattr(diffusers, config["_class_name"]).from_config(config)
        return dict(LCMScheduler.from_config(own.config, beta_schedule="linear").config)

    return {**_load("base", base, load), **overrides}


def load_text_config(base: str) -> CLIPTextConfig:
    """Returns the configuration of the text encoder of `base`."""
    return _load("base", base, lambda: CLIPTextConfig.from_pretrained(base, subfolder="text_encoder"))


def load_vae_config(base: str, vae: str | None) -> dict[str, Any]:
    """Returns the configuration of the VAE that `load_vae` loads from the same arguments."""
    return load_config(AutoencoderKL, "vae", vae) if vae else load_config(AutoencoderKL, "base", base, "vae")


def load_config(model: type[ConfigMixin], field: str, source: str, subfolder: str | None = None) -> dict[str, Any]:
    """Returns the configuration of a part of a checkpoint; missing settings take the defaults of `model`.

    Raises:
        ExportError: the configuration cannot be loaded, or belongs to another class than `model`.
    """
    config = _load(field, source, lambda: model.load_config(source, subfolder=subfolder))
    kind = config.get("_class_name", model.__name__)
    if kind != model.__name__:
        raise ExportError(field, f"{source!r} holds a {kind}", f"give the folder or name of a {model.__name__}")
    parameters = inspect.signature(model.__init__).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
    return {**defaults, **config}


def _load(field: str, source: str, load: Callable[[], Model]) -> Model:
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).is_dir():
        raise ExportError(field, f"{source!r} is not a folder")
    return _attempt(field, source, load)


def _attempt(field: str, source: str, load: Callable[[], Model]) -> Model:
    try:
        with _quiet():
            return load()
    except ExportError:
        raise
    except Exception as error:  # a damaged file can make the loaders raise anything
        raise ExportError(field, f"cannot load {source!r}: {first_line(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off the libraries' progress bars and warnings: the export shows one bar of its own."""
    before = diffusers.logging.get_verbosity(), transformers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before[0])
        transformers.logging.set_verbosity(before[1])
        diffusers.logging.enable_progress_bar()
        transformers.logging.enable_progress_bar()
