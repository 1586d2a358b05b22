"""Fuse LoRAs into a model: the LCM-LoRA, which makes 4 steps possible, motion LoRAs and style LoRAs."""

from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..runtime.errors import first_line
from .check import ExportError
from .lora_files import Layers, Lora, LoraWeights, read_lora
from .lora_names import KOHYA_PREFIX
from .sources import quoted

__all__ = ["Lora", "fuse"]

Part = Literal["unet", "text_encoder"]
KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_text_model_", "lora_te_", "lora_te1_text_model_")}


def fuse(model: nn.Module, part: Part, loras: list[Lora]) -> None:
    """Adds weight * alpha / rank * up @ down of each LoRA to the weights of `model`, in place.

    A DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) in kohya's format moves the weights by `weight` of the way to
    magnitude * (W + alpha / rank * up @ down) / norm. For LoHa, LoKr and CP decomposition, see `lycoris.py`.

    Raises:
        ExportError: a LoRA cannot be read, has no weights for Stable Diffusion, or does not fit `model` with all its
            layers.
    """
    for index, lora in enumerate(loras):
        weights = read_lora(lora)
        if weights.plain.has(part):
            _add(model, part, lora, weights.plain, f"lora_{index}", lora.weight)
        if weights.decomposed.has(part):
            named = _by_kohya_name(model, part)
            targets = {
                name: named[name] for name in weights.magnitudes if name in named and name not in weights.factors
            }
            before = {name: module.weight.detach().clone() for name, module in targets.items()}
            _add(model, part, lora, weights.decomposed, f"dora_{index}", 1.0)
            named = _by_kohya_name(model, part)
            for name, original in before.items():
                _decompose(lora, name, named[name].weight, original, weights.magnitudes[name])
        _add_factors(model, part, lora, weights)


def _add_factors(model: nn.Module, part: Part, lora: Lora, weights: LoraWeights) -> None:
    """Adds the layers of LoHa, LoKr and LoCon with CP decomposition.

    Raises:
        ExportError: a layer does not fit `model`.
    """
    given = {name: value for name, value in weights.factors.items() if name.startswith(KOHYA_PREFIX[part][:-1])}
    named = _by_kohya_name(model, part) if given else {}
    targets = {name: named[name] for name in given if isinstance(named.get(name), nn.Linear | nn.Conv2d)}
    if len(targets) < len(given):
        reason = f"{quoted(lora.source)}: only {len(targets)} of {len(given)} layers fit the {part} of the base"
        raise ExportError("lora", reason)
    for name, module in targets.items():
        weight = module.weight.detach()
        magnitude = weights.magnitudes.get(name)
        change = given[name].change(lora.source, name, weight.shape)
        original = None if magnitude is None else weight.clone()
        weight += (lora.weight if magnitude is None else 1.0) * change
        if magnitude is not None and original is not None:
            _decompose(lora, name, weight, original, magnitude)


def _add(model: nn.Module, part: Part, lora: Lora, layers: Layers, name: str, weight: float) -> None:
    """Fuses layers through diffusers and PEFT.

    Raises:
        ExportError: the layers do not fit `model`.
    """
    named = _peft_names(model, part, layers)
    _check_shapes(model, lora, named)
    tensors, alphas, metadata = layers.tensors, layers.alphas, _settings(part, layers, named)
    try:
        if part == "unet":
            StableDiffusionPipeline.load_lora_into_unet(tensors, alphas, model, adapter_name=name, metadata=metadata)
            model.fuse_lora(lora_scale=weight, adapter_names=[name])
        else:
            StableDiffusionPipeline.load_lora_into_text_encoder(
                tensors, alphas, model, adapter_name=name, metadata=metadata
            )
            fuse_text_encoder_lora(model, lora_scale=weight, adapter_names=[name])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = f"{quoted(lora.source)} does not fit the {part}: {first_line(error)}"
        raise ExportError("lora", reason[:190]) from None
    _check_all_landed(model, part, lora, tensors)
    recurse_remove_peft_layers(model)
    _forget_adapters(model)


def _peft_names(model: nn.Module, part: Part, layers: Layers) -> dict[str, torch.Tensor]:
    """Returns the tensors for a model by PEFT's names; none if they have names that the loader will refuse."""
    own = {key.removeprefix(f"{part}."): value for key, value in layers.tensors.items() if key.startswith(f"{part}.")}
    try:
        if part == "text_encoder":
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        elif not any("lora_A" in key for key in own):
            own = convert_unet_state_dict_to_peft(own)
    except (ValueError, KeyError):
        return {}
    prefix = "" if hasattr(model, "text_model") else "text_model."
    return {key.removeprefix(prefix): value for key, value in own.items()}


def _check_shapes(model: nn.Module, lora: Lora, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ExportError if a layer is for weights of another shape, as those of Stable Diffusion 2 and XL are."""
    modules = dict(model.named_modules())
    for key, value in tensors.items():
        name, _, side = key.partition(".lora_")
        module = modules.get(name)
        if side not in ("A.weight", "B.weight") or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        out, into = module.weight.shape[:2]
        theirs, ours = (value.shape[1], into) if side == "A.weight" else (value.shape[0], out)
        if theirs != ours:
            place = ".".join(name.split(".")[-2:])
            raise ExportError(
                "lora",
                f"{quoted(lora.source)} is for another model: {place} has {theirs} channels, the base's {ours}",
                "give a LoRA for Stable Diffusion 1.5",
            )


def _settings(part: Part, layers: Layers, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Returns what is known about the ranks and alphas of a part, for just the layers that are there."""
    known = layers.metadata or {}
    if not any(key.startswith(f"{part}.") for key in known):
        return None
    return known | {f"{part}.target_modules": sorted({key.partition(".lora_")[0] for key in tensors})}


def _by_kohya_name(model: nn.Module, part: Part) -> dict[str, nn.Module]:
    """Returns the layers of a model by their names in kohya's format."""
    layers = {name.replace(".", "_"): module for name, module in model.named_modules()}
    return {f"{prefix}{name}": module for prefix in KOHYA_PREFIXES[part] for name, module in layers.items()}


def _decompose(lora: Lora, name: str, weight: torch.Tensor, original: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Turns the sum of a weight and its low-rank product into DoRA's weight, in place.

    `magnitude` has a value per output [out, 1, ...] or, in older files, per input [1, in, ...].

    Raises:
        ExportError: `magnitude` has another shape.
    """
    magnitude = magnitude.float()
    if magnitude.shape[0] == weight.shape[0] and magnitude.numel() == weight.shape[0]:
        kept = 0
    elif magnitude.numel() == weight.shape[1]:
        kept = 1
    else:
        raise ExportError("lora", f"{quoted(lora.source)}: dora_scale of {name} has shape {tuple(magnitude.shape)}")
    others = [axis for axis in range(weight.ndim) if axis != kept]
    shape = [-1 if axis == kept else 1 for axis in range(weight.ndim)]
    weight = weight.detach()
    decomposed = magnitude.reshape(shape) * weight / torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    weight.copy_(decomposed if lora.weight == 1 else original + lora.weight * (decomposed - original))


def _check_all_landed(model: nn.Module, part: str, lora: Lora, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ExportError if the loaders have skipped a layer: they drop layers that do not fit without an error."""
    given = sum(key.startswith(f"{part}.") and key.endswith(("down.weight", "lora_A.weight")) for key in state_dict)
    landed = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    if given != landed:
        raise ExportError("lora", f"{quoted(lora.source)}: only {landed} of {given} layers fit the {part} of the base")


def _forget_adapters(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
