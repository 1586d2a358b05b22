"""Textual inversions given to an export, compared with diffusers' `load_textual_inversion`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_base, write_motion_adapter
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_text_encoder, load_tokenizer
from sparsectrl_lcm.export.dry_run import dry_run
from sparsectrl_lcm.export.embeddings import Embedding, read_vectors
from sparsectrl_lcm.export.options import ExportOptions
from sparsectrl_lcm.export.plan import read_parts
from sparsectrl_lcm.export.tokenizer import write_tokenizer
from sparsectrl_lcm.runtime.loop.tokenizer import ClipTokenizer

WIDTH = 48
PROMPTS = {
    "a badhand": None,
    "badhand, red <cat-toy> sky": None,
    "a Style of snow": "a Style Style_1 of snow",
    "a badhand_1": None,
    "<dog> bare": None,
}
"""Prompts with all vectors written out; None leaves that to diffusers, which with transformers 5 misses capitals."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base"), Architecture(channels=(16, 16)), 0))


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_motion_adapter(tmp_path_factory.mktemp("motion"), Architecture(channels=(16, 16)), 1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def automatic1111(name: str, vectors: torch.Tensor) -> dict[str, Any]:
    """As the web UI saves it."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": name,
        "step": 499,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("embeddings")
    torch.save(automatic1111("badhand", random(3, WIDTH)), folder / "badhand.pt")
    torch.save({"<cat-toy>": random(WIDTH, seed=1)}, folder / "learned_embeds.bin")
    save_file({"emb_params": random(2, WIDTH, seed=2).half()}, folder / "Style.safetensors")
    save_file({"<dog>": random(1, WIDTH, seed=3)}, folder / "dog=1.safetensors")
    torch.save(random(2, WIDTH, seed=4), folder / "bare.pt")
    return {path.name: path for path in folder.iterdir()}


def test_ids_and_embeddings_are_those_of_diffusers(base: str, files: dict[str, Path], tmp_path: Path) -> None:
    """In all formats at once, also when they are saved in the base."""
    given = {"badhand.pt": None, "learned_embeds.bin": None, "Style.safetensors": "Style", "dog=1.safetensors": None}
    given["bare.pt"] = "bare"
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    for name, token in given.items():
        pipeline.load_textual_inversion(str(files[name]), token=token)
    embeddings = [Embedding.parse(str(files[name])) for name in given]
    tokenizer = load_tokenizer(base, embeddings=embeddings)
    write_tokenizer(tokenizer, 77, tmp_path / "tokenizer.json")
    encoder = load_text_encoder(base, [], embeddings=embeddings)
    compare(pipeline, ClipTokenizer(tmp_path / "tokenizer.json"), encoder)

    pipeline.save_pretrained(tmp_path / "baked")
    write_tokenizer(load_tokenizer(str(tmp_path / "baked")), 77, tmp_path / "baked.json")
    encoder = load_text_encoder(str(tmp_path / "baked"), [])
    compare(pipeline, ClipTokenizer(tmp_path / "baked.json"), encoder)
    with pytest.raises(ExportError, match="has a token 'badhand' already; choose another one: FILE=TOKEN"):
        load_tokenizer(str(tmp_path / "baked"), embeddings=embeddings)
    other = [Embedding.parse(f"{files['badhand.pt']}=worse")]
    grown = load_text_encoder(str(tmp_path / "baked"), [], embeddings=other).get_input_embeddings().weight
    assert torch.equal(grown[:-3], encoder.get_input_embeddings().weight)
    assert torch.equal(grown[-3:], random(3, WIDTH))


def compare(pipeline: Any, tokenizer: ClipTokenizer, encoder: Any) -> None:
    for prompt, written in PROMPTS.items():
        text = written or pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert tokenizer([prompt])[0].tolist() == ids[0].tolist(), prompt
        with torch.no_grad():
            expected, found = pipeline.text_encoder(ids)[0], encoder(ids)[0]
        assert torch.equal(found, expected), prompt


def test_tokens_of_files_folders_and_options(files: dict[str, Path], tmp_path: Path) -> None:
    assert read_vectors(Embedding(str(files["badhand.pt"]))).tokens() == ["badhand", "badhand_1", "badhand_2"]
    assert read_vectors(Embedding.parse(f"{files['badhand.pt']}=hand")).token == "hand"
    assert Embedding.parse(str(files["dog=1.safetensors"])) == Embedding(str(files["dog=1.safetensors"]))
    assert Embedding.parse(f"{files['dog=1.safetensors']}=dog").token == "dog"
    (tmp_path / "cat").mkdir()
    shutil.copy(files["learned_embeds.bin"], tmp_path / "cat")
    assert read_vectors(Embedding(str(tmp_path / "cat"))).token == "<cat-toy>"


LORA = {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}
REFUSED: dict[str, Any] = {
    "is for another model: its vectors have 1024 values, the base's 48": automatic1111("x", torch.ones(2, 1024)),
    "holds a LoRA in kohya's names, not a textual inversion": LORA,
    "holds a textual inversion for Stable Diffusion XL": {"clip_g": torch.ones(1, 1280), "clip_l": torch.ones(1, 768)},
    "holds 2 tensors, not a textual inversion": {"a": torch.ones(1, WIDTH), "b": torch.ones(1, WIDTH)},
    "holds no vectors": {"string_to_param": {}},
    "has a token 'star</w>' already": {"star</w>": torch.ones(1, WIDTH)},
    "has values that are NaN or infinite": {"new": torch.full((1, WIDTH), torch.nan)},
    r"its vectors have shape \(1, 2, 48\), expected \[n, width\]": {"new": torch.ones(1, 2, WIDTH)},
    "it holds code besides weights": {"new": torch.ones(1, WIDTH), "path": Path("code")},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_textual_inversion_is_named(reason: str, base: str, motion: str, tmp_path: Path) -> None:
    torch.save(REFUSED[reason], tmp_path / "given.pt")
    with pytest.raises(ExportError, match=f"^embedding: .*{reason}") as error:
        read_parts(ExportOptions(base, motion, embeddings=(Embedding(str(tmp_path / "given.pt")),)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_tokens_that_meet_and_names_that_are_wrong(base: str, files: dict[str, Path]) -> None:
    twice = [Embedding(str(files["badhand.pt"])), Embedding(str(files["bare.pt"]), "badhand_2")]
    with pytest.raises(ExportError, match="bare.pt'?: the tokenizer has a token 'badhand_2' already"):
        load_tokenizer(base, embeddings=twice)
    with pytest.raises(ExportError, match="there is no file 'epoch=3.pt'; give FILE or FILE=TOKEN"):
        Embedding.parse("epoch=3.pt")
    with pytest.raises(ExportError, match="'a.pt= ' is not allowed"):
        Embedding.parse("a.pt= ")
    with pytest.raises(ExportError, match="cannot load './x': no such file"):
        read_vectors(Embedding("./x"))


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_a_blank_token_is_that_of_the_files_name(token: str, tmp_path: Path) -> None:
    """It would stand for the spaces of every prompt."""
    torch.save({token: torch.ones(1, WIDTH)}, tmp_path / "star.pt")
    assert read_vectors(Embedding(str(tmp_path / "star.pt"))).token == "star"


def test_a_dry_run_tells_tokens_and_vectors(base: str, motion: str, files: dict[str, Path]) -> None:
    embeddings = (Embedding(str(files["badhand.pt"]), "hand"), Embedding(str(files["learned_embeds.bin"])))
    options = ExportOptions(base, motion, embeddings=embeddings)
    lines = [line for line in dry_run(options) if line.startswith("embedding ")]
    assert lines == [
        "embedding badhand.pt: a textual inversion of 3 vectors, in prompts 'hand'",
        "embedding learned_embeds.bin: a textual inversion of one vector, in prompts '<cat-toy>'",
    ]
    assert options.sources()["embedding_0"] == "badhand.pt=hand"
    assert options.sources()["embedding_1"] == "learned_embeds.bin"
