"""The names of a LoRA's weights: rename those of several trainers, refuse other kinds."""

import logging
import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

from .check import ExportError
from .sources import quoted

_logger = logging.getLogger("sparsectrl_lcm")
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
"""How the names of kohya's trainer begin."""
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
"""With which of them the layers of a part begin."""
_ADAPTER_NAME = re.compile(r"(\.lora_(?:[AB]|magnitude_vector))\.(?!weight$|bias$)[^.]+((?:\.(?:weight|bias))?)$")
_EMBEDDINGS = "bundle_emb."
_UNSUPPORTED = {
    ".oft_": "an OFT",
    ".a1.weight": "a GLoRA",
    ".on_input": "an IA3",
    ".diff_": "a full difference (LyCORIS)",
    ".w_norm": "a LyCORIS with norms",
}
_DOWN_UP = ((".lora_down.", ".lora_up."), (".lora_A.", ".lora_B."), (".down.", ".up."), ("_lora.down.", "_lora.up."))
_PAIRS = (*_DOWN_UP, *((up, down) for down, up in _DOWN_UP))
_ATTENTION = re.compile(r"(?:\.processor)?\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight$")
_SIDES = {"down": "A", "up": "B"}


def diffusers_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the names of adapters from PEFT's names, and renames the layers of AnimateDiff's original LoRAs."""
    named = {_ADAPTER_NAME.sub(r"\1\2", name.removeprefix("module.")): value for name, value in tensors.items()}
    if not all(_ATTENTION.search(name) and not name.startswith("text_encoder.") for name in named):
        return named
    renamed = {}
    for name, value in convert_animatediff_checkpoint_to_diffusers(named).items():
        found = _ATTENTION.search(name)
        assert found
        layer = "to_out.0" if found[1] == "to_out" else found[1]
        key = f"{name[: found.start()]}.{layer}.lora_{_SIDES[found[2]]}.weight"
        renamed[key if key.startswith("unet.") else f"unet.{key}"] = value
    return renamed


def refuse_other_kinds(source: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ExportError, which names the kind, if the weights are something other than low-rank layers."""
    for part, kind in _UNSUPPORTED.items():
        if any(part in f"{name}_" for name in tensors):
            raise ExportError("lora", f"{quoted(source)} is {kind}, which is not supported", "give a plain LoRA")
    if all(any(part in name for name in tensors) for part in ("lora_unet_input_blocks_", "lora_unet_down_blocks_")):
        raise ExportError("lora", f"{quoted(source)} mixes the names of two formats", "give a LoRA of one trainer")
    if any(name.startswith("lora_te2_") for name in tensors):
        raise ExportError(
            "lora", f"{quoted(source)} is a LoRA for Stable Diffusion XL", "give one for Stable Diffusion 1.5"
        )


def without_embeddings(source: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves out textual inversions that lie in the file, and tells so."""
    words = sorted({name.split(".")[1] for name in tensors if name.startswith(_EMBEDDINGS)})
    if words:
        _logger.warning(
            "lora: %s also holds textual inversions, which are left out: %s", Path(source).name, ", ".join(words)
        )
    return {name: value for name, value in tensors.items() if not name.startswith(_EMBEDDINGS)}


def check_pairs(source: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ExportError if one of the two matrices of a layer is missing."""
    for name in tensors:
        for one, other in _PAIRS:
            if one in name and name.endswith("weight") and name.replace(one, other) not in tensors:
                raise ExportError("lora", f"{quoted(source)} lacks {name.replace(one, other)}", "give a whole LoRA")


def with_all_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the alphas of layers without, which are their ranks, and applies those that diffusers would get wrong.

    diffusers drops alphas under its own names. If those in kohya's names differ, it gives all layers of a model one of
    them.
    """
    alphas = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
    if not alphas:
        return tensors
    if all(name.startswith(KOHYA) for name in tensors):
        downs = {name.split(".")[0]: value for name, value in tensors.items() if ".lora_down." in name}
        ranks = {f"{name}.alpha": torch.tensor(float(down.shape[0])) for name, down in downs.items()}
        tensors = ranks | tensors
        unet = {name: value for name, value in tensors.items() if name in ranks and name.startswith("lora_unet_")}
        text = {name: value for name, value in tensors.items() if name in ranks and name not in unet}
        differing = [part for part in (unet, text) if len({alpha.item() for alpha in part.values()}) > 1]
        alphas = {name: alpha for part in differing for name, alpha in part.items()}
    scaled = {name: value for name, value in tensors.items() if name not in alphas}
    for name, alpha in alphas.items():
        stem = name.removesuffix("alpha")
        for up in [key for key in scaled if key.startswith(stem) and any(part in key for _, part in _DOWN_UP)]:
            scaled[up] = scaled[up] * (alpha.item() / scaled[up].shape[1])
    return scaled
