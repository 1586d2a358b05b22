"""Read a LoRA of any trainer from a file, a folder or the hub, under diffusers' names."""

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, _best_guess_weight_name
from huggingface_hub import hf_hub_download

from .check import ExportError
from .loading import attempt, quiet
from .lora_names import (
    KOHYA,
    KOHYA_PREFIX,
    check_pairs,
    diffusers_names,
    refuse_other_kinds,
    with_all_alphas,
    without_embeddings,
)
from .lycoris import Factors, peft_factors, split_factors
from .published_models import lora_weight
from .sources import SUFFIXES, cannot_load, find_file, is_file, quoted, read_weights

_PEFT = "base_model.model."
_LAYERS = SimpleNamespace(layers_per_block=2)
"""What diffusers needs to rename layers in the original names of Stable Diffusion 1.5's UNet."""
_DORA = ".dora_scale"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, folder or hub name, and the weight it is fused with."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Reads `SOURCE` or `SOURCE=WEIGHT`. A file or folder of that whole name goes first.

        Without a weight, AnimateLCM's LoRA gets 0.8 and others 1.

        Raises:
            ExportError: the source is empty, or the weight is not a finite number.
        """
        source, separator, weight = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(text, lora_weight(text))
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not source or not isfinite(value):
            reason = f"{quoted(text)} is not allowed"
            if Path(text).suffix in SUFFIXES:
                reason = f"there is no file {quoted(text)}"
            remedy = "give PATH or PATH=WEIGHT with a number as the weight, such as lcm.safetensors=1.0"
            raise ExportError("lora", reason, remedy)
        return cls(source, value)


@dataclass(frozen=True, slots=True)
class Layers:
    """Low-rank layers under diffusers' names.

    Attributes:
        tensors: by names that begin with `unet.` or `text_encoder.`.
        alphas: of kohya's format, by diffusers' names.
        metadata: ranks and alphas, as trainers write them beside the tensors.
    """

    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float] | None = None
    metadata: dict[str, Any] | None = None

    def has(self, part: str) -> bool:
        """Whether there are weights for `unet` or `text_encoder`."""
        return any(name.startswith(f"{part}.") for name in self.tensors)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The content of a LoRA.

    Attributes:
        plain: layers whose product is added to the weights.
        decomposed: layers of a DoRA in kohya's format, whose sum with the weights is scaled by `magnitudes`.
        magnitudes: by kohya's names of the layers, such as `lora_unet_mid_block_attentions_0_proj_in`.
        factors: layers of LoHa, LoKr and LoCon with CP decomposition, by kohya's names.
    """

    plain: Layers
    decomposed: Layers
    magnitudes: dict[str, torch.Tensor]
    factors: dict[str, Factors]


def read_lora(lora: Lora) -> LoraWeights:
    """Reads a LoRA.

    Raises:
        ExportError: the LoRA cannot be read, is of a kind that cannot be fused, has values that are not finite, or has
            no weights for Stable Diffusion.
    """
    source = lora.source
    tensors, metadata = _read_source(source)
    tensors = diffusers_names(tensors)
    refuse_other_kinds(source, tensors)
    tensors = without_embeddings(source, tensors)
    tensors, factors = split_factors(source, tensors)
    check_pairs(source, tensors)
    tensors = with_all_alphas(tensors)
    scales = {name.removesuffix(_DORA): tensors.pop(name) for name in list(tensors) if name.endswith(_DORA)}
    if scales and not all(name.startswith(KOHYA) for name in scales):
        raise ExportError("lora", f"{quoted(source)} is a DoRA in unknown names", "give it in kohya's or PEFT's format")
    decomposed = {name: value for name, value in tensors.items() if name.split(".")[0] in scales}
    plain = {name: value for name, value in tensors.items() if name not in decomposed}
    weights = LoraWeights(_layers(source, plain, metadata), _layers(source, decomposed, None), scales, factors)
    if not weights.plain.tensors and not weights.decomposed.tensors and not factors:
        raise ExportError("lora", f"{quoted(source)} has no weights for a Stable Diffusion UNet or text encoder")
    return weights


