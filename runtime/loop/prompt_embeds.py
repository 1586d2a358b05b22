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

Encode = Callable[[NDArray[np.int64], NDArray[np.int64], int], Array]
"""Runs the text encoder on chunks: input_ids and attention_mask, int64 [N, 77], and clip_skip to embeddings [N, 77, D].
"""
_SMALLEST = 1e-5
"""Weights below this one count as this one: the weight of the prompt without a part would be infinite."""


def encode_prompts(prompts: Sequence[TokenizedPrompt], empty: NDArray[np.int64], encode: Encode) -> Array:
    """The embeddings of prompts, float32 [B, 77*K, D], where K are the chunks of the longest prompt.

    A shorter prompt is filled up with the embeddings of the empty one.

    Args:
        prompts: the prompts.
        empty: the tokens of an empty prompt, int64 [1, 77].
        encode: called once for each value of `clip_skip`, for plain prompts with their chunks alone.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    embeds: dict[int, list[Array]] = {}
    for clip_skip in dict.fromkeys(prompt.clip_skip for prompt in prompts):
        runs = {
            index: _runs(prompt, longest, empty)
            for index, prompt in enumerate(prompts)
            if prompt.clip_skip == clip_skip
        }
        ids, masks = zip(*(run for own in runs.values() for run in own), strict=True)
        found = encode(np.concatenate(ids), np.concatenate(masks), clip_skip)
        parts = iter(np.split(found, np.cumsum([len(chunks) for chunks in ids])[:-1]))
        embeds |= {index: [next(parts) for _ in own] for index, own in runs.items()}

    rows = []
    for index, prompt in enumerate(prompts):
        plain, *others = embeds[index]
        chunks = _weighted(prompt, plain, others[:-1], others[-1]) if prompt.weighted else plain
        padding = [others[-1][0]] * (longest - len(chunks)) if others else []
        rows.append(np.concatenate([*chunks, *padding]))
    return np.stack(rows)


def _runs(
    prompt: TokenizedPrompt, longest: int, empty: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The tokens and masks of a prompt, of its chunks without each lowered part, and of the empty one if needed."""
    seen = np.ones_like(prompt.input_ids)
    runs = [(prompt.input_ids, seen)]
    for first, last, _ in prompt.lowered:
        chunks = _chunks(prompt, first, last)
        runs.append((prompt.input_ids[chunks], _mask_without(prompt, first, last)[chunks]))
    if prompt.weighted or len(seen) < longest:
        runs.append((empty, np.ones_like(empty)))
    return runs


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
    scaled: Array = np.where(weights == 1, mean, empty + (mean - empty) * weights).astype(np.float32)
    return scaled
