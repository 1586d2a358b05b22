"""The real TensorRT-RTX parses and builds every graph on a machine without a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import export_architecture
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, weight_table, write_typed
from sparsectrl_lcm.engine.unfinished_sets import read_finished, unfinished_sets
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.format.engine_keys import ANY_DEVICE
from sparsectrl_lcm.runtime.format.engine_sets import find_set
from sparsectrl_lcm.runtime.gpu.tensorrt_library import load_library

BACKEND = "tensorrt-rtx"


def no_gpu() -> bool:
    from sparsectrl_lcm.runtime.gpu.device import probe

    try:
        probe()
    except BackendError:
        return True
    return False


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


SMALL = ClipSize(width=64, height=64, frames=1)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with the smallest engines, which the build has compared with fp32."""
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("built") / "bundle"))
    steps: list[str] = []
    options = BuildOptions(**SMALL.model_dump())
    built = build(bundle, BACKEND, options, lambda text, fraction: steps.append(text))
    for graph, record in built.index.engines.items():
        assert max(record.report["errors"].values()) <= (3 if graph.startswith("vae_decoder") else 1e-2)
        assert record.report["seconds"] >= 0
    assert "unet (5/8): comparing fp16 with fp32" in steps
    return bundle


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_once, tmp_path / "bundle"))


def has_engines(folder: Path, size: ClipSize, precision: str) -> None:
    """Checks that a set is complete, fits the bundle and contains no other files."""
    bundle = Bundle.load(folder)
    engines = find_set(folder, BACKEND, f"{size}-{precision}")
    assert engines is not None
    assert set(engines.index.engines) == set(bundle.manifest.graphs)
    version = load_library(BACKEND).version
    for graph, record in engines.index.engines.items():
        shapes = static_shapes(bundle.manifest, graph, size)
        inputs = {item.name: shapes[item.name] for item in bundle.graph(graph).inputs}
        path = engines.open(bundle.manifest, graph, version, ANY_DEVICE, inputs)
        assert path.stat().st_size == record.files[path.name].bytes > 50_000
        assert record.spec.device == ANY_DEVICE
    left = {path.suffix for path in engines.folder.iterdir()}
    assert left == {".engine", ".json"}, "neither typed graphs nor weights stay behind"


def test_every_graph_of_the_demo_bundle_is_built_in_fp16(built_once: Path) -> None:
    has_engines(built_once, SMALL, "fp16")


@pytest.mark.slow
def test_every_graph_of_the_demo_bundle_is_built_in_fp32(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds with the command line at the bundle's default size; `inspect` shows the set."""
    assert run(["build", str(demo), "--backend", BACKEND, "--precision", "fp32", "--no-check"]) == 0
    assert "tensorrt-rtx 128x128x16 fp32: 8 engines" in capsys.readouterr().out
    has_engines(demo, ClipSize(width=128, height=128, frames=16), "fp32")
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["inspect", str(demo)]) == 0
    shown = capsys.readouterr().out
    assert "tensorrt-rtx 128x128x16-fp32" in shown
    engines = find_set(demo, BACKEND, "128x128x16-fp32")
    assert engines is not None
    assert engines.index.engines["unet"].key[:12] in shown


CHOSEN = {"compute_capabilities": ("8.9", "12.0"), "optimization_level": 2, "workspace": 1, "check": False}


def test_engines_for_chosen_devices(demo: Path) -> None:
    options = BuildOptions(**SMALL.model_dump(), graphs=("vae_encoder",), **CHOSEN)
    index = build(demo, BACKEND, options).index
    assert index.engines["vae_encoder"].spec.device == "8.9, 12.0"
    assert index.engines["vae_encoder"].spec.flags["workspace"] == "1 GiB"


@pytest.mark.slow
def test_another_architecture_and_size_for_chosen_devices(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(export_architecture("other").bundle, tmp_path / "bundle"))
    multiple = Bundle.load(bundle).manifest.sizes.multiple
    size = ClipSize(width=7 * multiple, height=4 * multiple, frames=5)
    index = build(bundle, BACKEND, BuildOptions(**size.model_dump(), precision="fp16", **CHOSEN)).index
    assert index.engines["unet"].spec.device == "8.9, 12.0"
    assert index.engines["unet"].key != index.engines["text_encoder"].key


