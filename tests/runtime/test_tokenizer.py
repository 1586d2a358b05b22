"""Token ids against transformers' CLIPTokenizer."""

import pytest
from conftest import Exported
from sparsectrl_lcm.runtime.loop.tokenizer import ClipTokenizer
from transformers import CLIPTokenizer

PROMPTS = [
    "",
    " ",
    "a red circle moves right",
    "A Red  CIRCLE\tmoves\nright, slowly... (photo:1.2)",
    "it's 12,345 o'clock & I'm done!?",
    "éàü ÅÄÖ ß 日本語 한국어 עברית 🙂🚀 \u200b zero\u200bwidth",
    "<|startoftext|> and <|endoftext|> in a prompt",
    "supercalifragilisticexpialidocious",
    "a " * 74 + "b",
    "a " * 75 + "b",
    "a " * 76,
    "large green triangle " * 60,
    "\x00\x01 control",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(sd15_like: Exported, prompt: str) -> None:
    reference = CLIPTokenizer.from_pretrained(sd15_like.checkpoints / "base" / "tokenizer")
    expected = reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert ClipTokenizer(sd15_like.bundle / "tokenizer.json")([prompt]).tolist() == [expected]


def test_a_batch(sd15_like: Exported) -> None:
    tokenizer = ClipTokenizer(sd15_like.bundle / "tokenizer.json")
    assert tokenizer(PROMPTS).shape == (len(PROMPTS), 77)
