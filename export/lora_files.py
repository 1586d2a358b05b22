"""Read a LoRA of any trainer under diffusers' names, and refuse what cannot be fused right, by its kind."""

import json
import logging
import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, _best_guess_weight_name
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from huggingface_hub import hf_hub_download

from .check import ExportError
from .loading import attempt, quiet
from .sources import SUFFIXES, cannot_load, find_file, is_file, quoted, read_weights

_logger = logging.getLogger("sparsectrl_lcm")
_ADAPTER_NAME = re.compile(r"(\.lora_(?:[AB]|magnitude_vector))\.(?!weight$|bias$)[^.]+((?:\.(?:weight|bias))?)$")
_EMBEDDINGS = "bundle_emb."
_UNSUPPORTED = {
    ".hada_": "a LoHa",
    ".lokr_": "a LoKr",
    ".lora_mid": "a LoCon with CP decomposition",
    ".oft_": "an OFT",
    ".glora": "a GLoRA",
    ".on_input": "an IA3",
    ".diff": "a full difference (LyCORIS)",
}
_PEFT = "base_model.model."
_LAYERS = SimpleNamespace(layers_per_block=2)
"""What diffusers needs to rename layers in the original names of Stable Diffusion 1.5's UNet."""
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
_DORA = ".dora_scale"
_DOWN_UP = ((".lora_down.", ".lora_up."), (".lora_A.", ".lora_B."), (".down.", ".up."), ("_lora.down.", "_lora.up."))
_PAIRS = (*_DOWN_UP, *((up, down) for down, up in _DOWN_UP))
_MOTION = re.compile(r"(?:\.processor)?\.(to_(?:q|k|v|out))_lora\.(down|up)\.")
_SIDES = {"down": "A", "up": "B"}


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, folder or hub name, and the weight it is fused with."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Reads `SOURCE` or `SOURCE=WEIGHT`. A file or folder of that whole name goes first.

        Raises:
            ExportError: the source is empty, or the weight is not a finite number.
        """
        source, separator, weight = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(text)
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
    """

    plain: Layers
    decomposed: Layers
    magnitudes: dict[str, torch.Tensor]


def read_lora(lora: Lora) -> LoraWeights:
    """Reads a LoRA.

    Raises:
        ExportError: the LoRA cannot be read, is of a kind that cannot be fused, has values that are not finite, or has
            no weights for Stable Diffusion.
    """
    source = lora.source
    tensors, metadata = _read_source(source)
    tensors = {_diffusers_name(name): value for name, value in tensors.items()}
    _refuse_other_kinds(source, tensors)
    tensors = _without_embeddings(source, tensors)
    _check_pairs(source, tensors)
    tensors = _with_all_alphas(tensors)
    scales = {name.removesuffix(_DORA): tensors.pop(name) for name in list(tensors) if name.endswith(_DORA)}
    if scales and not all(name.startswith(_KOHYA) for name in scales):
        raise ExportError("lora", f"{quoted(source)} is a DoRA in unknown names", "give it in kohya's or PEFT's format")
    decomposed = {name: value for name, value in tensors.items() if name.split(".")[0] in scales}
    plain = {name: value for name, value in tensors.items() if name not in decomposed}
    weights = LoraWeights(_layers(source, plain, metadata), _layers(source, decomposed, None), scales)
    if not weights.plain.tensors and not weights.decomposed.tensors:
        raise ExportError("lora", f"{quoted(source)} has no weights for a Stable Diffusion UNet or text encoder")
    return weights


def _diffusers_name(name: str) -> str:
    """Removes the name of the adapter from PEFT's names, and renames the layers of original motion LoRAs."""
    name = _ADAPTER_NAME.sub(r"\1\2", name)
    if ".temporal_transformer." not in name and "motion_modules" not in name:
        return name
    name = next(iter(convert_animatediff_checkpoint_to_diffusers({name.removeprefix("module."): None})), name)
    name = _MOTION.sub(
        lambda found: f".{'to_out.0' if found[1] == 'to_out' else found[1]}.lora_{_SIDES[found[2]]}.", name
    )
    return name if name.startswith("unet.") else f"unet.{name}"


def _refuse_other_kinds(source: str, tensors: dict[str, torch.Tensor]) -> None:
    for part, kind in _UNSUPPORTED.items():
        if any(part in name for name in tensors):
            raise ExportError("lora", f"{quoted(source)} is {kind}, which is not supported", "give a plain LoRA")
    if all(any(part in name for name in tensors) for part in ("lora_unet_input_blocks_", "lora_unet_down_blocks_")):
        raise ExportError("lora", f"{quoted(source)} mixes the names of two formats", "give a LoRA of one trainer")
    if any(name.startswith("lora_te2_") for name in tensors):
        raise ExportError(
            "lora", f"{quoted(source)} is a LoRA for Stable Diffusion XL", "give one for Stable Diffusion 1.5"
        )


def _without_embeddings(source: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves out textual inversions that lie in the file, and tells so."""
    words = sorted({name.split(".")[1] for name in tensors if name.startswith(_EMBEDDINGS)})
    if words:
        _logger.warning(
            "lora: %s also holds textual inversions, which are left out: %s", Path(source).name, ", ".join(words)
        )
    return {name: value for name, value in tensors.items() if not name.startswith(_EMBEDDINGS)}


def _check_pairs(source: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ExportError if one of the two matrices of a layer is missing."""
    for name in tensors:
        for one, other in _PAIRS:
            if one in name and name.endswith("weight") and name.replace(one, other) not in tensors:
                raise ExportError("lora", f"{quoted(source)} lacks {name.replace(one, other)}", "give a whole LoRA")


def _with_all_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Applies alphas under diffusers' names; in kohya's, adds those of layers without: their alpha is the rank.

    diffusers would drop the former, and give the latter the commonest alpha.
    """
    alphas = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
    if not alphas:
        return tensors
    if all(name.startswith(_KOHYA) for name in tensors):
        downs = {name.split(".")[0]: value for name, value in tensors.items() if ".lora_down." in name}
        return tensors | {
            f"{name}.alpha": torch.tensor(float(down.shape[0]))
            for name, down in downs.items()
            if f"{name}.alpha" not in alphas
        }
    scaled = {name: value for name, value in tensors.items() if name not in alphas}
    for name, alpha in alphas.items():
        stem = name.removesuffix("alpha")
        for up in [key for key in scaled if key.startswith(stem) and any(part in key for _, part in _DOWN_UP)]:
            scaled[up] = scaled[up] * (alpha.item() / scaled[up].shape[1])
    return scaled


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
    config = json.loads(config_file.read_text())
    if config.get("peft_type", "LORA") != "LORA":
        raise ExportError("lora", f"{quoted(path)} is a {config['peft_type']}, which is not supported")
    part = "unet" if any("_blocks." in name or "mid_block." in name for name in tensors) else "text_encoder"
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
    """Renames a key of the text encoder to one of diffusers' two spellings: its loader drops keys if both occur."""
    if key.startswith("text_encoder."):
        for name in ("q", "k", "v", "out"):
            key = key.replace(f".to_{name}_lora.", f".{name}_proj.lora_linear_layer.")
    return key
