"""The TensorRT builder with strict fakes of each release. The real compilation by a GPU is not tested here."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import (
    BYTES_MOVED,
    H200,
    LAYERS,
    RELEASES,
    RTX_4090,
    SIZE,
    TENSORRT,
    Workshop,
    demo_copy,
    plan_of,
    small_copy,
)
from sparsectrl_lcm.engine.tensorrt import builder
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_name
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.device import Device


@dataclass
class Built:
    """A whole build, which tests only read."""

    workshop: Workshop
    bundle: Bundle
    index: EngineIndex
    progress: list[tuple[str, float]]

    @property
    def folder(self) -> Path:
        return self.workshop.folder(self.bundle.folder)

    def plan(self, graph: str) -> dict[str, Any]:
        return plan_of(self.folder / f"{graph}.engine")


@pytest.fixture(scope="module", params=RELEASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        bundle, workshop = demo_copy(tmp_path_factory.mktemp("built")), Workshop(request.param)
        progress: list[tuple[str, float]] = []
        index = workshop.build(bundle, on_progress=lambda *reported: progress.append(reported))
        yield Built(workshop, Bundle.load(bundle), index, progress)


@pytest.fixture(params=RELEASES)
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return Workshop(request.param)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A whole build


def test_every_graph_gets_an_engine_and_nothing_else_stays(built: Built) -> None:
    graphs = list(built.bundle.manifest.graphs)
    assert entries(built.folder) == sorted([*(f"{graph}.engine" for graph in graphs), "engines.json"])
    assert list(built.index.engines) == graphs
    assert [built.plan(graph)["graph"] for graph in graphs] == graphs
    assert built.workshop.left(built.bundle.folder) == (["64x64x4-fp16"], built.workshop.timings(*graphs))


def test_the_index_tells_what_the_engines_depend_on(built: Built) -> None:
    found = find_set(built.bundle.folder, built.workshop.backend, set_name("fp16", SIZE))
    assert found is not None
    assert found.index == built.index
    for graph, record in found.index.engines.items():
        assert record.key == record.spec.key()
        assert record.spec.graph == graph
        assert record.spec.version == built.workshop.version
        scope = {"tensorrt": "NVIDIA H200 (compute capability 9.0)", "tensorrt-rtx": "any"}
        assert record.spec.device == scope[built.workshop.backend]
        wanted = (graph, record.spec.version, record.spec.device, record.spec.shapes)
        assert found.open(built.bundle.manifest, *wanted) == built.folder / f"{graph}.engine"


def test_inputs_get_the_static_shapes_of_the_size(built: Built) -> None:
    for graph, record in built.bundle.manifest.graphs.items():
        shapes = static_shapes(built.bundle.manifest, graph, SIZE)
        expected = {item.name: shapes[item.name] for item in record.inputs}
        assert {name: tuple(shape) for name, shape in built.plan(graph)["shapes"].items()} == expected
        assert built.index.engines[graph].spec.shapes == expected
    assert built.plan("unet")["shapes"]["latents"] == [1, 4, 4, 8, 8]
    assert built.plan("controlnet_scribble")["shapes"]["conditioning"] == [4, 64, 64, 3]


def test_networks_are_strongly_typed_and_attention_may_be_split(built: Built) -> None:
    strongly_typed = 1 << int(built.workshop.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert set(built.workshop.calls("Builder.create_network")) == {(strongly_typed,)}
    attentions = built.plan("unet")["decomposable"]
    assert attentions
    assert all(attentions)


def test_the_index_tells_what_the_engines_are_made_of(built: Built) -> None:
    for record in built.index.engines.values():
        assert record.report["layers"] == {layer["LayerType"]: 1 for layer in LAYERS}
        assert record.report["attention"].keys() == {"spatial", "temporal"}
        assert record.report["bytes_moved"] == BYTES_MOVED
        assert record.report["seconds"] >= 0


def test_progress_names_every_graph(built: Built) -> None:
    fractions = [fraction for _, fraction in built.progress]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    graphs = list(built.bundle.manifest.graphs)
    named = list(dict.fromkeys(text.partition(":")[0] for text, _ in built.progress))
    assert named == [f"{graph} ({place}/{len(graphs)})" for place, graph in enumerate(graphs, start=1)]


def test_weights_are_refittable_only_where_that_was_asked_for(built: Built) -> None:
    assert built.workshop.calls("INetworkDefinition.mark_weights_refittable") == []
    assert all(built.plan(graph)["refittable"] == [] for graph in built.index.engines)


@pytest.mark.parametrize("release", TENSORRT)
def test_what_was_measured_of_kernels_serves_the_next_build(release: str, bundle: Path) -> None:
    first, second = Workshop(release), Workshop(release)
    graphs = list(first.build(bundle).engines)
    folder = first.folder(bundle).parent
    (name,) = [name for name in entries(folder) if name.startswith("timing-")]
    assert first.version in name
    assert "H200-9.0" in name
    measured = "".join(f"{graph};" for graph in graphs).encode()
    assert (folder / name).read_bytes() == measured
    assert list(first.folder(bundle).glob("timing-*")) == [], "the timing cache lies beside the sets"
    known = [bytes(blob) for (blob,) in first.calls("IBuilderConfig.create_timing_cache")]
    assert known[:2] == [b"", f"{graphs[0]};".encode()]
    second.build(bundle, ClipSize(width=128, height=64, frames=2))
    assert bytes(second.calls("IBuilderConfig.create_timing_cache")[0][0]) == measured
    assert entries(folder) == sorted([name, "64x64x4-fp16", "128x64x2-fp16"])


@pytest.mark.parametrize("release", TENSORRT)
def test_without_room_for_what_was_measured_it_builds_all_the_same(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    parent = workshop.folder(bundle).parent
    part = f"timing-{workshop.version}-NVIDIA-H200-9.0.part"
    (parent / part).mkdir(parents=True)
    workshop.build(bundle)
    assert workshop.left(bundle) == (["64x64x4-fp16", part], None)


def test_tensorrt_rtx_measures_no_kernels(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    workshop.build(bundle)
    assert entries(workshop.folder(bundle).parent) == ["64x64x4-fp16"]
    assert workshop.calls("IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache") == []


def check_weight_tables(workshop: Workshop, bundle: Path, index: EngineIndex) -> None:
    """Checks that the weights read through the table equal the parsed weights bit for bit."""
    opened, folder = Bundle.load(bundle), workshop.folder(bundle, index.precision)
    for graph, record in index.engines.items():
        assert set(record.files) == {f"{graph}.engine", f"{graph}.weights.json"}
        table = WeightTable.model_validate_json((folder / f"{graph}.weights.json").read_text())
        values = {name: zlib.crc32(table.read(opened, name).tobytes()) for name in table.root}
        plan = plan_of(folder / f"{graph}.engine")
        assert values == plan["weights"]
        assert list(table.root) == plan["refittable"], "each is marked once, and no other"
        assert bool(values) == (graph != "lcm_update")


@pytest.mark.parametrize(("option", "precision"), [("refit", "bf16"), ("strip_weights", "fp32")])
def test_weight_tables_lie_beside_engines_that_can_be_refitted(
    workshop: Workshop, bundle: Path, option: str, precision: str
) -> None:
    check_weight_tables(workshop, bundle, workshop.build(bundle, precision=precision, **{option: True}))


def test_weight_tables_know_every_weight_of_every_graph(tmp_path: Path) -> None:
    workshop, bundle = Workshop("11.4"), demo_copy(tmp_path)
    check_weight_tables(workshop, bundle, workshop.build(bundle, refit=True))


def test_a_weight_that_cannot_be_marked_is_an_error(workshop: Workshop, bundle: Path) -> None:
    workshop.fail("INetworkDefinition.mark_weights_refittable", "Error Code 3:\nno such weight", False)
    with pytest.raises(BackendError) as error:
        workshop.build(bundle, refit=True)
    (name,), *others = workshop.calls("INetworkDefinition.mark_weights_refittable")
    assert others == []
    assert str(error.value) == (
        f"backend: {workshop.backend} {workshop.version} cannot make {name!r} of 'text_encoder' refittable: "
        "Error Code 3: no such weight"
    )
    assert workshop.calls("Builder.build_serialized_network") == []
    assert workshop.left(bundle) == ([], None)


@pytest.mark.parametrize("release", TENSORRT)
def test_a_version_compatible_engine_may_be_loaded_where_it_was_built(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    index = workshop.build(bundle, version_compatible=True)
    assert {record.spec.version for record in index.engines.values()} == {f"{workshop.version}+"}
    assert all(record.report["layers"] for record in index.engines.values())
    allowed = workshop.calls("Runtime.engine_host_code_allowed=")
    assert allowed == [(True,)] * len(workshop.calls("Runtime.deserialize_cuda_engine"))


# Without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise BackendError("backend", "no NVIDIA driver was found", "install one")

    monkeypatch.setattr(builder, "probe", probe)


@pytest.mark.usefixtures("no_gpu")
def test_tensorrt_rtx_builds_without_a_gpu(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    index = workshop.build(bundle, device=None, compute_capabilities=("12.0", "8.9"))
    assert list(index.engines) == list(Bundle.load(bundle).manifest.graphs)
    assert {record.spec.device for record in index.engines.values()} == {"8.9, 12.0"}
    assert workshop.calls("Runtime.deserialize_cuda_engine") == []


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_tensorrt_rtx_needs_a_gpu_to_build_for_refit(bundle: Path, option: str) -> None:
    with pytest.raises(BackendError, match="no NVIDIA driver.*refit and strip_weights need a GPU"):
        Workshop("rtx-1.7").build(bundle, device=None, **{option: True})


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("release", TENSORRT)
def test_tensorrt_needs_a_gpu_before_it_is_touched(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        workshop.build(bundle, device=None)
    assert workshop.calls("Builder", "Runtime") == []


def test_engines_for_other_gpus_are_built_on_any(bundle: Path) -> None:
    """An H200 cannot load an engine built only for 8.9. The builder's log has its kernels."""
    workshop = Workshop("rtx-1.7")
    workshop.fail("Runtime.deserialize_cuda_engine", "the engine is for other compute capabilities")
    index = workshop.build(bundle, compute_capabilities=("8.9",))
    assert {record.spec.device for record in index.engines.values()} == {"8.9"}
    assert all(record.report["bytes_moved"] == BYTES_MOVED for record in index.engines.values())
    assert workshop.calls("Runtime", "Runtime.deserialize_cuda_engine") == []


@pytest.mark.parametrize("device", [RTX_4090, H200])
def test_the_key_names_the_chosen_gpus_on_any(bundle: Path, device: Device) -> None:
    workshop = Workshop("rtx-1.7")
    index = workshop.build(bundle, device=device, compute_capabilities=("12.0", "8.9"))
    for record in index.engines.values():
        assert record.report["layers"] == {layer["LayerType"]: 1 for layer in LAYERS}
        assert record.spec.device == "8.9, 12.0"
