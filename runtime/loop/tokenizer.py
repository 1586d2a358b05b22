"""The CLIP tokenizer, from the bundle's tokenizer.json: prompts as chunks of tokens with weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checked_request import CheckedRequest
from ..errors import InvalidRequest
from ..request_warnings import request_log, warn
from .prompt_syntax import Fragment, parse_weights

MAX_CHUNKS = 10
"""The attention to the text takes memory in proportion to its chunks."""
_ENDS: tuple[Callable[[str], bool], ...] = (
    frozenset({".</w>"}).__contains__,
    frozenset({".</w>", ",</w>", ";</w>", ":</w>"}).__contains__,
    lambda token: token.endswith("</w>"),
)
"""Whether a token ends a sentence, a phrase, a word."""
_SHOWN = 80
"""Characters of a dropped text that a warning shows."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """A prompt as the text encoder takes it: K chunks of 77 tokens, each with its own beginning and end.

    Attributes:
        input_ids: int64 [K, 77].
        weights: of each token, float32 [K, 77].
        lowered: each part whose weight is below 1: its first and last token, counted through all chunks, and the
            weight.
        clip_skip: last layers of the text encoder that are skipped.
    """

    input_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    lowered: tuple[tuple[int, int, float], ...] = ()
    clip_skip: int = 0

    @property
    def weighted(self) -> bool:
        """Whether any weight is not 1."""
        return bool((self.weights != 1).any())


class ClipTokenizer:
    """Turns texts into tokens, in chunks of the length that the bundle was exported with."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(path))
        truncation, padding = self._tokenizer.truncation, self._tokenizer.padding
        assert truncation is not None and padding is not None, "every exported tokenizer has both"
        self.length: int = truncation["max_length"]
        self._padding: int = padding["pad_id"]
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._begin, self._end = self._tokenizer.encode("").ids
        self._log_once = lru_cache(maxsize=64)(request_log.warning)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids of plain texts, each cut to one chunk, int64 [B, 77]."""
        return np.concatenate([self.tokenize(text).input_ids for text in texts])

    def prompts(self, request: CheckedRequest) -> list[TokenizedPrompt]:
        """The prompts that the UNet sees; with guidance the negative prompt comes first.

        As in diffusers, no layer is skipped for the negative prompt.

        Raises:
            InvalidRequest: a prompt is too long even for several chunks.
        """
        prompts = [
            self.tokenize(text, weighted=request.prompt_weights, long=request.long_prompts) for text in request.texts
        ]
        prompts[-1] = replace(prompts[-1], clip_skip=request.clip_skip)
        chunks = max(len(prompt.input_ids) for prompt in prompts)
        if chunks > MAX_CHUNKS:
            reason = f"a prompt takes {chunks} chunks of tokens"
            raise InvalidRequest("long_prompts", reason, f"allowed are at most {MAX_CHUNKS}")
        return prompts

    def tokenize(self, text: str, *, weighted: bool = False, long: bool = False) -> TokenizedPrompt:
        """The tokens of a prompt.

        Args:
            text: the prompt.
            weighted: whether brackets in it are weights.
            long: whether it may take several chunks. If not, it is cut, and a warning names what is dropped.
        """
        fragments = parse_weights(text) if weighted else [Fragment(text, 1.0)]
        encoded = self._tokenizer.encode_batch([part.text for part in fragments], add_special_tokens=False)
        ids = [token for part in encoded for token in part.ids]
        weights = [fragment.weight for fragment, part in zip(fragments, encoded, strict=True) for _ in part.ids]
        sizes = self._chunk_sizes(ids) if long else [min(len(ids), self.length - 2)]
        if len(ids) > sum(sizes):
            self._tell_cut(fragments, encoded, sizes[0])

        tokens = np.full((len(sizes), self.length), self._padding, np.int64)
        tokens[:, 0] = self._begin
        tokens[np.arange(len(sizes)), np.add(sizes, 1)] = self._end
        places = np.full(len(ids), self.length - 1)  # of each token in the chunks; the end stands for all dropped ones
        kept = [chunk * self.length + place for chunk, size in enumerate(sizes) for place in range(1, size + 1)]
        places[: len(kept)] = kept
        tokens.flat[kept] = ids[: len(kept)]
        scales = np.ones(tokens.shape, np.float32)
        scales.flat[kept] = weights[: len(kept)]
        return TokenizedPrompt(tokens, scales, tuple(self._lowered(fragments, encoded, places)))

    def _chunk_sizes(self, ids: list[int]) -> list[int]:
        """The tokens of each chunk. A chunk ends with a sentence, or else a phrase, or else a word.

        Source: the library compel.
        """
        sizes = []
        while len(ids) > self.length - 2:
            names = [self._tokenizer.id_to_token(token) for token in ids[: self.length - 2]]
            ends = ([place for place, name in enumerate(names, start=1) if is_end(name)] for is_end in _ENDS)
            sizes.append(next((found[-1] for found in ends if found), len(names)))
            ids = ids[sizes[-1] :]
        return [*sizes, len(ids)]

    def _lowered(
        self, fragments: list[Fragment], encoded: list[Any], places: NDArray[np.int64]
    ) -> list[tuple[int, int, float]]:
        """The parts with a weight below 1, as in `TokenizedPrompt`; without those that are dropped."""
        found, start = [], 0
        for fragment, part in zip(fragments, encoded, strict=True):
            own = places[start : start + len(part.ids)]
            start += len(part.ids)
            if fragment.weight < 1 and len(own) and own[0] != self.length - 1:
                found.append((int(own[0]), int(own[-1]), fragment.weight))
        return found

    def _tell_cut(self, fragments: list[Fragment], encoded: list[Any], kept: int) -> None:
        """Warns of the text of the tokens after the first `kept`; logged once for a prompt."""
        dropped = ""
        for fragment, part in zip(fragments, encoded, strict=True):
            if kept < len(part.ids):
                dropped += fragment.text[part.offsets[kept][0] if kept else 0 :]
            elif dropped:  # spaces between parts are no tokens
                dropped += fragment.text
            kept = max(kept - len(part.ids), 0)
        dropped = dropped.strip()
        shown = dropped if len(dropped) <= _SHOWN else f"{dropped[:_SHOWN]}..."
        told = f"a prompt is cut to {self.length} tokens: {shown!r} is dropped; long_prompts keeps it"
        warn("prompt that is cut", told, self._log_once)
