"""Words of textual inversions in the written tokenizer, compared with diffusers' pipelines."""

from pathlib import Path

import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from sparsectrl_lcm.benchmarks.random_checkpoints import write_tokenizer as write_clip_tokenizer
from sparsectrl_lcm.export.tokenizer import write_tokenizer
from sparsectrl_lcm.runtime.loop.tokenizer import ClipTokenizer
from tokenizers import AddedToken
from transformers import CLIPTokenizer

PROMPTS = ["a badhand", "badhand, red", "a <Cat-toy> on snow", "a red star", "badhands", "mybadhand", "a badhand_1 sky"]


@pytest.mark.parametrize("early", [False, True])
def test_a_word_stands_for_all_its_vectors(early: bool, tmp_path: Path) -> None:
    """Also words that the tokenizer splits off before it normalizes the text."""
    write_clip_tokenizer(tmp_path / "tokenizer")
    reference = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    words = ["badhand", "badhand_1", "badhand_2", "<Cat-toy>", "badhands", "badhands_1", "mybadhand"]
    reference.add_tokens([AddedToken(word, normalized=not early) for word in words])
    reference.save_pretrained(tmp_path / "saved")
    saved = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    write_tokenizer(saved, 77, tmp_path / "tokenizer.json")
    written = ClipTokenizer(tmp_path / "tokenizer.json")
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    for prompt in PROMPTS:
        text = convert(prompt, reference)
        expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert written([prompt])[0].tolist() == expected, prompt
    assert len(written(["a " + "badhand " * 40])[0]) == 77
