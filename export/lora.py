"""Fuse LoRAs into a model: the LCM-LoRA, which makes 4 steps possible, motion LoRAs and style LoRAs."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..runtime.errors import first_line
from .check import ExportError


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, folder or hub name, and the weight it is fused with."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Reads `SOURCE` or `SOURCE=WEIGHT`.

        Raises:
            ExportError: the source is empty, or the weight is not a finite number.
        """
        source, separator, weight = text.rpartition("=")
        if not separator:
            return cls(text)
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not source or not isfinite(value):
            raise ExportError(
                "lora",
                f"{text!r} is not allowed",
                "give PATH or PATH=WEIGHT with a number as the weight, such as lcm.safetensors=1.0",
            )
        return cls(source, value)


def fuse(model: nn.Module, part: Literal["unet", "text_encoder"], loras: list[Lora]) -> None:
    """Adds weight * alpha / rank * up @ down of each LoRA to the weights of `model`, in place.

    Raises:
        ExportError: a LoRA cannot be read, has no weights for Stable Diffusion, or does not fit `model` with all its
            layers.
    """
    for index, lora in enumerate(loras):
        state_dict, alphas = read(lora)
        if not any(key.startswith(f"{part}.") for key in state_dict):
            if not any(key.startswith(("unet.", "text_encoder.")) for key in state_dict):
                raise ExportError("lora", f"{lora.source!r} has no weights for a Stable Diffusion UNet or text encoder")
            continue
        name = f"lora_{index}"
        try:
            if part == "unet":
                StableDiffusionPipeline.load_lora_into_unet(state_dict, alphas, model, adapter_name=name)
                model.fuse_lora(lora_scale=lora.weight, adapter_names=[name])
            else:
                StableDiffusionPipeline.load_lora_into_text_encoder(state_dict, alphas, model, adapter_name=name)
                fuse_text_encoder_lora(model, lora_scale=lora.weight, adapter_names=[name])
        except (ValueError, RuntimeError, KeyError) as error:
            raise ExportError("lora", f"{lora.source!r} does not fit the {part}: {first_line(error)}") from None
        _check_all_landed(model, part, lora, state_dict)
        recurse_remove_peft_layers(model)
        _forget_adapters(model)


def _check_all_landed(model: nn.Module, part: str, lora: Lora, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ExportError if the loaders have skipped a layer: they drop layers that do not fit without an error."""
    given = sum(key.startswith(f"{part}.") and key.endswith(("down.weight", "lora_A.weight")) for key in state_dict)
    landed = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    if given != landed:
        raise ExportError("lora", f"{lora.source!r}: only {landed} of {given} layers fit the {part} of the base")


def read(lora: Lora) -> tuple[dict[str, torch.Tensor], dict[str, float] | None]:
    """Reads the weights of a LoRA under diffusers' names, and its alphas.

    Raises:
        ExportError: the LoRA cannot be read.
    """
    try:
        state_dict, alphas = StableDiffusionPipeline.lora_state_dict(lora.source)
    except Exception as error:  # a damaged file can make the loaders raise anything
        raise ExportError("lora", f"cannot load {lora.source!r}: {first_line(error)}") from None
    prefixes = ("unet.", "text_encoder.")
    if not any(key.startswith(prefixes) for key in state_dict):  # saved from a UNet without its pipeline
        state_dict = {f"unet.{key}": value for key, value in state_dict.items() if "lora" in key}
    return {_uniform(key): value for key, value in state_dict.items()}, alphas


def _uniform(key: str) -> str:
    """Renames a key of the text encoder to one of diffusers' two spellings: its loader drops keys if both occur."""
    if key.startswith("text_encoder."):
        for name in ("q", "k", "v", "out"):
            key = key.replace(f".to_{name}_lora.", f".{name}_proj.lora_linear_layer.")
    return key


def _forget_adapters(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
