"""Prompts with weights and of several chunks, against the library compel on the same text encoder."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel, DiffusersTextualInversionManager, ReturnedEmbeddingsType
from diffusers.loaders import TextualInversionLoaderMixin
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, randomize, text_encoder
from sparsectrl_lcm.benchmarks.random_checkpoints import write_tokenizer as write_clip_tokenizer
from sparsectrl_lcm.export.tokenizer import write_tokenizer
from sparsectrl_lcm.export.traced_modules import TextEncoder
from sparsectrl_lcm.runtime.loop.prompt_embeds import encode_prompts
from sparsectrl_lcm.runtime.loop.tokenizer import ClipTokenizer
from transformers import CLIPTextModel, CLIPTokenizer

Both = SimpleNamespace


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """This project's tokenizer and traced text encoder, and transformers' for compel; one word has three vectors."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder / "clip")
    reference = CLIPTokenizer.from_pretrained(folder / "clip")
    reference.add_tokens(["badhand", "badhand_1", "badhand_2"])
    write_tokenizer(reference, 77, folder / "tokenizer.json")
    model = randomize(text_encoder(Architecture(text_layers=3), len(reference)), seed=0)
    assert isinstance(model, CLIPTextModel)
    model.config.eos_token_id = model.eos_token_id = reference.eos_token_id
    model.__dict__["text_model"] = model  # compel looks for the last norm there
    return Both(tokenizer=reference, model=model, ours=ClipTokenizer(folder / "tokenizer.json"))


def ours(both: Both, prompts: list[str], clip_skip: int = 0, **options: bool) -> np.ndarray:
    graph = TextEncoder(both.model)

    @torch.no_grad()
    def encode(ids: np.ndarray, mask: np.ndarray, clip_skip: int) -> np.ndarray:
        found: np.ndarray = graph(*map(torch.from_numpy, (ids, mask, np.array([clip_skip])))).numpy()
        return found

    tokenized = [replace(both.ours.tokenize(text, **options), clip_skip=clip_skip) for text in prompts]
    return encode_prompts(tokenized, both.ours([""]), encode)


def compels(both: Both, prompts: list[str], **options: Any) -> np.ndarray:
    pipe = SimpleNamespace(
        tokenizer=both.tokenizer, maybe_convert_prompt=TextualInversionLoaderMixin().maybe_convert_prompt
    )
    compel = Compel(both.tokenizer, both.model, DiffusersTextualInversionManager(pipe), **options)
    found: np.ndarray = compel(prompts).numpy()
    return found


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= 1e-4


WEIGHTS = [
    ("a red circle moves right", "a red circle moves right"),
    ("a (red:1.3) circle (moves right)", "a (red)1.3 circle (moves right)1.1"),
    ("a (red:0.4) circle", "a (red)0.4 circle"),
    ("a (red:0) circle on [snow], (night:0.7)", "a (red)0 circle on (snow)0.9090909, (night)0.7"),
    ("a ((red) circle:1.4) [moves]", "a ((red)1.1 circle)1.4 (moves)0.9090909"),
    (r"a \(red\) (circle:1.2)", r"a \(red\) (circle)1.2"),
    ("a (badhand:0.6) of a (badhand:1.5)", "a (badhand)0.6 of a (badhand)1.5"),
    (
        "a red star " * 24 + "(blue star sea sky:0.5) (snow:0.3)",
        "a red star " * 24 + "(blue star sea sky)0.5 (snow)0.3",
    ),
]


@pytest.mark.parametrize(("prompt", "equivalent"), WEIGHTS)
def test_weights_are_those_of_compel(both: Both, prompt: str, equivalent: str) -> None:
    """The last prompt is cut within a part whose weight is below 1."""
    prompts = ["", prompt]
    expected = compels(both, ["", equivalent])
    assert_close(ours(both, prompts, weighted=True), expected)
    if prompt != equivalent:
        assert np.abs(ours(both, prompts) - expected).max() > 1e-2, "plain text gives something else"


def test_weights_with_clip_skip(both: Both) -> None:
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED
    expected = compels(both, ["a (red)1.3 (circle)0.5"], returned_embeddings_type=kind)
    assert_close(ours(both, ["a (red:1.3) (circle:0.5)"], clip_skip=1, weighted=True), expected)


