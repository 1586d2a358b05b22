"""Read the settings of the parts of a checkpoint, without their weights where the format allows it."""

import inspect
from typing import Any

import diffusers
from diffusers import AutoencoderKL, LCMScheduler, MotionAdapter, SparseControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from transformers import CLIPTextConfig

from . import original_formats
from .check import ExportError
from .loading import DEFAULTS, LoadOptions, attempt, load
from .sources import is_file, quoted


def load_lcm_config(base: str, overrides: dict[str, Any], options: LoadOptions = DEFAULTS) -> dict[str, Any]:
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
    source = options.config_of(base)

    def read() -> dict[str, Any]:
        config = LCMScheduler.load_config(source, subfolder="scheduler")
        own = getattr(diffusers, config["_class_name"]).from_config(config)
        return dict(LCMScheduler.from_config(own.config, beta_schedule="linear").config)

    return {**load(options.config_field(base), source, read), **_marks(base), **overrides}


def _marks(base: str) -> dict[str, Any]:
    """Returns the settings that a single-file base tells by marks among its weights.

    Raises:
        ExportError: the base was trained with zero terminal SNR.
    """
    names = original_formats.read_base(base).tensors.keys() if is_file(base) else ()
    if "ztsnr" in names:
        raise ExportError("base", f"{quoted(base)} was trained with zero terminal SNR, which is not supported")
    return {"prediction_type": "v_prediction"} if "v_pred" in names else {}


def load_unet_config(base: str, options: LoadOptions = DEFAULTS) -> dict[str, Any]:
    """Returns the configuration of the UNet of `base`."""
    return load_config(UNet2DConditionModel, options.config_field(base), options.config_of(base), "unet")


def load_text_config(base: str, options: LoadOptions = DEFAULTS) -> CLIPTextConfig:
    """Returns the configuration of the text encoder of `base`."""
    source = options.config_of(base)
    return load(
        options.config_field(base), source, lambda: CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
    )


def load_vae_config(base: str, vae: str | None, options: LoadOptions = DEFAULTS) -> dict[str, Any]:
    """Returns the configuration of the VAE that `load_vae` loads from the same arguments.

    A VAE in a file of its own takes the settings of the base's VAE.
    """
    if vae and not is_file(vae):
        return load_config(AutoencoderKL, "vae", vae)
    return load_config(AutoencoderKL, options.config_field(base), options.config_of(base), "vae")


def load_motion_config(source: str) -> dict[str, Any]:
    """Returns the configuration of motion modules; for a file, as its weights tell."""
    if is_file(source):
        read = attempt("motion_adapter", source, lambda: original_formats.motion_config("motion_adapter", source))
        return with_defaults(MotionAdapter, read)
    return load_config(MotionAdapter, "motion_adapter", source)


def load_controlnet_config(kind: str, source: str) -> dict[str, Any]:
    """Returns the configuration of a SparseCtrl; for a file, as its weights tell."""
    field = f"controlnet_{kind}"
    if is_file(source):
        read = attempt(field, source, lambda: original_formats.controlnet_config(field, source))
        return with_defaults(SparseControlNetModel, read)
    return load_config(SparseControlNetModel, field, source)


def load_config(model: type[ConfigMixin], field: str, source: str, subfolder: str | None = None) -> dict[str, Any]:
    """Returns the configuration of a part of a checkpoint; missing settings take the defaults of `model`.

    Raises:
        ExportError: the configuration cannot be loaded, or belongs to another class than `model`.
    """
    config = load(field, source, lambda: model.load_config(source, subfolder=subfolder))
    kind = config.get("_class_name", model.__name__)
    if kind != model.__name__:
        raise ExportError(field, f"{quoted(source)} holds a {kind}", f"give the folder or name of a {model.__name__}")
    return with_defaults(model, config)


def with_defaults(model: type[ConfigMixin], config: dict[str, Any]) -> dict[str, Any]:
    """Adds the defaults of `model` to a configuration."""
    parameters = inspect.signature(model.__init__).parameters.values()
    return {**{item.name: item.default for item in parameters if item.default is not item.empty}, **config}
