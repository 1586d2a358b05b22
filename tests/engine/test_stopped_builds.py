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
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine import onnxruntime
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.engine_writer import SetBuild, any_size_spec, engine_record, replace_folder, write_set
from sparsectrl_lcm.engine.unfinished_sets import read_finished, take_finished, unfinished_sets
from sparsectrl_lcm.runtime.backends import BACKENDS, choose_backend
from sparsectrl_lcm.runtime.errors import BackendError, InvalidRequest
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_names
from sparsectrl_lcm.runtime.format.temporary_folders import leftovers, staged_folder

GRAPHS = ["text_encoder", "unet", "lcm_update", "vae_decoder"]
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


# Any backend


class Toy:
    """Writes engines of a backend with a text in them.

    Attributes:
        made: the graphs whose engines were made.
        fails_at: raises an error at this graph.
    """

    def __init__(self, bundle: Path, version: str = "1", types: str = "fp32") -> None:
        self.bundle = Bundle.load(bundle)
        self.version = version
        self.types = types
        self.made: list[str] = []
        self.fails_at: str | None = None

    def build(self, **options: Any) -> EngineIndex:
        index = EngineIndex(backend="openvino", precision="fp32", engines={})
        return write_set(
            self.bundle,
            SetBuild(index, GRAPHS, self._spec, self._make, {"types": self.types}),
            BuildOptions(**options),
            lambda text, fraction: None,
        )

    def stop(self, graph: str, **options: Any) -> None:
        """Builds until a graph fails."""
        self.fails_at = graph
        with pytest.raises(BackendError, match=f"no {graph}"):
            self.build(**options)
        self.fails_at = None
        self.made.clear()

    def text(self, graph: str) -> str:
        return (self.bundle.folder / "engines/openvino/fp32" / f"{graph}.onnx").read_text()

    def _spec(self, graph: str) -> EngineSpec:
        return any_size_spec(self.bundle, graph, "openvino", "fp32", self.version)

    def _make(self, graph: str, folder: Path, report: Any) -> EngineRecord:
        (folder / f"{graph}.weights").write_text("beside it")
        if graph == self.fails_at:
            raise BackendError("build", f"no {graph}")
        self.made.append(graph)
        path = folder / f"{graph}.onnx"
        path.write_text(f"{graph} {self.version}")
        return engine_record(path, self._spec(graph), {}, path.with_suffix(".weights"))


def names(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines/openvino").iterdir())


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


# One graph


def test_one_graph_is_built_for_itself_until_all_are_there(bundle: Path) -> None:
    toy = Toy(bundle)
    assert toy.build(graphs=("unet",)).missing == ("text_encoder", "lcm_update", "vae_decoder")
    assert find_set(bundle, "openvino", "fp32") is None
    assert toy.build(graphs=("vae_decoder", "unet")).missing == ("text_encoder", "lcm_update")
    assert toy.made == ["unet", "vae_decoder"]
    index = toy.build(graphs=("text_encoder", "lcm_update"))
    assert index.missing == ()
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


# The place of the set


STOPS: list[tuple[type[BaseException], int, bool]] = [
    (OSError, 1, False),
    (KeyboardInterrupt, 1, True),
    (OSError, 2, False),
    (KeyboardInterrupt, 2, False),
    (KeyboardInterrupt, 2, True),
]
"""What stops a build, at which of its two last renames, and whether after it."""


def stop_at_a_rename(patch: pytest.MonkeyPatch, error: type[BaseException], place: int, after: bool) -> None:
    renames: list[Path] = []
    rename = Path.rename

    def stopped(path: Path, other: Path) -> Path:
        renames.append(path)
        if len(renames) == place and not after:
            raise error
        result = rename(path, other)
        if len(renames) == place:
            raise error
        return result

    patch.setattr(Path, "rename", stopped)


def test_a_folder_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    source, target = tmp_path / ".set-1-0123abcd", tmp_path / "set"
    for text in ("first", "second"):
        source.mkdir()
        (source / "engine").write_text(text)
        replace_folder(source, target)
        assert [path.name for path in tmp_path.iterdir()] == ["set"]
        assert (target / "engine").read_text() == text


@pytest.mark.parametrize(("error", "place", "after"), STOPS)
def test_a_set_that_cannot_be_replaced_stays(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], place: int, after: bool
) -> None:
    """The set is there and whole after a stop at any moment, and the next build has nothing left to make."""
    Toy(bundle).build()
    newer, replaced = Toy(bundle, "2"), (place, after) == (2, True)
    with monkeypatch.context() as patch, pytest.raises(BackendError if error is OSError else error):
        stop_at_a_rename(patch, error, place, after)
        newer.build()
    engines = find_set(bundle, "openvino", "fp32")
    assert engines is not None
    assert [engines.fault(newer.bundle.manifest, graph) for graph in GRAPHS] == [None] * 4
    assert newer.text("unet") == ("unet 2" if replaced else "unet 1")
    assert len(list(unfinished_sets(bundle, "openvino"))) == (not replaced)
    newer.made.clear()
    newer.build()
    assert newer.made == (GRAPHS if replaced else [])
    assert newer.text("unet") == "unet 2"
    assert names(bundle) == ["fp32"]


# The typed graph


def test_the_typed_graph_stays_beside_its_engine_if_asked_for(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    workshop.build(bundle, keep_source=True)
    folder = workshop.folder(bundle)
    assert {f"{graph}.onnx" for graph in GRAPHS} == {path.name for path in folder.glob("*.onnx")}
    assert (folder / "unet.weights").stat().st_size > 100_000
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
