"""Load AnimateDiff's motion modules, SparseCtrl and Stable Diffusion from single files in their authors' layouts.

diffusers' own converters rename the weights. What they leave out, the positions of the motion modules, is kept here.
The sizes are read from the shapes of the weights. What shapes do not tell (8 attention heads, groups of 32 channels) is
the same in all published files.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, MotionAdapter, SparseControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.single_file_utils import (
    convert_animatediff_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from .check import ExportError
from .loading import unfilled
from .published_models import ANIMATELCM_POSITIONS, COMPUTED_POSITIONS
from .sources import Weights, fill, quoted, read_weights

_POSITIONS = re.compile(r"(.*\.transformer_blocks\.\d+)\.attention_blocks\.(\d+)\.pos_encoder\.(?:pe|pos_encoding)")
_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


def describe(weights: Weights) -> str:
    """Says what a file holds, judged by the names of its weights."""
    names = weights.tensors
    kinds = {
        "a Stable Diffusion XL checkpoint": "conditioner.embedders.",
        "a Stable Diffusion 2 checkpoint": "cond_stage_model.model.",
        "a Stable Diffusion 1.5 checkpoint": "model.diffusion_model.input_blocks.",
        "a ControlNet of Stable Diffusion": "control_model.",
        "a LoRA in kohya's names": "lora_unet_",
        "an original SparseCtrl": "controlnet_cond_embedding.",
        "a LoRA": ".lora",
        "a motion LoRA": "_lora.",
        "motion modules": "motion_modules.",
        "a VAE": "decoder.conv_in.",
    }
    return next((kind for kind, part in kinds.items() if any(part in name for name in names)), "other weights")


def convert_motion(field: str, source: str, weights: Weights) -> dict[str, torch.Tensor]:
    """Renames the weights of motion modules or of a SparseCtrl to diffusers' names.

    Raises:
        ExportError: the attentions of a block have different positions.
    """
    tensors = {name.removeprefix("module."): value for name, value in weights.tensors.items()}
    converted: dict[str, torch.Tensor] = convert_animatediff_checkpoint_to_diffusers(tensors)
    for name, value in tensors.items():
        match = _POSITIONS.fullmatch(name.replace(".temporal_transformer", ""))
        if match is None:
            continue
        key = f"{match[1]}.pos_embed.pe"
        if key in converted and not torch.equal(converted[key], value):
            raise ExportError(field, f"{quoted(source)}: the attentions of {match[1]} have different positions")
        converted[key] = value
    return converted


def motion_config(field: str, source: str) -> dict[str, Any]:
    """Returns the settings of a MotionAdapter for a file of motion modules."""
    return _motion_config(field, source, _motion_tensors(field, source))


def load_motion_modules(field: str, source: str) -> MotionAdapter:
    """Loads a file of motion modules, in AnimateDiff's own or in diffusers' names.

    Raises:
        ExportError: the file cannot be read, holds something else, or lacks weights.
    """
    tensors = _motion_tensors(field, source)
    config = _motion_config(field, source, tensors)
    model = unfilled(lambda: MotionAdapter.from_config(config))
    return _with_positions(field, source, model, tensors)


def _motion_tensors(field: str, source: str) -> dict[str, torch.Tensor]:
    weights = read_weights(field, source)
    tensors = convert_motion(field, source, weights)
    if not any(".motion_modules." in name for name in tensors):
        raise ExportError(
            field, f"{quoted(source)} holds {describe(weights)}", "give motion modules, such as v3_sd15_mm.ckpt"
        )
    return tensors


def _beside(source: str, model: type[ConfigMixin]) -> dict[str, Any] | None:
    """Returns the configuration beside a file that was saved by diffusers, if it has one."""
    path = Path(source).with_name("config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config if config.get("_class_name") == model.__name__ else None


def _motion_config(field: str, source: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if config := _beside(source, MotionAdapter):
        return config
    first = [key for key in tensors if key.endswith("motion_modules.0.proj_in.weight") and key.startswith("down_")]
    if not first:
        raise ExportError(
            field, f"{quoted(source)} has no motion modules in its down blocks", "give a whole checkpoint"
        )
    middle = {key.split(".")[2] for key in tensors if key.startswith("mid_block.motion_modules.")}
    return {
        "block_out_channels": [tensors[key].shape[0] for key in sorted(first)],
        "motion_layers_per_block": _count(tensors, "down_blocks.0.motion_modules."),
        "motion_mid_block_layers_per_block": len(middle) or 1,
        "motion_num_attention_heads": 8,
        "motion_norm_num_groups": 32,
        "motion_max_seq_length": _positions(tensors, ANIMATELCM_POSITIONS if middle else 32),
        "use_motion_mid_block": bool(middle),
        "conv_in_channels": tensors["conv_in.weight"].shape[1] if "conv_in.weight" in tensors else None,
        COMPUTED_POSITIONS: not _has_positions(tensors),
    }


def _count(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    """Returns how many numbered modules follow `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def _positions(tensors: dict[str, torch.Tensor], absent: int = 32) -> int:
    """Returns the number of positions, `absent` if the file holds none: then they are sines, which the model computes.

    Of the published motion modules, only AnimateLCM's are without.
    """
    return next((value.shape[1] for key, value in tensors.items() if key.endswith(".pos_embed.pe")), absent)


def _has_positions(tensors: dict[str, torch.Tensor]) -> bool:
    return any(key.endswith(".pos_embed.pe") for key in tensors)


def _with_positions(field: str, source: str, model: nn.Module, tensors: dict[str, torch.Tensor]) -> Any:
    """Fills a model; positions that the file lacks are the sines that the model computes."""
    if not _has_positions(tensors):
        tensors |= {key: value for key, value in model.state_dict().items() if key.endswith(".pos_embed.pe")}
    fill(field, source, model, tensors)
    return model.eval()


def controlnet_config(field: str, source: str) -> dict[str, Any]:
    """Returns the settings of a SparseControlNetModel for a file of a SparseCtrl."""
    return _beside(source, SparseControlNetModel) or _controlnet_config(*_controlnet_tensors(field, source))


def load_sparsectrl(field: str, source: str) -> SparseControlNetModel:
    """Loads a file of a SparseCtrl, in AnimateDiff's own or in diffusers' names.

    Raises:
        ExportError: the file cannot be read, holds something else, or lacks weights.
    """
    tensors, settings = _controlnet_tensors(field, source)
    config = _beside(source, SparseControlNetModel) or _controlnet_config(tensors, settings)
    model = unfilled(lambda: SparseControlNetModel.from_config(config))
    return _with_positions(field, source, model, tensors)


def _controlnet_tensors(field: str, source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = read_weights(field, source)
    tensors = convert_motion(field, source, weights)
    needed = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "controlnet_down_blocks.0.weight")
    if any(key not in tensors for key in needed) or not any("controlnet_cond_embedding" in key for key in tensors):
        raise ExportError(
            field,
            f"{quoted(source)} holds {describe(weights)}",
            "give a SparseCtrl, such as v3_sd15_sparsectrl_rgb.ckpt",
        )
    settings = weights.settings.get("animatediff_config")
    settings = dict(settings) if isinstance(settings, dict) else {}
    if settings.get("set_noisy_sample_input_to_zero") is False:
        raise ExportError(field, f"{quoted(source)} takes noisy latents, which is not supported")
    return tensors, settings


def _controlnet_config(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    levels = range(_count(tensors, "down_blocks."))
    attention = next((key for key in tensors if key.endswith("attn2.to_k.weight") and ".attentions." in key), "")
    embedding = "controlnet_cond_embedding"
    simplified = f"{embedding}.weight" in tensors
    first = tensors[f"{embedding}.weight" if simplified else f"{embedding}.conv_in.weight"]
    with_mask = bool(settings.get("concate_conditioning_mask", True))
    widths = [
        tensors[f"{embedding}.blocks.{i}.weight"].shape[0] for i in range(1, _count(tensors, f"{embedding}.blocks."), 2)
    ]
    crossing = [any(key.startswith(f"down_blocks.{level}.attentions.") for key in tensors) for level in levels]
    return {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "conditioning_channels": first.shape[1] - with_mask,
        "down_block_types": ["CrossAttnDownBlockMotion" if crosses else "DownBlockMotion" for crosses in crossing],
        "block_out_channels": [tensors[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in levels],
        "layers_per_block": _count(tensors, "down_blocks.0.resnets."),
        "cross_attention_dim": tensors[attention].shape[1] if attention else 768,
        "use_linear_projection": any(
            key.endswith("proj_in.weight") and ".attentions." in key and value.ndim == 2
            for key, value in tensors.items()
        ),
        "conditioning_embedding_out_channels": [16, 32, 96, 256] if simplified else [first.shape[0], *widths],
        "motion_max_seq_length": _positions(tensors),
        "concat_conditioning_mask": with_mask,
        "use_simplified_condition_embedding": simplified,
    }


def load_unet2d(source: str, config: dict[str, Any]) -> UNet2DConditionModel:
    """Loads the UNet of a single-file checkpoint of Stable Diffusion.

    Raises:
        ExportError: the file cannot be read, holds something else, lacks weights, or does not fit `config`.
    """
    weights = read_base(source).tensors
    model = unfilled(lambda: UNet2DConditionModel.from_config(config))
    tensors = {name: value for name, value in weights.items() if name.startswith(_UNET)}
    _fill_converted("base", source, model, lambda: convert_ldm_unet_checkpoint(tensors, config))
    return model


def load_vae_file(field: str, source: str, config: dict[str, Any]) -> AutoencoderKL:
    """Loads the VAE of a single-file checkpoint, or a VAE in a file of its own, in the original or diffusers' names.

    Raises:
        ExportError: the file cannot be read, holds no VAE, lacks weights, or does not fit `config`.
    """
    weights = read_weights(field, source)
    tensors = {name: value for name, value in weights.tensors.items() if name.startswith(_VAE)}
    if not tensors and "decoder.conv_in.weight" in weights.tensors:
        dropped = ("loss.", "model_ema.")  # of the training
        tensors = {name: value for name, value in weights.tensors.items() if not name.startswith(dropped)}
    if not tensors:
        what = describe(weights)
        remedy = "give a VAE with --vae" if field == "base" else "give a file of a VAE"
        raise ExportError(field, f"{quoted(source)} holds {what} without a VAE", remedy)
    model = unfilled(lambda: AutoencoderKL.from_config(config))
    if "decoder.mid_block.resnets.0.conv1.weight" in tensors:
        fill(field, source, model, tensors)
    else:
        _fill_converted(field, source, model, lambda: convert_ldm_vae_checkpoint(tensors, config))
    return model


def load_clip(source: str, config: CLIPTextConfig) -> CLIPTextModel:
    """Loads the text encoder of a single-file checkpoint of Stable Diffusion.

    Raises:
        ExportError: the file cannot be read, holds something else, lacks weights, or does not fit `config`.
    """
    weights = read_base(source).tensors
    converted = convert_ldm_clip_checkpoint(weights)
    model = unfilled(lambda: CLIPTextModel(config))
    own = {
        name: next((key for key in (name, f"text_model.{name}") if key in converted), name)
        for name in model.state_dict()
    }
    taken = {name: converted[key] for name, key in own.items() if key in converted}
    left = {key: value for key, value in converted.items() if key not in own.values()}
    left = {key: value for key, value in left.items() if not key.endswith("position_ids")}
    fill("base", source, model, taken | left)
    return model


def read_base(source: str) -> Weights:
    """Reads a single-file checkpoint of Stable Diffusion.

    Raises:
        ExportError: the file cannot be read or holds something else.
    """
    weights = read_weights("base", source)
    what = describe(weights)
    if what != "a Stable Diffusion 1.5 checkpoint":
        raise ExportError("base", f"{quoted(source)} holds {what}", "give a Stable Diffusion 1.5 checkpoint")
    if not any(name.startswith(_TEXT) for name in weights.tensors):
        raise ExportError("base", f"{quoted(source)} has no text encoder", "give a whole checkpoint")
    return weights


def _fill_converted(field: str, source: str, model: nn.Module, convert: Any) -> None:
    """Fills a model with what a converter of diffusers makes of a file.

    Raises:
        ExportError: the converter fails, or the file does not fit.
    """
    try:
        converted = convert()
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ExportError(field, f"{quoted(source)} lacks weights ({error})"[:180], "give a whole checkpoint") from None
    fill(field, source, model, {name: value for name, value in converted.items() if value is not None})
