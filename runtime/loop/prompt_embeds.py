"""Prompt embeddings from runs of the text encoder: weights of tokens, and prompts of several chunks.

Source: the library compel (github.com/damian0815/compel) with its default settings, and with
`truncate_long_prompts=False` for several chunks.
"""

from collections.abc import Callable, Sequence
from math import pi, tan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokenizer import TokenizedPrompt

Array = NDArray[Any]

Encode = Callable[[NDArray[np.int64], NDArray[np.int64]], Array]
"""Runs the text encoder on chunks: input_ids and attention_mask, int64 [N, 77], to embeddings [N, 77, D]."""
_SMALLEST = 1e-5
"""Weights below this one count as this one: the weight of the prompt without a part would be infinite."""


def encode_prompts(prompts: Sequence[TokenizedPrompt], empty: NDArray[np.int64], encode: Encode) -> Array:
    """The embeddings of prompts, float32 [B, 77*K, D], where K are the chunks of the longest prompt.

    A shorter prompt is filled up with the embeddings of the empty one. Plain prompts take one call with their chunks
    alone.

    Args:
        prompts: the prompts.
        empty: the tokens of an empty prompt, int64 [1, 77].
        encode: called once with all chunks.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    runs = [(prompt.input_ids, np.ones_like(prompt.input_ids)) for prompt in prompts]
    for prompt in prompts:
        for first, last, _ in prompt.lowered:
            chunks = _chunks(prompt, first, last)  # the others are encoded already
            runs.append((prompt.input_ids[chunks], _mask_without(prompt, first, last)[chunks]))
    if any(prompt.weighted or len(prompt.input_ids) < longest for prompt in prompts):
        runs.append((empty, np.ones_like(empty)))
    embeds = encode(np.concatenate([ids for ids, _ in runs]), np.concatenate([mask for _, mask in runs]))
    parts = np.split(embeds, np.cumsum([len(ids) for ids, _ in runs])[:-1])
    others, empty_embeds = iter(parts[len(prompts) :]), parts[-1]

    rows = []
    for prompt, plain in zip(prompts, parts, strict=False):
        without = [next(others) for _ in prompt.lowered]
        encoded = _weighted(prompt, plain, without, empty_embeds) if prompt.weighted else plain
        rows.append(np.concatenate([*encoded, *[empty_embeds[0]] * (longest - len(encoded))]))
    return np.stack(rows)


def _chunks(prompt: TokenizedPrompt, first: int, last: int) -> slice:
    """The chunks that hold the tokens from `first` to `last`."""
    length = prompt.input_ids.shape[1]
    return slice(first // length, last // length + 1)


def _mask_without(prompt: TokenizedPrompt, first: int, last: int) -> NDArray[np.int64]:
    """An attention mask that hides a part. In several chunks, the beginning and last place of each stay visible."""
    mask = np.ones_like(prompt.input_ids)
    mask.flat[first : last + 1] = 0
    if len(mask) > 1:
        mask[:, [0, -1]] = 1
    return mask


def _weighted(prompt: TokenizedPrompt, plain: Array, without: list[Array], empty: Array) -> Array:
    """Applies the weights of a prompt.

    The embeddings move towards those of the prompt without each part of a weight w below 1: half of the way for 0.5,
    all of it for 0. Then the difference of each token to the empty prompt is multiplied by its weight.

    Args:
        prompt: the prompt.
        plain: embeddings of the whole prompt, [K, 77, D].
        without: for each lowered part those of its chunks without it, [k, 77, D].
        empty: of the empty prompt, [1, 77, D].
    """
    shares = [tan((1 - max(weight, _SMALLEST)) * pi / 2) for *_, weight in prompt.lowered]
    total = plain.astype(np.float64)
    for (first, last, _), share, embeds in zip(prompt.lowered, shares, without, strict=True):
        changed = plain.copy()
        changed[_chunks(prompt, first, last)] = embeds
        total += np.multiply(changed, share, dtype=np.float64)
    mean = total / np.sum([1.0, *shares])
    weights = prompt.weights[:, :, None]
    return np.where(weights == 1, mean, empty + (mean - empty) * weights).astype(np.float32)
