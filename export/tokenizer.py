"""Write the CLIP tokenizer as one `tokenizer.json`."""

from pathlib import Path

from transformers import CLIPTokenizer

from .check import ExportError


def write_tokenizer(tokenizer: CLIPTokenizer, max_tokens: int, path: Path) -> None:
    """Writes `tokenizer.json`, which truncates and pads every prompt to `max_tokens`.

    Raises:
        ExportError: the checkpoint's tokenizer has no padding token.
    """
    backend = tokenizer.backend_tokenizer
    if tokenizer.pad_token is None or tokenizer.pad_token_id is None:
        raise ExportError("base", "its tokenizer has no padding token")
    backend.enable_truncation(max_tokens)
    backend.enable_padding(length=max_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.save(str(path))
