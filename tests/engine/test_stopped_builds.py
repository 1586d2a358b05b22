"""A build that was stopped keeps its finished engines, and the next one goes on with the missing ones."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import RELEASES, Workshop, demo_copy, plan_of, small_copy
from fakes.toy_builds import GRAPHS, Toy, names
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine import onnxruntime
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.unfinished_sets import read_finished, take_finished, unfinished_sets
from sparsectrl_lcm.runtime.backends import BACKENDS
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_names
from sparsectrl_lcm.runtime.format.temporary_folders import leftovers, staged_folder

TESTS = Path(__file__).parent.parent
BUILD_AND_WAIT = """
import sys, time
from pathlib import Path
from fakes.tensorrt_builds import Workshop
workshop = Workshop("11.4")
build_one, done = workshop.trt.answers["Builder.build_serialized_network"], []
def build(*args):
    done.append(args)
    if len(done) < 3:
        return build_one(*args)
    print("built two", flush=True)
    time.sleep(600)
workshop.trt.answers["Builder.build_serialized_network"] = build
workshop.build(Path(sys.argv[1]))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt, even if the tests run in the background, where a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def compiled(workshop: Workshop) -> int:
    """How many graphs TensorRT compiled."""
    return len(workshop.calls("Builder.build_serialized_network"))


def goes_on(workshop: Workshop, bundle: Path) -> None:
    """Builds again and checks that only two graphs are compiled and that the set is whole."""
    assert set_names(bundle, workshop.backend) == [], "a part is not a set"
    steps: list[str] = []
    index = workshop.build(bundle, on_progress=lambda text, _: steps.append(text))
    assert compiled(workshop) == 2
    assert steps[:2] == [f"{graph} ({n}/4): finished by an earlier build" for n, graph in enumerate(GRAPHS[:2], 1)]
    assert list(index.engines) == GRAPHS
    assert [plan_of(workshop.folder(bundle) / f"{graph}.engine")["graph"] for graph in GRAPHS] == GRAPHS
    assert workshop.left(bundle) == (["64x64x4-fp16"], workshop.timings(*GRAPHS[:3], *GRAPHS[2:]))
    engines = find_set(bundle, workshop.backend, "64x64x4-fp16")
    assert engines is not None
    assert sorted(path.name for path in engines.folder.iterdir()) == sorted(
        ["engines.json", *(f"{graph}.engine" for graph in GRAPHS)]
    )
    manifest = Bundle.load(bundle).manifest
    assert [engines.fault(manifest, graph) for graph in GRAPHS] == [None] * 4


