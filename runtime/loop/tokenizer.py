"""The CLIP tokenizer, from the bundle's tokenizer.json."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class ClipTokenizer:
    """Turns texts into token ids, truncated and padded to the length that the bundle was exported with."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, texts: list[str]) -> NDArray[np.int64]:
        """Token ids, int64 [B, 77]."""
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(texts)], np.int64)
