"""Load a decoder from a file in TAESD's own format: weights numbered as the entries of an nn.Sequential.

The entries are the layers of diffusers' AutoencoderTiny, shifted by one: a clamp without weights comes first
(https://github.com/madebyollin/taesd, taesd.py).
"""

import re
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from .check import ExportError
from .sources import read_weights

SUFFIXES = (".safetensors", ".pth")

_CONVOLUTION = re.compile(r"(\d+)\.weight")
_BLOCK = re.compile(r"(\d+)\.conv\.0\.weight")


def load(path: Path) -> AutoencoderTiny:
    """Loads the decoder of a file into an AutoencoderTiny, whose encoder stays random.

    Raises:
        ExportError: the file's suffix is not in `SUFFIXES`, or it holds no decoder of TAESD.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError("tiny_decoder", f"{str(path)!r} is not a TAESD file", f"allowed are {' and '.join(SUFFIXES)}")
    weights = read_weights("tiny_decoder", str(path)).tensors
    convolutions, blocks = (_entries(weights, kind) for kind in (_CONVOLUTION, _BLOCK))
    refusal = ExportError(
        "tiny_decoder",
        f"{str(path)!r} holds no TAESD decoder",
        "give taesd_decoder.safetensors or taesd_decoder.pth",
    )
    if len(convolutions) < 2 or convolutions[0] != 1:  # an encoder starts with a convolution at 0
        raise refusal
    stages = [sum(start < block < end for block in blocks) for start, end in pairwise(convolutions)]
    first, last = weights["1.weight"], weights[f"{convolutions[-1]}.weight"]
    try:
        model = AutoencoderTiny(
            latent_channels=first.shape[1],
            out_channels=last.shape[0],
            decoder_block_out_channels=(first.shape[0],) * len(stages),
            num_decoder_blocks=tuple(stages),
        )
        model.decoder.layers.load_state_dict({_without_clamp(name): values.float() for name, values in weights.items()})
    except (IndexError, RuntimeError, ValueError):  # other names or shapes
        raise refusal from None
    return model


def _entries(weights: dict[str, torch.Tensor], kind: re.Pattern[str]) -> list[int]:
    """Returns the sorted numbers of the entries whose names match `kind`."""
    return sorted(int(found[1]) for name in weights if (found := kind.fullmatch(str(name))))


def _without_clamp(name: str) -> str:
    """3.conv.0.weight -> 2.conv.0.weight."""
    number, _, rest = name.partition(".")
    return f"{int(number) - 1}.{rest}"
