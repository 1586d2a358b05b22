"""LoHa, LoKr and LoCon with CP decomposition: the change of a weight, by the formulas of LyCORIS.

LyCORIS (Yeh et al. 2023, arXiv:2309.14859) is the trainer of these formats; kohya's trainers and PEFT write them, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .check import ExportError
from .sources import quoted

_W1, _W2 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
_LOCON = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
_KNOWN = {*_W1, *_W2, *_LOHA, *_CORES, *_LOCON, "alpha", "scale"}
_MARKS = (".hada_", ".lokr_", ".lora_mid.")
_ORIGINAL_BLOCKS = ("_input_blocks_", "_middle_block_", "_output_blocks_")


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a layer's change.

    Attributes:
        tensors: by LyCORIS' names, such as `hada_w1_a`.
    """

    tensors: dict[str, torch.Tensor]

    def change(self, source: str, name: str, shape: torch.Size) -> torch.Tensor:
        """Computes the change of a weight of a shape, float32.

        Args:
            source: of the LoRA, for errors.
            name: of the layer, for errors.
            shape: of the weight.

        Raises:
            ExportError: a factor is missing, or the factors give another shape.
        """
        try:
            product, rank = self._product()
            if len(product) != shape[0]:  # as many values in another order would be reshaped, too
                raise ValueError
            change = product.reshape(shape) * self._scale(rank)
        except KeyError as error:
            raise ExportError("lora", f"{quoted(source)} lacks {name}.{error.args[0]}"[:190]) from None
        except ZeroDivisionError:
            raise ExportError("lora", f"{quoted(source)} has rank 0 at {name[-40:]}") from None
        except (RuntimeError, ValueError, IndexError, TypeError):
            reason = f"{quoted(source)} is for another model: {name[-40:]} does not have the shape {tuple(shape)}"
            raise ExportError("lora", reason) from None
        return change

    def _scale(self, rank: int | None) -> float:
        """Returns what the product is multiplied by."""
        if "scale" in self.tensors:
            return float(self.tensors["scale"].item())
        alpha = self.tensors.get("alpha")
        return 1.0 if rank is None or alpha is None else float(alpha.item() / rank)

    def _product(self) -> tuple[torch.Tensor, int | None]:
        """Returns the change before scaling, and the rank that alpha is divided by; None if alpha does not count."""
        factors = {name: value.float() for name, value in self.tensors.items()}
        if any(name in factors for name in _LOHA):
            return _loha(factors), len(factors["hada_w1_b"])
        if any(name in factors for name in (*_W1, *_W2)):
            whole = "lokr_w1" in factors and "lokr_w2" in factors
            rank = None if whole else len(factors["lokr_w2_b" if "lokr_w2" not in factors else "lokr_w1_b"])
            return _lokr(factors), rank
        up, mid, down = (factors[name] for name in _LOCON)
        return _tucker(mid, up.flatten(1).T, down.flatten(1)), len(down)


def _loha(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns (w1_a @ w1_b) * (w2_a @ w2_b), each with a core in the middle if there is one."""
    w1_a, w1_b, w2_a, w2_b = (factors[name] for name in _LOHA)
    if any(name in factors for name in _CORES):
        return _tucker(factors["hada_t1"], w1_a, w1_b) * _tucker(factors["hada_t2"], w2_a, w2_b)
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def _lokr(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the Kronecker product of w1 [a, b] and w2 [c, d, ...], each whole or a product itself."""
    w1 = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        w2 = factors["lokr_w2"]
    elif "lokr_t2" in factors:
        w2 = _tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
    else:
        w2 = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2.contiguous())


def _tucker(core: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """core [r, r, kh, kw], out [r, O], into [r, I] -> [O, I, kh, kw]."""
    return torch.einsum("ijkl,ip,jr->prkl", core, out, into)


def split_factors(
    source: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Factors]]:
    """Returns the tensors of other layers, and the layers that have factors of LyCORIS by their names.

    Raises:
        ExportError: a layer has an unknown factor, or names that are not kohya's with diffusers' layers.
    """
    layers = {name.partition(".")[0] for name in tensors if any(mark in name for mark in _MARKS)}
    if "" in layers or any(not layer.startswith("lora_") for layer in layers):
        reason = f"{quoted(source)} is a LyCORIS in unknown names"
        raise ExportError("lora", reason, "give it in kohya's or PEFT's format")
    if any(block in layer for layer in layers for block in _ORIGINAL_BLOCKS):
        reason = f"{quoted(source)} is a LyCORIS in the names of the original UNet, which is not supported"
        raise ExportError("lora", reason, "give it in diffusers' names")
    found: dict[str, dict[str, torch.Tensor]] = {layer: {} for layer in sorted(layers)}
    others = {}
    for name, value in tensors.items():
        layer, _, part = name.partition(".")
        if layer not in layers or part == "dora_scale":
            others[name] = value
        elif part not in _KNOWN:
            raise ExportError("lora", f"{quoted(source)} has {name}, which is not supported"[:190])
        else:
            found[layer][part] = value
    return others, {layer: Factors(parts) for layer, parts in found.items()}


def peft_factors(
    tensors: Mapping[str, torch.Tensor], prefix: str, config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Renames the layers of PEFT's LoHa or LoKr to kohya's names, and adds the scale of each: PEFT's alpha / r."""
    named = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        key = f"{prefix}{layer.replace('.', '_')}"
        named[f"{key}.{part}"] = value
        alpha, rank = (
            patterns.get(get_pattern_key(patterns, layer), config[default])
            for patterns, default in (
                (config.get("alpha_pattern") or {}, "alpha"),
                (config.get("rank_pattern") or {}, "r"),
            )
        )
        named[f"{key}.scale"] = torch.tensor(alpha / rank, dtype=torch.float64)
    return named
