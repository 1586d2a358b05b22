"""Write the CLIP tokenizer as one `tokenizer.json`."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from .check import ExportError


def write_tokenizer(tokenizer: CLIPTokenizer, max_tokens: int, path: Path) -> None:
    """Writes `tokenizer.json`, which truncates and pads every prompt to `max_tokens`.

    The word of a textual inversion stands for all its vectors, as in diffusers' pipelines: `word word_1 word_2`.

    Raises:
        ExportError: the checkpoint's tokenizer has no padding token.
    """
    backend = _with_words_written_out(tokenizer.backend_tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token_id is None:
        raise ExportError("base", "its tokenizer has no padding token")
    backend.enable_truncation(max_tokens)
    backend.enable_padding(length=max_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.save(str(path))


def _with_words_written_out(backend: Tokenizer) -> Tokenizer:
    """Returns a tokenizer whose normalizer writes out the words of textual inversions with several vectors.

    The vector of the word itself is renamed to `word_0`. The library also normalizes the names of its tokens, which
    would write that one out, too.
    """
    state = json.loads(backend.to_str())
    tokens = {token["content"]: token for token in state["added_tokens"]}
    vectors = {word: [f"{word}_0"] for word in tokens if f"{word}_1" in tokens and f"{word}_0" not in tokens}
    if not vectors:
        return backend
    steps = state["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = steps["normalizers"] if steps["type"] == "Sequence" else [steps]
    lower = str.lower if any(step["type"] == "Lowercase" for step in steps) else str
    for word, parts in vectors.items():
        while f"{word}_{len(parts)}" in tokens:
            parts.append(f"{word}_{len(parts)}")
        for name in (word, *parts[1:]):  # the normalizer does not see tokens that are split off before it runs
            tokens[name] |= {"normalized": True, "special": False}
        tokens[word]["content"] = parts[0]
        longer = [lower(other) for other in tokens if lower(word) in lower(other) and other != word]
        pattern = {"Regex": _only(lower(word), longer)}
        steps = [*steps, {"type": "Replace", "pattern": pattern, "content": lower(" ".join(parts))}]
    state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(state))


def _only(word: str, longer: list[str]) -> str:
    """Returns a regular expression for `word` outside of longer words, and not followed by the number of a vector."""
    exceptions = ""
    for other in longer:
        before, _, after = other.partition(word)
        behind = f"(?<={re.escape(before)})" if before else ""
        exceptions += f"(?!{behind}{re.escape(word + after)})"
    return f"{exceptions}{re.escape(word)}(?!_\\d)"
