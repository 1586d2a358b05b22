"""Builds of single graphs, and the sets that they make or do not make."""

from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import demo_copy, small_copy
from fakes.toy_builds import GRAPHS, Toy, names
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime.backends import choose_backend
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import find_set


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


def test_one_graph_is_built_for_itself_until_all_are_there(bundle: Path) -> None:
    toy = Toy(bundle)
    assert toy.build(graphs=("unet",)).missing == ("text_encoder", "lcm_update", "vae_decoder")
    assert find_set(bundle, "openvino", "fp32") is None
    assert toy.build(graphs=("vae_decoder", "unet")).missing == ("text_encoder", "lcm_update")
    assert toy.made == ["unet", "vae_decoder"]
    index = toy.build(graphs=("text_encoder", "lcm_update"))
    assert index.missing == ()
    assert "missing" not in (bundle / "engines/openvino/fp32/engines.json").read_text()
    assert list(index.engines) == GRAPHS
    assert names(bundle) == ["fp32"]


def test_one_graph_of_a_complete_set_is_replaced(bundle: Path) -> None:
    toy = Toy(bundle)
    toy.build()
    toy.made.clear()
    assert toy.build(graphs=("unet",)).missing == ()
    assert toy.made == ["unet"]
    assert [toy.text(graph) for graph in GRAPHS] == [f"{graph} 1" for graph in GRAPHS]
    newer = Toy(bundle, "2")
    assert newer.build(graphs=("unet",)).missing == ("text_encoder", "lcm_update", "vae_decoder")
    assert toy.text("unet") == "unet 1", "engines of two versions do not make a set"


@pytest.mark.parametrize("damage", ["vae_decoder.onnx", "vae_decoder.weights"])
def test_damaged_engines_of_a_set_do_not_make_the_next_one(bundle: Path, damage: str) -> None:
    toy = Toy(bundle)
    toy.build()
    toy.made.clear()
    path = bundle / "engines/openvino/fp32" / damage
    whole = path.read_text()
    path.write_text(whole[::-1])
    assert toy.build(graphs=("unet",)).missing == ("text_encoder", "lcm_update", "vae_decoder")
    assert toy.build().missing == ()
    assert toy.made == ["unet", "text_encoder", "lcm_update", "vae_decoder"]
    assert path.read_text() == whole
    engines = find_set(bundle, "openvino", "fp32")
    assert engines is not None
    assert [engines.fault(toy.bundle.manifest, graph) for graph in GRAPHS] == [None] * 4


@pytest.mark.parametrize("other", [{"types": "bf16"}, {"check": False}, {"keep_source": True}, {}], ids=str)
def test_engines_of_other_options_do_not_make_a_set(bundle: Path, other: dict[str, Any]) -> None:
    """Neither do those of a set whose index does not say what they were made from."""
    Toy(bundle).build()
    if not other:
        path = bundle / "engines/openvino/fp32/engines.json"
        index = EngineIndex.model_validate_json(path.read_bytes())
        unknown = {graph: engine.model_dump(exclude={"made_from"}) for graph, engine in index.engines.items()}
        path.write_text(EngineIndex.model_validate({**index.model_dump(), "engines": unknown}).model_dump_json())
    toy = Toy(bundle, types=other.pop("types", "fp32"))
    assert toy.build(graphs=("unet",), **other).missing == ("text_encoder", "lcm_update", "vae_decoder")
    assert toy.build(**other).missing == ()
    assert toy.made == ["unet", "text_encoder", "lcm_update", "vae_decoder"]


def test_an_unknown_graph_is_refused(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="graphs: openvino builds no 'unett' of this bundle; allowed are text_enc"):
        Toy(bundle).build(graphs=("unett",))


def test_a_part_of_a_set_is_not_loaded_and_inspect_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = demo_copy(tmp_path)
    before = choose_backend(Bundle.load(bundle))
    command = ["build", str(bundle), "--backend", "onnxruntime-cuda", "--no-check", "--graph", "lcm_update"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "onnxruntime-cuda fp16: 1 of 8 engines\n" in shown
    rest = f"run: sparsectrl-lcm build {bundle} --backend onnxruntime-cuda --no-check\n"
    assert shown.endswith(rest)
    assert "missing: text_encoder, vae_encoder, controlnet_scribble" in shown
    assert choose_backend(Bundle.load(bundle)) == before
    assert caplog.text == ""
    assert run(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "onnxruntime-cuda fp16 in" not in shown
    assert "onnxruntime-cuda fp16 is unfinished" in shown
    assert "lcm_update (0.0 MB)" in shown
    assert run([*command[:-1], "unett"]) == 2
    assert "--graph: onnxruntime-cuda builds no 'unett' of this bundle" in capsys.readouterr().err