@pytest.mark.parametrize("release", RELEASES)
def test_ctrl_c_after_two_graphs_loses_the_third_alone(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    build_one = workshop.trt.answers["Builder.build_serialized_network"]

    def interrupted(*args: Any) -> Any:
        if compiled(workshop) == 3:
            signal.raise_signal(signal.SIGINT)
        return build_one(*args)

    workshop.trt.answers["Builder.build_serialized_network"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        workshop.build(bundle)
    assert workshop.left(bundle) == (["unfinished: text_encoder, unet"], workshop.timings(*GRAPHS[:3]))
    (folder,) = leftovers(workshop.folder(bundle).parent)
    assert sorted(path.name for path in folder.iterdir()) == ["finished.json", "text_encoder.engine", "unet.engine"]
    goes_on(Workshop(release), bundle)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_kill_after_two_graphs_loses_the_third_alone(bundle: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, "-c", BUILD_AND_WAIT, str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "built two\n"
        assert list(unfinished_sets(bundle, "tensorrt")) == [], "a running build is not one that was stopped"
        process.send_signal(signal.SIGKILL)
    again = Workshop("11.4")
    left, timings = again.left(bundle)
    assert [name for name in left if not name.endswith(".lock")] == ["unfinished: text_encoder, unet"]
    assert timings == "text_encoder;unet;", "timings are written after each graph"
    again.timings = lambda *_: "text_encoder;unet;lcm_update;vae_decoder;"  # type: ignore[method-assign]
    goes_on(again, bundle)


def test_onnx_runtime_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, fuse, seen = demo_copy(tmp_path), onnxruntime.fuse_spatial_attention, []

    def fuse_two(model: Any) -> int:
        seen.append(model.graph.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return fuse(model)

    monkeypatch.setattr(onnxruntime, "fuse_spatial_attention", fuse_two)
    before = find_set(bundle, "onnxruntime", "fp32")
    with pytest.raises(KeyboardInterrupt):
        build(bundle, "onnxruntime")
    assert find_set(bundle, "onnxruntime", "fp32") == before
    build(bundle, "onnxruntime")
    assert len(seen) == len(set(seen)) + 1, "only the third graph was begun twice"
    assert list(unfinished_sets(bundle, "onnxruntime")) == []


def test_a_failure_keeps_what_is_finished_and_nothing_else(bundle: Path) -> None:
    toy = Toy(bundle)
    toy.stop("lcm_update")
    (folder,) = leftovers(bundle / "engines/openvino")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["finished.json", *(f"{graph}.{suffix}" for graph in GRAPHS[:2] for suffix in ("onnx", "weights"))]
    )
    toy.build()
    assert toy.made == GRAPHS[2:]
    assert names(bundle) == ["fp32"]
    assert "finished.json" not in [path.name for path in (bundle / "engines/openvino/fp32").iterdir()]


def test_a_build_that_is_stopped_twice_goes_on_twice(bundle: Path) -> None:
    toy, parent = Toy(bundle), bundle / "engines/openvino"
    for done, graph in enumerate(GRAPHS[1:], 1):
        toy.stop(graph)
        (left,) = parent.iterdir()
        size = sum(path.stat().st_size for path in left.iterdir() if path.name != "finished.json")
        assert list(unfinished_sets(bundle, "openvino")) == [("fp32", GRAPHS[:done], size)]
    toy.build()
    assert toy.made == GRAPHS[3:]
    assert [toy.text(graph) for graph in GRAPHS] == [f"{graph} 1" for graph in GRAPHS]


@pytest.mark.parametrize(
    "other", [{"check": False}, {"keep_source": True}, {"version": "2"}, {"bundle": "other"}], ids=str
)
def test_a_build_with_other_options_does_not_take_them(bundle: Path, other: dict[str, Any]) -> None:
    first = Toy(bundle)
    first.stop("vae_decoder")
    second = Toy(bundle, other.pop("version", "1"))
    if other.pop("bundle", None):
        files = second.bundle.manifest.files
        changed = {name: record.model_copy(update={"sha256": "0" * 64}) for name, record in files.items()}
        object.__setattr__(second.bundle, "manifest", second.bundle.manifest.model_copy(update={"files": changed}))
    second.stop("lcm_update", **other)
    assert len(list(unfinished_sets(bundle, "openvino"))) == 2, "both can go on"
    first.build()
    assert first.made == ["vae_decoder"]
    assert names(bundle) == ["fp32"], "a build that finishes cleans up"


@pytest.mark.parametrize("damage", ["engine", "beside", "list"])
def test_damaged_engines_are_built_again(bundle: Path, damage: str) -> None:
    toy = Toy(bundle)
    toy.stop("lcm_update")
    (folder,) = leftovers(bundle / "engines/openvino")
    damaged = {"engine": "unet.onnx", "beside": "unet.weights", "list": "finished.json"}[damage]
    (folder / damaged).write_text("cut off")
    toy.build()
    assert toy.made == (GRAPHS if damage == "list" else GRAPHS[1:])
    assert [toy.text(graph) for graph in GRAPHS] == [f"{graph} 1" for graph in GRAPHS]


@pytest.mark.parametrize("gone", [["unet.onnx"], ["unet.weights", "text_encoder.onnx"]], ids=len)
def test_engines_whose_files_are_gone_are_not_listed(
    bundle: Path, gone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions left folders that list engines which they no longer hold."""
    toy, parent = Toy(bundle), bundle / "engines/openvino"
    toy.stop("lcm_update")
    (left,) = parent.iterdir()
    for name in gone:
        (left / name).unlink()
    kept = GRAPHS[: 2 - len(gone)]
    assert [graphs for _, graphs, _ in unfinished_sets(bundle, "openvino")] == [kept][: len(kept)]
    assert run(["inspect", str(bundle)]) == 0
    assert capsys.readouterr().out.count("openvino fp32 is unfinished") == len(kept)
    Toy(bundle, "2").stop("unet")
    assert left.exists() == bool(kept), "a folder without engines goes with the next build"


def test_engines_with_other_fingerprints_stay_where_they_are(bundle: Path) -> None:
    toy, parent = Toy(bundle), bundle / "engines/openvino"
    toy.stop("lcm_update")
    (left,) = leftovers(parent)
    wanted = {"text_encoder": str(read_finished(left)["text_encoder"].made_from), "unet": "of other weights"}
    with staged_folder(parent, "fp32") as running:
        assert list(take_finished(parent, "fp32", running, wanted)) == ["text_encoder"]
        assert sorted(path.name for path in left.iterdir()) == ["finished.json", "unet.onnx", "unet.weights"]
        assert list(read_finished(left)) == ["unet"]


def test_a_damaged_or_second_copy_of_an_engine_is_removed(bundle: Path) -> None:
    toy, parent = Toy(bundle), bundle / "engines/openvino"
    toy.stop("lcm_update")
    (left,) = leftovers(parent)
    shutil.copytree(left, parent / ".fp32-1-0123abcd")
    (left / "unet.onnx").write_text("cut off")
    toy.stop("vae_decoder")
    assert [graphs for _, graphs, _ in unfinished_sets(bundle, "openvino")] == [GRAPHS[:3]]
    assert len(names(bundle)) == 1


def test_engines_of_a_running_build_stay_with_it(bundle: Path) -> None:
    toy, parent = Toy(bundle), bundle / "engines/openvino"
    toy.stop("lcm_update")
    (left,) = leftovers(parent)
    with staged_folder(parent, "fp32") as running:
        wanted = {graph: str(engine.made_from) for graph, engine in read_finished(left).items()}
        assert list(take_finished(parent, "fp32", running, wanted)) == GRAPHS[:2]
        toy.build()
        assert toy.made == GRAPHS
        assert len(read_finished(running)) == 2


def test_a_set_counts_only_once_it_is_complete(bundle: Path) -> None:
    """`auto`, loading and `bench` ask the backend's record for sets."""
    toy, record = Toy(bundle), BACKENDS["openvino"]
    toy.stop("vae_decoder")
    assert not record.has_engines(bundle, None)
    assert list(record.chosen_sets(bundle, "fp32")) == []
    toy.build()
    assert record.has_engines(bundle, "fp32")
    (chosen,) = record.chosen_sets(bundle, "fp32")
    assert chosen is not None
    assert list(chosen.index.engines) == GRAPHS


def test_a_stopped_build_of_another_set_stays(bundle: Path) -> None:
    toy, other = Toy(bundle), bundle / "engines/openvino/.bf16-1-0123abcd"
    toy.stop("lcm_update")
    (left,) = leftovers(bundle / "engines/openvino")
    left.rename(other)
    (bundle / "engines/openvino/.int8-1-0123abcd").mkdir()
    toy.build()
    assert toy.made == GRAPHS
    assert names(bundle) == [other.name, "fp32"]


def test_the_typed_graph_stays_beside_its_engine_if_asked_for(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    workshop.build(bundle, keep_source=True)
    folder = workshop.folder(bundle)
    assert {f"{graph}.onnx" for graph in GRAPHS} == {path.name for path in folder.glob("*.onnx")}
    assert (folder / "unet.weights").stat().st_size > 50_000
    engines = find_set(bundle, workshop.backend, "64x64x4-fp16")
    assert engines is not None
    assert list(engines.index.engines["unet"].files) == ["unet.engine"], "loading does not read the source"
    assert engines.index.engines["unet"].spec.flags == Workshop("rtx-1.7").build(bundle).engines["unet"].spec.flags
    assert list(folder.glob("*.onnx")) == []


def test_a_stopped_build_keeps_typed_graphs_too(bundle: Path) -> None:
    def stop_at_the_update(text: str, _: float) -> None:
        if text.startswith("lcm_update"):
            raise ZeroDivisionError

    with suppress(ZeroDivisionError):
        Workshop("rtx-1.7").build(bundle, on_progress=stop_at_the_update, keep_source=True)
    again = Workshop("rtx-1.7")
    again.build(bundle, keep_source=True)
    assert compiled(again) == 2
    assert len(list(again.folder(bundle).glob("*.onnx"))) == 4
