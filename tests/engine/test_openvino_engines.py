"""OpenVINO engines: their difference from fp32, the choice of precision, and refusal of stale or damaged ones."""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import with_other_motion_module
from conftest import Exported
from onnx import TensorProto
from pictures import pictures
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.openvino import compare
from sparsectrl_lcm.engine.rewrites import winograd
from sparsectrl_lcm.runtime import BackendError, Keyframe, VideoPipeline, backends
from sparsectrl_lcm.runtime.cpu import openvino
from sparsectrl_lcm.runtime.cpu.compiled_cache import trim
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSession, OpenVinoSessions
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.engine_sets import find_set

HEADS = 4
"""Heads of temporal attention. OpenVINO 2026.4 gives wrong results for a clip with as many frames as heads."""
BUILT = ("vae_encoder", "controlnet_scribble", "controlnet_rgb", "unet", "vae_decoder", "vae_decoder_tiny")


@pytest.fixture(scope="module")
def built(sd15_like: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines in bf16 and fp32, in a folder with a space and an umlaut in its name."""
    bundle = Path(shutil.copytree(sd15_like.bundle, tmp_path_factory.mktemp("built") / "Bündel 1"))
    for precision in ("bf16", "fp32"):
        build(bundle, "openvino", BuildOptions(precision=precision, check=False))
    return bundle


@pytest.fixture(scope="module")
def references(sd15_like: Exported) -> Iterator[VideoPipeline]:
    """ONNX Runtime on the portable graphs, which test_pipeline.py compares with diffusers."""
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    yield pipeline
    pipeline.close()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_graph_with_work_gets_an_engine(built: Path, precision: str) -> None:
    engines = find_set(built, "openvino", precision)
    assert engines is not None
    assert set(engines.index.engines) == set(BUILT)
    for graph, record in engines.index.engines.items():
        assert set(record.files) == {f"{graph}.onnx", f"{graph}.weights"}
        model = onnx.load(engines.folder / record.path, load_external_data=False)
        types = {item.data_type for item in model.graph.initializer if "." in item.name}
        assert (TensorProto.BFLOAT16 in types) == (precision == "bf16")
        last = [item.data_type for item in model.graph.initializer if item.name == "conv_out.weight"]
        assert last == [TensorProto.FLOAT] * (graph == "unet"), "a CPU computes the prediction in fp32"
        by_channels = "ReduceL2" in {node.op_type for node in model.graph.node}
        assert by_channels == (precision == "bf16" and graph != "vae_decoder_tiny"), graph  # it has no norms
        at_once = any(".joined." in node.name for node in model.graph.node)
        assert at_once == (precision == "bf16" and graph.startswith(("unet", "controlnet_"))), graph


@pytest.mark.parametrize("graph", ["vae_encoder", "controlnet_rgb", "vae_decoder"])
def test_the_check_of_a_build_computes_as_a_request_does(built: Path, graph: str) -> None:
    """Outputs are within 5e-2 of fp32 and frames within 3 levels in the mean, with as many frames as heads."""
    bundle = Bundle.load(built)
    errors = compare(bundle, graph, built / f"engines/openvino/bf16/{graph}.onnx", "bf16")
    assert set(errors) == {item.name for item in bundle.graph(graph).outputs}
    assert 0 < max(errors.values()) <= (3 if graph == "vae_decoder" else 5e-2)


@pytest.mark.parametrize("large", [pytest.param(0, marks=pytest.mark.slow), winograd.LARGE])
def test_filtered_convolutions_keep_to_fp32_on_openvino(
    sd15_like: Exported, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowers the minimum to 16 channels: the small models have no convolution with the usual minimum."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 16)
    monkeypatch.setattr(winograd, "LARGE", large)
    compared = ("unet", "vae_encoder", "vae_decoder")[int(large != 0) :]  # the UNet compiles slowly: once is enough
    left = [graph for graph in Bundle.load(sd15_like.bundle).manifest.graphs if graph not in compared]
    monkeypatch.setattr("sparsectrl_lcm.engine.openvino.IN_FP32", left)
    folder = Path(shutil.copytree(sd15_like.bundle, tmp_path / "bundle"))
    build(folder, "openvino", BuildOptions(precision="fp32", check=False))
    bundle = Bundle.load(folder)
    for graph in compared:
        largest = 0.01 if graph == "vae_decoder" else 1e-4
        path = folder / f"engines/openvino/fp32/{graph}.onnx"
        names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
        assert any(".winograd." in name for name in names)
        assert max(compare(bundle, graph, path, "fp32").values()) <= largest


def ask(pipeline: VideoPipeline, **options: Any) -> np.ndarray:
    """Generates the frames of a small request with guidance and as many frames as heads.

    Only the height can be halved at every level, so the UNet's upsamplers cut columns and no rows.
    """
    keyframes = [Keyframe(1, pictures(1, 64, 64)[0])]
    size = {"width": 72, "height": 64, "num_frames": HEADS, "num_inference_steps": 2}
    clip = pipeline.generate("a red circle", keyframes, guidance_scale=1.5, **{"seed": 3, **size, **options})
    return clip.frames.astype(int)


@pytest.mark.parametrize(
    ("precision", "mean", "largest"), [pytest.param("fp32", 0.01, 1, marks=pytest.mark.slow), ("bf16", 1.5, 30)]
)
def test_frames_of_engines_are_close_to_those_of_the_portable_graphs(
    built: Path, references: VideoPipeline, precision: str, mean: float, largest: int
) -> None:
    pipeline = VideoPipeline.load(built, "openvino", precision=precision)
    assert pipeline.precision == precision
    expected = ask(references)
    difference = np.abs(ask(pipeline) - expected)
    assert difference.mean() <= mean
    assert difference.max() <= largest
    assert np.abs(ask(references, seed=4) - expected).mean() > 10 * mean, "another clip is further away"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with its engines, which a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "a bundle"))


def refused(bundle: Path, precision: str, reason: str) -> list[str]:
    """Checks that a request refuses the engines; returns the arguments of the command that rebuilds them."""
    with pytest.raises(BackendError, match=reason) as error:
        ask(VideoPipeline.load(bundle, "openvino", precision=precision))
    assert "\n" not in str(error.value)
    command = shlex.split(str(error.value).split("; run: ")[1])
    assert command == ["sparsectrl-lcm", "build", str(bundle), "--backend", "openvino", "--precision", precision]
    return command[1:]


def test_engines_of_another_version_are_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`auto` chooses a backend that runs without engines."""
    assert backends.choose_backend(Bundle.load(bundle)) == "openvino"
    monkeypatch.setattr(openvino, "version", lambda: "2031.1.0")
    refused(bundle, "bf16", r"'unet' was built by version 202\d\.\d+\.\d+, this machine has 2031\.1\.0; run")
    with caplog.at_level(logging.WARNING):
        assert backends.choose_backend(Bundle.load(bundle)) == "onnxruntime"
    assert f"run: sparsectrl-lcm build {shlex.quote(str(bundle))} --backend openvino" in caplog.text


def test_engines_of_another_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    other = with_other_motion_module(bundle, tmp_path / "other")
    shutil.copytree(bundle / "engines", other / "engines")
    refused(other, "fp32", "'unet' was built from another bundle; run")


def test_damaged_engines_are_refused_and_mended_by_the_command(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle / "engines/openvino/bf16"
    weights = folder / "unet.weights"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    refused(bundle, "bf16", "'unet' differs from its checksum; run")
    (folder / "unet.onnx").unlink()
    refused(bundle, "bf16", "'unet' is missing; run")
    (folder / "engines.json").write_text("[")
    with pytest.raises(BackendError, match=r"cannot be read; run: .* --backend openvino --precision bf16$"):
        VideoPipeline.load(bundle, "openvino", precision="bf16")
    command = shlex.split(f"build {shlex.quote(str(bundle))} --backend openvino --precision bf16 --no-check")
    assert run(command) == 0
    assert "openvino bf16: 6 engines" in capsys.readouterr().out
    engines, manifest = find_set(bundle, "openvino", "bf16"), Bundle.load(bundle).manifest
    assert engines is not None
    assert [engines.fault(manifest, graph) for graph in BUILT] == [None] * len(BUILT)
    assert run(["inspect", str(bundle)]) == 0
    assert "openvino bf16" in capsys.readouterr().out


def only(bundle: Path, *precisions: str) -> None:
    """Removes the engines of all other precisions."""
    for folder in (bundle / "engines/openvino").iterdir():
        if folder.name not in precisions:
            shutil.rmtree(folder)


def computes_in(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    monkeypatch.setattr(openvino, "capabilities", lambda device="CPU": list(types))


def test_the_precision_is_one_that_the_processor_computes_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(precision: str | None = None) -> str | None:
        return VideoPipeline.load(bundle, "openvino", precision=precision).precision

    computes_in(monkeypatch, "BF16", "FP32", "INT8")
    assert (taken(), taken("bf16"), taken("fp32")) == ("bf16", "bf16", "fp32")
    computes_in(monkeypatch, "FP32", "INT8")
    assert (taken(), taken("bf16"), taken("fp32")) == ("fp32", "bf16", "fp32")
    only(bundle, "bf16")
    assert (taken(), taken("bf16"), taken("fp32")) == ("fp32", "bf16", "fp32"), "the portable graphs serve fp32"
    assert OpenVinoSessions(Bundle.load(bundle))._engines is None
    only(bundle)
    refused(bundle, "bf16", "bf16 engines were not built")


def test_the_cache_holds_weights_by_the_size_of_what_is_compiled(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(bundle, "bf16")  # half as large; the portable graph serves fp32
    opened = Bundle.load(bundle)
    portable = sum(opened.manifest.files[name].bytes for name in opened.graph("unet").weights)
    monkeypatch.setattr(openvino, "CACHED_WITH_WEIGHTS", portable)
    whole = []
    monkeypatch.setattr(openvino, "OpenVinoSession", lambda *given: whole.append(given[-1] is not None))
    for precision in ("bf16", "fp32"):
        sizes = {"frames": 1, "tokens": 77, "latent_height": 8, "latent_width": 8}
        OpenVinoSessions(opened, precision).open("unet", sizes)
    assert whole == [True, False]


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / f"{name}.blob").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}.blob", (1e9 - age, 1e9 - age))
    trim(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 3
    trim(tmp_path, 299)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.blob", "old.blob"]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle(), tmp_path / "demo"))


@pytest.mark.parametrize(("types", "precision"), [(("BF16", "FP32"), "bf16"), (("FP32", "INT8"), "fp32")])
def test_build_takes_the_precision_of_the_processor(
    types: tuple[str, ...],
    precision: str,
    demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything_else = [graph for graph in Bundle.load(demo).manifest.graphs if graph != "vae_encoder"]
    monkeypatch.setattr("sparsectrl_lcm.engine.openvino.IN_FP32", everything_else)  # fast: one graph is left
    computes_in(monkeypatch, *types)
    assert run(["build", str(demo), "--backend", "openvino"]) == 0
    output = capsys.readouterr().out
    assert f"openvino {precision}: 1 engines" in output
    assert re.search(r"vae_encoder: 0\.\d MB, \d\.\de-\d\d from fp32 \(relative\)", output)
    assert [path.name for path in (demo / "engines/openvino").iterdir()] == [precision]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp16"], "--precision: 'fp16' is not one of openvino; allowed are bf16, fp32, int8"),
        (["--size", "64x64"], "--size: not an option of openvino"),
        (["--refit"], "--refit: not an option of openvino"),
    ],
)
def test_options_that_a_build_does_not_have_are_one_line(
    arguments: list[str], message: str, demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(demo), "--backend", "openvino", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (demo / "engines").exists()


def test_an_engine_whose_results_are_not_finite_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(*_: Any) -> list[np.ndarray]:
        return [np.array([0.0, np.nan])]

    monkeypatch.setattr(OpenVinoSession, "run", infinite)
    path = bundle / "engines/openvino/bf16/vae_encoder.onnx"
    with pytest.raises(BackendError, match="^build: 'vae_encoder' in bf16 gives NaN or infinity at"):
        compare(Bundle.load(bundle), "vae_encoder", path, "bf16")


def test_a_failed_build_leaves_what_was_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((bundle / "engines/openvino/bf16/engines.json").read_text())

    def fail(*_: Any) -> None:
        raise BackendError("backend", "OpenVINO cannot compile unet.onnx: no")

    monkeypatch.setattr("sparsectrl_lcm.engine.openvino.compare", fail)
    with pytest.raises(BackendError, match="cannot compile"):
        build(bundle, "openvino", BuildOptions(precision="bf16"))
    assert json.loads((bundle / "engines/openvino/bf16/engines.json").read_text()) == before
    assert sorted(path.name for path in (bundle / "engines/openvino").iterdir()) == ["bf16", "fp32"]
