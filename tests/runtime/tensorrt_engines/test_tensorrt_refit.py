"""Engines get other weights by name, or those of the bundle when they are opened."""

import ctypes
import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.tensorrt_builds import SIZE, Workshop, plan_of, small_copy
from fakes.tensorrt_process import GRAPH, Opened, Process, one_line
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.cuda import Cuda

REFITTED = ClipSize(width=64, height=64, frames=2)
"""The clip size of the refittable engines."""


@pytest.fixture(scope="module")
def refittable(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = small_copy(tmp_path_factory.mktemp("refittable"), decoder="vae_decoder")
    Workshop(release).build(bundle, REFITTED, refit=True)
    return bundle


@pytest.fixture
def refitting(release: str, refittable: Path) -> Opened:
    return Process(release, refittable, REFITTED).open()


def table_of(opened: Opened) -> WeightTable:
    return opened.loader.weight_table(opened.bundle, GRAPH, REFITTED)


def test_weights_are_set_by_name_in_their_types(refitting: Opened) -> None:
    table, workshop = table_of(refitting), refitting.workshop
    refitting.engine.refit(table.root, lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == list(table.root)
    types = {"fp16": np.float16, "fp32": np.float32}
    for (values,), (name, record) in zip(workshop.calls("Weights"), table.root.items(), strict=True):
        assert values.dtype == types[record.precision]
        np.testing.assert_array_equal(values, table.read(refitting.bundle, name))
    assert {record.precision for record in table.root.values()} == {"fp16", "fp32"}
    names = [name for name, _, _ in workshop.trt.calls]
    assert names.count("Refitter.refit_cuda_engine") == 1
    assert "Refitter.set_named_weights" not in names[names.index("Refitter.refit_cuda_engine") :]


def test_bfloat16_is_given_by_its_address_and_lives_until_the_refit(refitting: Opened) -> None:
    workshop, trt = refitting.workshop, refitting.workshop.trt
    name = next(iter(table_of(refitting).root))
    bits = np.arange(1, 7, dtype=np.uint16)
    seen: list[bytes] = []

    def refit(_: Any) -> bool:
        gc.collect()
        (kind, address, count), *_rest = workshop.calls("Weights")
        assert (kind, count) == (trt.DataType.BF16, bits.size)
        seen.append(ctypes.string_at(address, 2 * count))
        return True

    trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit([name], lambda _: bits.copy().reshape(2, 3))
    assert seen == [bits.tobytes()]


def test_arrays_live_until_the_engine_is_refitted(refitting: Opened) -> None:
    """TensorRT keeps the addresses of the weights that it gets, and makes no copy."""
    table, trt = table_of(refitting), refitting.workshop.trt
    names, arrays, alive = list(table.root)[:3], [], []

    def read(_: str) -> Any:
        values = np.ones(3, np.uint16)
        arrays.append(weakref.ref(values))
        return values

    def refit(_: Any) -> bool:
        gc.collect()
        alive.extend(array() is not None for array in arrays)
        return True

    trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit(names, read)
    assert alive == [True] * 3
    gc.collect()
    assert [array() for array in arrays] == [None] * 3


def test_weights_that_were_merged_are_given_too(refitting: Opened) -> None:
    table, workshop = table_of(refitting), refitting.workshop
    first, second, third = list(table.root)[:3]
    answers = iter([[second], [third], []])
    workshop.trt.answers["Refitter.get_missing_weights"] = lambda _: next(answers)
    refitting.engine.refit([first], lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == [first, second, third]
    assert len(workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_a_weight_is_given_once(refitting: Opened) -> None:
    """Also if the refitter keeps asking for it."""
    table, workshop = table_of(refitting), refitting.workshop
    first, second, third = list(table.root)[:3]
    workshop.trt.answers["Refitter.get_missing_weights"] = lambda _: [first, third, second]
    refitting.engine.refit([first, second], lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == [first, second, third]
    assert len(workshop.calls("Refitter.get_missing_weights")) == 2
    assert len(workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_the_stream_is_waited_for_before_a_refit(refitting: Opened) -> None:
    def refit(_: Any) -> bool:
        assert refitting.cudart.calls[-1] == "cudaStreamSynchronize"
        return True

    refitting.workshop.trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit([next(iter(table_of(refitting).root))], lambda _: np.zeros(1, np.float16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Refitter.set_named_weights", "refuses the weight"),
        ("Refitter.refit_cuda_engine", "cannot refit"),
    ],
)
def test_a_refit_that_fails_is_an_error(refitting: Opened, name: str, message: str) -> None:
    refitting.workshop.fail(name, "Error Code 3:\nwrong count", False)
    table = table_of(refitting)
    with pytest.raises(BackendError, match=message) as error:
        refitting.engine.refit(table.root, lambda weight: table.read(refitting.bundle, weight))
    one_line(error, "Error Code 3: wrong count")


def test_an_unknown_weight_is_refused(refitting: Opened) -> None:
    with pytest.raises(BackendError, match="no weight 'conv_in.bogus'") as error:
        refitting.engine.refit(["conv_in.bogus"], lambda _: np.zeros(1, np.float16))
    one_line(error)
    assert refitting.workshop.calls("Refitter.refit_cuda_engine") == []


def test_a_missing_weight_that_no_table_has_is_an_error(refitting: Opened) -> None:
    """Constants of the graph have no name in a checkpoint."""
    table, answers = table_of(refitting), refitting.workshop.trt.answers
    answers["Refitter.get_all_weights"] = lambda _: [*table.root, "val_17"]
    answers["Refitter.get_missing_weights"] = lambda _: ["val_17"]
    with pytest.raises(BackendError, match="needs the weight 'val_17', which the bundle does not have") as error:
        refitting.engine.refit(list(table.root)[:1], lambda name: table.read(refitting.bundle, name))
    one_line(error)
    assert refitting.workshop.calls("Refitter.refit_cuda_engine") == []


def test_engines_that_were_not_built_for_it_are_not_refitted(opened: Opened) -> None:
    with pytest.raises(BackendError, match="refit") as error:
        opened.engine.refit(["conv_in.weight"], lambda _: np.zeros(1, np.float16))
    one_line(error)
    assert opened.workshop.calls("Refitter") == []
    assert opened.loader.weight_table(opened.bundle, GRAPH, SIZE).root == {}
    with pytest.raises(BackendError, match="refit"):
        opened.loader.check_refit(opened.bundle)


def test_engines_that_were_built_for_it_can_be_refitted(refitting: Opened) -> None:
    refitting.loader.check_refit(refitting.bundle)


def test_engines_keep_their_own_weights_when_they_are_opened(refitting: Opened) -> None:
    assert refitting.workshop.calls("Refitter") == []


def test_stripped_engines_get_the_weights_of_the_bundle(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, strip_weights=True)
    opened = Process(release, bundle).open()
    table = opened.loader.weight_table(opened.bundle, GRAPH, SIZE)
    given = opened.workshop.calls("Refitter.set_named_weights")
    assert [name for name, _ in given] == list(table.root)
    names = [name for name, _, _ in opened.workshop.trt.calls]
    assert names.index("Refitter.refit_cuda_engine") < names.index("ICudaEngine.create_execution_context")
    assert set(table.root) == set(plan_of(Process(release, bundle).folder / f"{GRAPH}.engine")["weights"])
    assert len(opened.workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_stripped_engines_get_no_weights_that_were_changed(release: str, tmp_path: Path) -> None:
    """An export into an open bundle does this."""
    process = Process(release, small_copy(tmp_path))
    process.workshop.build(process.bundle, strip_weights=True)
    bundle, cuda = Bundle.load(process.bundle), Cuda(process.cudart)
    path = process.bundle / bundle.graph(GRAPH).weights[0]
    path.write_bytes(bytes(path.stat().st_size))
    shapes = static_shapes(bundle.manifest, GRAPH, SIZE)
    with pytest.raises(BackendError, match="differs from its checksum since the bundle was loaded; load it") as error:
        process.loader.open(bundle, GRAPH, SIZE, shapes, cuda)
    one_line(error, repr(bundle.graph(GRAPH).weights[0]))
    assert process.workshop.calls("Refitter") == []


def test_a_stripped_engine_without_weights_is_opened_too(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, strip_weights=True)
    opened = Process(release, bundle).open("lcm_update")
    assert opened.workshop.calls("Refitter.set_named_weights") == []
    assert opened.loader.weight_table(opened.bundle, "lcm_update", SIZE).root == {}


def test_a_damaged_weight_table_is_refused(release: str, refittable: Path, tmp_path: Path) -> None:
    process = Process(release, Path(shutil.copytree(refittable, tmp_path / "bundle")), REFITTED)
    (process.folder / f"{GRAPH}.weights.json").write_text("{")
    process.refuses("differs from its checksum", "--refit")
    with pytest.raises(BackendError, match=r"weights\.json.*build the engines again") as error:
        process.loader.weight_table(Bundle.load(process.bundle), GRAPH, REFITTED)
    one_line(error)