def _layers(source: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None) -> Layers:
    if not tensors:
        return Layers({})
    try:
        with quiet():
            converted, alphas = StableDiffusionPipeline.lora_state_dict(dict(tensors), unet_config=_LAYERS)
    except Exception as error:  # other names than any trainer's
        raise cannot_load("lora", source, error) from None
    if not any(name.startswith(("unet.", "text_encoder.")) for name in converted):
        # saved from a UNet without its pipeline
        converted = {f"unet.{name}": value for name, value in converted.items() if "lora" in name}
    alphas = {_uniform(name): alpha for name, alpha in (alphas or {}).items()}
    return Layers({_uniform(name): value for name, value in converted.items()}, alphas, metadata)


def _read_source(source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Returns the tensors of a file, a folder or a hub repository, and what is known about ranks and alphas."""
    path = _file_in(Path(source)) if Path(source).is_dir() else source
    if path is None or (not is_file(path) and path.startswith((".", "/", "~"))):
        raise ExportError("lora", f"cannot load {quoted(source)}: no LoRA is there", "give a file, folder or hub name")
    if not is_file(path):
        path = _hub_file(source)
    weights = read_weights("lora", path)
    tensors = dict(weights.tensors)
    if any(name.startswith(_PEFT) for name in tensors):
        return _peft(path, tensors)
    text = weights.metadata.get(LORA_ADAPTER_METADATA_KEY)
    return tensors, json.loads(text) if text else None


def _hub_file(source: str) -> str:
    """Downloads the LoRA of a hub repository; the file is chosen as diffusers does, without the hub by its name."""

    def fetch() -> str:
        try:
            kinds = (".safetensors", ".bin")
            name = next(name for kind in kinds if (name := _best_guess_weight_name(source, file_extension=kind)))
        except ValueError:  # offline
            name = "pytorch_lora_weights.safetensors"
        return str(hf_hub_download(source, name))

    return attempt("lora", source, fetch)


def _file_in(folder: Path) -> str | None:
    """Returns the file of a LoRA in a folder, as diffusers or PEFT name it, or the only file of weights."""
    for name in ("pytorch_lora_weights", "adapter_model"):
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{name}{suffix}").is_file():
                return str(folder / f"{name}{suffix}")
    others = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    if len(others) > 1:
        raise ExportError("lora", f"{quoted(str(folder))} holds several files of weights", "give one of the files")
    return str(others[0]) if others else None


def _peft(path: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns what PEFT saved from a UNet or a text encoder; alpha lies in `adapter_config.json` beside."""
    config_file = find_file("lora", path).with_name("adapter_config.json")
    if not config_file.is_file():
        raise ExportError(
            "lora",
            f"{quoted(path)} was saved by PEFT, whose adapter_config.json is not beside it",
            "give the folder with both files",
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    part = "unet" if any("_blocks." in name or "mid_block." in name for name in tensors) else "text_encoder"
    kind = config.get("peft_type", "LORA")
    if kind in ("LOHA", "LOKR"):
        named = {name.removeprefix(_PEFT): value for name, value in tensors.items()}
        return peft_factors(named, KOHYA_PREFIX[part], config), {}
    if kind != "LORA":
        raise ExportError("lora", f"{quoted(path)} is a {kind}, which is not supported")
    return (
        {f"{part}.{name.removeprefix(_PEFT)}": value for name, value in tensors.items()},
        {f"{part}.{name}": value for name, value in config.items() if name in _PEFT_SETTINGS},
    )


_PEFT_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
    "lora_bias",
    "exclude_modules",
)


def _uniform(key: str) -> str:
    """Renames a key to one of diffusers' two spellings for text encoders: its loader drops keys if both occur.

    It also mends what diffusers makes of kohya's `motion_modules`.
    """
    key = key.replace(".motion.modules.", ".motion_modules.")
    if key.startswith("text_encoder."):
        for name in ("q", "k", "v", "out"):
            key = key.replace(f".to_{name}_lora.", f".{name}_proj.lora_linear_layer.")
    return key