def test_ctrl_c_stops_a_build_and_keeps_the_finished_engines(demo: Path) -> None:
    folder = demo / "engines" / BACKEND
    handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs ignore it
    main = f"{handler}; from sparsectrl_lcm.cli import main; main()"
    command = [sys.executable, "-c", main, "build", str(demo), "--backend", BACKEND, "--no-check"]
    command += ["--graph", "vae_encoder", "--graph", "unet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(folder.glob(".*/unet.weights")):
        time.sleep(0.01)
    time.sleep(0.5)  # the UNet's build has begun
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    ((name, graphs, _),) = unfinished_sets(demo, BACKEND)
    assert (name, graphs) == ("128x128x16-fp16", ["vae_encoder"])
    (left,) = folder.iterdir()
    assert {path.name for path in left.iterdir()} == {*(f"{graph}.engine" for graph in graphs), "finished.json"}
    assert find_set(demo, BACKEND, name) is None


def test_a_set_is_replaced_whole(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = built / "engines" / BACKEND / f"{SMALL}-fp16" / "engines.json"
    before = index.read_text()
    library = load_library(BACKEND)
    from sparsectrl_lcm.engine.tensorrt import builder as tensorrt

    def fail_at_the_decoder(self: object, graph: str, *_: object) -> object:
        if graph == "vae_decoder":
            raise library.failure("cannot build 'vae_decoder'")
        return b"an engine"

    monkeypatch.setattr(tensorrt._Build, "plan", fail_at_the_decoder)
    with pytest.raises(BackendError, match="tensorrt-rtx .* cannot build 'vae_decoder'"):
        build(built, BACKEND, BuildOptions(**SMALL.model_dump(), check=False))
    assert index.read_text() == before
    unfinished, kept = sorted((built / "engines" / BACKEND).iterdir())
    assert kept.name == f"{SMALL}-fp16"
    assert list(read_finished(unfinished)) == list(Bundle.load(built).manifest.graphs)[:6]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--size", "100x100"], "--size: 100x100 is not allowed; give multiples of 8 from 8 to 2048"),
        (["--size", "4096x64"], "from 8 to 2048"),
        (["--size", "big"], "big"),
        (["--frames", "99"], "--frames: 99 is out of range; allowed are 1 to 32"),
        (["--frames", "0"], "--frames: 0 is out of range"),
        (["--precision", "int3"], "--precision: 'int3' is not one of tensorrt-rtx; allowed are fp16, bf16, fp32"),
        (["--optimization-level", "9"], "--optimization-level: 9 is out of range"),
        (["--aux-streams", "-1"], "--aux-streams: -1 is out of range"),
        (["--workspace", "0"], "--workspace: 0 is out of range"),
        (["--workspace", "nan"], "--workspace: nan is out of range"),
        (["--hardware-compatibility", "all"], "--hardware-compatibility: 'all' is unknown"),
        (["--hardware-compatibility", "ampere-plus"], "--hardware-compatibility: only for tensorrt"),
        (
            ["--compute-capability", "9.9"],
            "'9.9' is not supported; allowed are 7.5, 8.0, 8.6, 8.9, 12.0, 12.1",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    demo: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(demo), "--backend", BACKEND, "--no-check", *options]) != 0
    errors = capsys.readouterr().err
    assert reason in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list((demo / "engines").glob("*/*")), "nothing is left"


def test_every_weight_of_the_table_can_be_made_refittable(tmp_path: Path) -> None:
    """TensorRT's own parser keeps the weights' checkpoint names in the network."""
    bundle, library = Bundle.load(), load_library(BACKEND)
    for graph in bundle.manifest.graphs:
        model, path = typed_graph(bundle, graph, "fp16"), tmp_path / f"{graph}.onnx"
        write_typed(model, path)
        builder = library.module.Builder(library.logger)
        network = builder.create_network(1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = library.module.OnnxParser(network, library.logger)
        assert parser.parse_from_file(str(path))
        assert all(network.mark_weights_refittable(name) for name in weight_table(bundle, graph, model).root)
        assert not network.mark_weights_refittable("another.weight")


@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU")
@pytest.mark.parametrize("option", ["--refit", "--strip-weights"])
def test_what_needs_a_gpu_is_refused_without(demo: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(demo), "--backend", BACKEND, option]) == 2
    assert "refit and strip_weights need a GPU at the build" in capsys.readouterr().err


@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU")
def test_engines_without_a_gpu_are_not_run(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--bundle", str(demo), "--prompt", "a boat", "--backend", BACKEND, "-o", "x.mp4"]
    assert run(command) == 2
    errors = capsys.readouterr().err
    assert "NVIDIA" in errors
    assert len(errors.strip().splitlines()) == 1


def test_an_engine_is_refused_where_anything_of_its_key_differs(built: Path) -> None:
    bundle, version = Bundle.load(built), load_library(BACKEND).version
    index = built / "engines" / BACKEND / f"{SMALL}-fp16" / "engines.json"
    command = rf"run: sparsectrl-lcm build {built} --backend {BACKEND} --size 64x64 --frames 1 --precision fp16$"
    text = index.read_text()

    shapes = static_shapes(bundle.manifest, "unet", SMALL)
    inputs = {item.name: shapes[item.name] for item in bundle.graph("unet").inputs}

    def refused(reason: str, ends: str = command, **other: str) -> None:
        engines = find_set(built, BACKEND, f"{SMALL}-fp16")
        assert engines is not None
        with pytest.raises(BackendError, match=rf"the tensorrt-rtx engine of 'unet' {reason}.*; {ends}"):
            engines.open(bundle.manifest, "unet", **{"version": version, "inputs": inputs, **other})

    refused("was built by version", version="2.0")
    refused("was built for any, this machine has", device="NVIDIA H200 (compute capability 9.0)")
    for field, value, reason, ends in (
        ("flags", {"refit": True}, "does not match the key in its index", command.replace("$", " --refit$")),
        ("precision", "bf16", "does not match the key in its index", command),
        ("shapes", {"latents": [1, 4, 1, 16, 16]}, "was built for other shapes", command),
        ("graph_sha256", ["0" * 64], "was built from another bundle", command),
    ):
        entries = json.loads(text)
        entries["engines"]["unet"]["spec"][field] = value
        index.write_text(json.dumps(entries))
        refused(reason, ends)
    index.write_text(text)
    engine = index.parent / "unet.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + b"\1")
    refused("differs from its checksum")
    os.truncate(engine, 1000)
    refused("differs from its checksum")
    engine.unlink()
    refused("is missing")
    index.write_text("{")
    with pytest.raises(BackendError, match=f"cannot be read; {command}"):
        find_set(built, BACKEND, f"{SMALL}-fp16")