LONG = [
    ["a red circle moves right. " * 20, "night"],
    ["night", "a red circle moves right, slowly; " * 30],
    ["a small green star over snow " * 15],
    ["x" * 200],
    ["badhand " * 30, "a red circle " * 25 + "badhand sky " * 60],
    ["a red star " * 25],
]


@pytest.mark.parametrize("prompts", LONG, ids=range(len(LONG)))
def test_long_prompts_are_those_of_compel(both: Both, prompts: list[str]) -> None:
    """Chunks end with sentences, phrases, words, or within one; 75 tokens are one chunk; vectors count one by one."""
    expected = compels(both, prompts, truncate_long_prompts=False)
    assert_close(ours(both, prompts, long=True), expected)
    short = np.asarray(prompts == LONG[-1])
    assert (expected.shape[1] == 77) == short


def test_weights_across_chunks(both: Both) -> None:
    """A part with a low weight goes over the end of a chunk that is not full."""
    start, middle, end = "a red circle. " * 14, "green star on snow. " * 5 + "blue sea", "sky " * 90
    prompt = f"{start}({middle}:0.5) (night:1.4) {end}(day:0.2)"
    equivalent = f"{start}({middle})0.5 (night)1.4 {end}(day)0.2"
    expected = compels(both, [equivalent, "a (star)1.2"], truncate_long_prompts=False)
    assert_close(ours(both, [prompt, "a (star:1.2)"], weighted=True, long=True), expected)


def test_plain_prompts_take_one_run_of_their_own_chunks_alone(both: Both) -> None:
    runs = []

    def encode(ids: np.ndarray, mask: np.ndarray, clip_skip: int) -> np.ndarray:
        runs.append((ids, mask))
        assert clip_skip == 0
        return np.random.default_rng(0).standard_normal((*ids.shape, 5)).astype(np.float32)

    prompts = ["a (red:1.3) star", "night"]
    encode_prompts(list(map(both.ours.tokenize, prompts)), both.ours([""]), encode)
    ((ids, mask),) = runs
    assert (ids == both.ours(prompts)).all()
    assert mask.shape == ids.shape
    assert (mask == 1).all()


def test_parts_with_low_weights_take_runs_of_their_own_chunks_alone(both: Both) -> None:
    """Not of all chunks: a prompt of hundreds of such parts would take gigabytes."""
    runs = []

    def encode(ids: np.ndarray, mask: np.ndarray, clip_skip: int) -> np.ndarray:
        runs.append(len(ids))
        return np.random.default_rng(0).standard_normal((*ids.shape, 5)).astype(np.float32)

    prompt = both.ours.tokenize("a red circle. (blue:0.5) star. " * 40, weighted=True, long=True)
    chunks, inside = len(prompt.input_ids), {first // 77 == last // 77 for first, last, _ in prompt.lowered}
    assert chunks > 3
    assert inside == {True}
    encode_prompts([prompt], both.ours([""]), encode)
    assert runs == [chunks + 40 + 1]


def test_a_prompt_that_is_cut_is_told_once(both: Both, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    write_tokenizer(both.tokenizer, 77, tmp_path / "tokenizer.json")
    tokenize = ClipTokenizer(tmp_path / "tokenizer.json").tokenize
    long = "A  red circle " * 24 + "on the white Snow, (at night)"
    with caplog.at_level(logging.WARNING):
        for read in (partial(tokenize, long=True), tokenize, tokenize):
            read(long)
        tokenize("a red circle " * 25)
        tokenize("(a red circle:1.1) " * 25 + "[blue Star] \\(sea\\)", weighted=True)
        tokenize("(a red circle:1.1) " * 25 + "[blue] (Star) [sea]", weighted=True)
    remedy = "is dropped; long_prompts keeps it"
    assert caplog.messages == [
        f"a prompt is cut to 77 tokens: 'Snow, (at night)' {remedy}",
        f"a prompt is cut to 77 tokens: 'blue Star (sea)' {remedy}",
        f"a prompt is cut to 77 tokens: 'blue Star sea' {remedy}",
    ]
