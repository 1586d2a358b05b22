"""What `build` and `inspect` say about the kernels of TensorRT's engines."""

import json
from pathlib import Path

import pytest
from fakes.tensorrt_builds import Workshop, small_copy
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.cli.build import _clip_command, _report
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import write_index
from sparsectrl_lcm.runtime.format.layer_report import AttentionCounts, LayerReport

LAYERS = LayerReport(
    layers={"kgen": 66, "gemm": 12},
    attention={"spatial": AttentionCounts(fused=3, split=1), "temporal": AttentionCounts(fused=4, split=0)},
    split_attention=("down_blocks.0.attentions.0.transformer_blocks.0.attn2",),
    norms=20,
    fp32_norms=("mid_block.resnets.0.norm1/GroupNormalization_7",),
    bytes_moved=10_185_594_624,
    fp16_sums=("conv1_myl0_4",),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineIndex]:
    """A bundle with engines of a fake, of which the UNet's has `LAYERS`."""
    bundle, workshop = small_copy(tmp_path_factory.mktemp("reports")), Workshop("rtx-1.7")
    index = workshop.build(bundle)
    unet = index.engines["unet"]
    report = unet.report | LAYERS.model_dump(mode="json")
    index.engines["unet"] = unet.model_copy(update={"report": report})
    write_index(workshop.folder(bundle), index)
    return bundle, index


def test_build_says_what_the_engines_are_made_of(
    built: tuple[Path, EngineIndex], capsys: pytest.CaptureFixture[str]
) -> None:
    _report(built[1])
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["unet"].endswith(
        "78 kernels, 7 of 8 attentions fused, 1 of 20 norms write fp32, 1 with fp16 sums, 10.2 GB moved"
    )
    assert lines["text_encoder"].endswith("2 kernels, 0.000128 MB moved")


def test_build_tells_the_command_that_makes_a_clip_with_its_engines() -> None:
    options = BuildOptions(width=768, height=512, frames=24, precision="bf16", optimization_level=5)
    command = (
        "sparsectrl-lcm generate --bundle 'my bundle' --backend tensorrt --size 768x512 --frames 24 --precision bf16"
    )
    assert _clip_command(Path("my bundle"), "tensorrt", options) == f"{command} --prompt ... -o clip.mp4"


def test_inspect_shows_it_again(
    built: tuple[Path, EngineIndex], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # of no meaning in a pipe
    assert run(["inspect", str(built[0])]) == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "66 kgen, 12 gemm" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[0] == "unet"
    assert cells[-4:] == [
        "66 kgen, 12 gemm",
        "spatial 3 fused, 1 split; temporal 4 fused, 0 split",
        "1 of 20",
        "10.2 GB",
    ]
    assert "norm1/GroupNormalization_7" not in shown


def test_inspect_says_it_to_programs(built: tuple[Path, EngineIndex], capsys: pytest.CaptureFixture[str]) -> None:
    folder, index = built
    assert run(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("sources", "sizes", "scheduler", "temporal_norm"):
        assert facts[name] == manifest[name]
    assert {name: graph["max_error"] for name, graph in facts["graphs"].items()} == {
        name: graph["max_error"] for name, graph in manifest["graphs"].items()
    }
    (found,) = facts["engines"]
    assert found["backend"] == "tensorrt-rtx"
    assert found["engines"].keys() == index.engines.keys()
    assert found["engines"]["unet"]["report"]["bytes_moved"] == LAYERS.bytes_moved
    assert found["engines"]["unet"]["fault"] is None


def test_inspect_lists_what_is_not_ideal(built: tuple[Path, EngineIndex], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(built[0]), "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("unet: ")] == [
        "unet: kernels: 66 kgen, 12 gemm",
        "unet: attention in several kernels: down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "unet: norm that writes fp32: mid_block.resnets.0.norm1/GroupNormalization_7",
        "unet: kernel that adds fp16 products in fp16: conv1_myl0_4",
    ]
