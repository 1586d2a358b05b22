"""Textual inversions (Gal et al. 2022, arXiv:2208.01618): vectors for tokens that are new to the base.

As in diffusers' `load_textual_inversion`, several vectors are the tokens `token`, `token_1`, `token_2` and so on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .check import ExportError
from .loading import attempt
from .original_formats import describe
from .sources import SUFFIXES, Weights, check_finite, find_file, is_file, quoted, read_content

FIELD = "embedding"
_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""Files in folders and on the hub, as diffusers looks for them."""
_WITHOUT_TOKEN = "emb_params"
"""The key under which files in safetensors format keep vectors without their token."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A file, folder or hub name of a textual inversion, and its token in prompts; None takes the token of the file."""

    source: str
    token: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Embedding":
        """Reads `SOURCE` or `SOURCE=TOKEN`. A file or folder of that whole name goes first.

        Raises:
            ExportError: the source or the token is empty, or there is no file of that name.
        """
        source, separator, token = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(text)
        if Path(token).suffix in SUFFIXES and not Path(source).exists():
            raise ExportError(FIELD, f"there is no file {quoted(text)}", "give FILE or FILE=TOKEN")
        if not source or not token.strip():
            raise ExportError(FIELD, f"{quoted(text)} is not allowed", "give FILE or FILE=TOKEN")
        return cls(source, token.strip())


@dataclass(frozen=True, slots=True)
class Inversion:
    """The content of a textual inversion.

    Attributes:
        token: in prompts; stands for all vectors.
        vectors: float32 [n, D].
    """

    token: str
    vectors: torch.Tensor

    def tokens(self) -> list[str]:
        """Returns the token of each vector, by diffusers' names."""
        return [self.token, *(f"{self.token}_{index}" for index in range(1, len(self.vectors)))]


def read_vectors(embedding: Embedding) -> Inversion:
    """Reads a textual inversion in the format of AUTOMATIC1111's web UI or of diffusers.

    A file without a token in it is called by its name, as in that web UI.

    Raises:
        ExportError: the file cannot be read, is something else, or has values that are not finite.
    """
    source = embedding.source
    path = find_file(FIELD, _file_of(source))
    content, _ = read_content(FIELD, source, path)
    token, vectors = _token_and_vectors(source, content)
    token = embedding.token or (token or "").strip() or path.stem
    vectors = vectors.detach().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.numel():
        raise ExportError(
            FIELD, f"{quoted(source)}: its vectors have shape {tuple(vectors.shape)}, expected [n, width]"
        )
    check_finite(FIELD, {token: vectors}, lambda _: source)
    return Inversion(token, vectors)


def _file_of(source: str) -> str:
    """Returns the file of a folder or of a hub repository."""
    if is_file(source):
        return source
    folder = Path(source)
    if folder.is_dir():
        files = [folder / name for name in _NAMES if (folder / name).is_file()]
        files = files or [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
        if not files or (len(files) > 1 and files[0].name not in _NAMES):
            count = "several files" if files else "no file"
            raise ExportError(FIELD, f"{quoted(source)} holds {count} of weights", "give one file")
        return str(files[0])
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ExportError(FIELD, f"cannot load {quoted(source)}: no such file", "give a file, folder or hub name")

    def fetch() -> str:
        try:
            return str(hf_hub_download(source, _NAMES[0]))
        except Exception:  # most older repositories have the other file
            return str(hf_hub_download(source, _NAMES[1]))

    return attempt(FIELD, source, fetch)


def _token_and_vectors(source: str, content: Any) -> tuple[str | None, torch.Tensor]:
    """Returns the vectors of a file, and its token if it has one.

    Raises:
        ExportError: the file holds something else.
    """
    if isinstance(content, torch.Tensor):
        return None, content
    entries = content if isinstance(content, Mapping) else {}
    if isinstance(parameters := entries.get("string_to_param"), Mapping):  # AUTOMATIC1111's
        found = [value for value in parameters.values() if isinstance(value, torch.Tensor)]
        if len(found) == 1:
            name = entries.get("name")
            return (name if isinstance(name, str) and name else None), found[0]
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    if len(entries) == len(tensors) == 1 and _kind(tensors) is None:
        token, vectors = next(iter(tensors.items()))
        return (None if token == _WITHOUT_TOKEN else token), vectors
    raise ExportError(FIELD, f"{quoted(source)} holds {_other(tensors)}", "give a textual inversion for one token")


def _other(tensors: Mapping[str, torch.Tensor]) -> str:
    """Says what a file holds that is no textual inversion."""
    if tensors.keys() & {"clip_g", "clip_l"}:
        return "a textual inversion for Stable Diffusion XL"
    if not tensors:
        return "no vectors"
    return f"{_kind(tensors) or f'{len(tensors)} tensors'}, not a textual inversion"


def _kind(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Says what weights are, judged by their names; None if it is unknown."""
    kind = describe(Weights(dict(tensors), {}, {}))
    return None if kind == "other weights" else kind


def add_tokens(tokenizer: CLIPTokenizer, embeddings: Sequence[Embedding]) -> None:
    """Adds the tokens of textual inversions to a tokenizer.

    Raises:
        ExportError: a file cannot be read, or a token exists already.
    """
    for embedding in embeddings:
        known = tokenizer.get_vocab()
        for token in read_vectors(embedding).tokens():
            if token in known:
                raise ExportError(
                    FIELD,
                    f"{quoted(embedding.source)}: the tokenizer has a token {quoted(token)} already",
                    "choose another one: FILE=TOKEN",
                )
            tokenizer.add_tokens(token)


def add_vectors(model: CLIPTextModel, tokenizer: CLIPTokenizer, embeddings: Sequence[Embedding]) -> None:
    """Gives a text encoder the vectors of textual inversions, whose tokens `tokenizer` has."""
    layer = model.get_input_embeddings()
    assert isinstance(layer, nn.Embedding)
    for inversion in map(read_vectors, embeddings):
        rows = torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in inversion.tokens()])
        old = layer.weight.detach()
        weight = old.new_zeros(max(len(old), int(rows.max()) + 1), old.shape[1])
        weight[: len(old)] = old
        weight[rows] = inversion.vectors
        layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.num_embeddings = model.config.vocab_size = len(layer.weight)
