"""Engines for other numbers of keyframes than the bundle's three, with a strict fake of TensorRT."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.tensorrt_builds import SIZE, Workshop, plan_of, small_copy
from fakes.tensorrt_process import Process
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.verify.header import Header
from sparsectrl_lcm.engine.verify.recording import with_slots_of
from sparsectrl_lcm.engine.verify.saved_results import SavedResults
from sparsectrl_lcm.runtime.errors import BackendError, InvalidRequest
from sparsectrl_lcm.runtime.example_requests import sample_requests
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import static_shapes
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_name

RELEASE, GRAPH, SLOTS = "11.4", "controlnet_scribble", 4


@dataclass
class Built:
    """A bundle whose engines take four keyframes; a set for three was there before."""

    bundle: Bundle
    workshop: Workshop
    usual: EngineIndex
    index: EngineIndex


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, workshop = small_copy(tmp_path_factory.mktemp("built"), GRAPH), Workshop(RELEASE)
    usual, index = workshop.build(folder), workshop.build(folder, keyframe_slots=SLOTS, graphs=(GRAPH,))
    return Built(Bundle.load(folder), workshop, usual, index)


def test_only_engines_that_take_keyframes_are_built_again(built: Built) -> None:
    """`--graph` takes the others from the set that is there."""
    assert built.index.missing == ()
    assert built.index.keyframe_slots == SLOTS
    keys = [{graph: record.key for graph, record in index.engines.items()} for index in (built.usual, built.index)]
    assert {graph for graph, key in keys[0].items() if keys[1][graph] != key} == {GRAPH}
    plan = plan_of(built.workshop.folder(built.bundle.folder) / f"{GRAPH}.engine")
    assert plan["shapes"]["conditioning"] == [SLOTS + 1, SIZE.height, SIZE.width, 3], "the keyframes and a blank"
    assert plan["shapes"]["conditioning_mask"] == [SLOTS + 1]


def test_engines_are_opened_for_their_keyframes_and_refuse_more(built: Built) -> None:
    process = Process(RELEASE, built.bundle.folder)
    assert [process.loader.keyframe_slots(built.bundle, SIZE, wanted) for wanted in (0, 3, SLOTS)] == [SLOTS] * 3
    shapes = static_shapes(built.bundle.with_keyframe_slots(SLOTS).manifest, GRAPH, SIZE)
    process.shapes = {name: shapes[name] for name in ("conditioning", "conditioning_mask")}
    process.open(GRAPH)
    command = f"run: sparsectrl-lcm build {built.bundle.folder} --backend tensorrt --size 64x64 --frames 4 --keyframes"
    with pytest.raises(InvalidRequest) as refused:
        process.loader.keyframe_slots(built.bundle, SIZE, 6)
    assert str(refused.value) == f"keyframes: 6 were given, the engines take 4; {command} 6 --precision fp16"
    process.shapes = {}
    with pytest.raises(BackendError, match="was built for other shapes") as stale:
        process.open(GRAPH)
    assert str(stale.value).endswith(f"; {command} 4 --precision fp16")


def test_verify_records_as_many_keyframes_as_the_engines_take(built: Built, tmp_path: Path) -> None:
    engines = find_set(built.bundle.folder, built.workshop.backend, set_name("fp16", SIZE))
    bundle = with_slots_of(engines, built.bundle, None)
    assert bundle.manifest.keyframe_slots == SLOTS
    assert with_slots_of(None, built.bundle, None) is built.bundle, "portable graphs take any number"
    results = SavedResults(tmp_path, Header(size=SIZE, keyframe_slots=3, graphs={}))
    with pytest.raises(InvalidRequest, match="load: the results are of 3 keyframes, the engines take 4"):
        with_slots_of(engines, built.bundle, results)
    one = built.bundle.with_keyframe_slots(1)
    assert [len(request.keyframes) for request in sample_requests(one, SIZE)] == [0, 1]


@pytest.mark.parametrize(
    ("backend", "slots", "message"),
    [
        ("tensorrt-rtx", "0", "--keyframes: 0 is out of range; allowed are 1 to 16"),
        ("tensorrt-rtx", "17", "--keyframes: 17 is out of range; allowed are 1 to 16"),
        ("onnxruntime", "4", "--keyframes: not an option of onnxruntime"),
    ],
)
def test_bad_numbers_are_refused(
    backend: str, slots: str, message: str, built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(built.bundle.folder), "--backend", backend, "--keyframes", slots]) == 2
    assert message in capsys.readouterr().err
