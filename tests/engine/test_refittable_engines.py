"""Engines of a bundle that got other weights: those of a fake TensorRT that can be refitted stay, others are stale."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
from fakes.tensorrt_builds import SIZE, Workshop, small_copy
from fakes.tensorrt_process import GRAPH, Process
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.manifest import FileRecord, Manifest, read_manifest
from sparsectrl_lcm.runtime.format.refittable_engines import keep_refittable

FILE = "onnx/vae_decoder_tiny.weights"


def with_other_weights(bundle: Path) -> Manifest:
    """Changes the weights of the decoder; returns the manifest from before."""
    before = read_manifest(bundle)
    values = np.fromfile(bundle / FILE, np.float32) * np.float32(1.25)
    (bundle / FILE).write_bytes(values.tobytes())
    record = FileRecord(sha256=hashlib.sha256(values.tobytes()).hexdigest(), bytes=values.nbytes)
    before.model_copy(update={"files": before.files | {FILE: record}}).write(bundle)
    return before


def after_a_swap(bundle: Path, before: Manifest) -> list[str]:
    return list(keep_refittable(bundle, before, read_manifest(bundle), ["tensorrt", "openvino"]))


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_engines_that_can_be_refitted_get_the_new_weights_at_load(option: str, tmp_path: Path) -> None:
    bundle, workshop = small_copy(tmp_path), Workshop("11.4")
    workshop.build(bundle, **{option: True})
    assert after_a_swap(bundle, read_manifest(bundle)) == []
    before = with_other_weights(bundle)
    process = Process("11.4", bundle)
    with pytest.raises(BackendError, match="was built from another bundle"):
        process.open()
    (line,) = after_a_swap(bundle, before)
    assert line == f"tensorrt engines {SIZE}-fp16: they get the new weights when they are loaded"
    for _ in range(2):  # every load does
        process = Process("11.4", bundle)
        opened = process.open()
        table = opened.loader.weight_table(opened.bundle, GRAPH, SIZE)
        given = dict(opened.workshop.calls("Refitter.set_named_weights"))
        assert given.keys() == table.root.keys()
    name = next(name for name, record in table.root.items() if record.precision == "fp16" and len(record.shape) > 1)
    record = table.root[name]
    values = np.fromfile(bundle / FILE, np.float32, int(np.prod(record.shape)), offset=record.offset)
    assert zlib.crc32(table.read(opened.bundle, name).tobytes()) == zlib.crc32(values.astype(np.float16).tobytes())
    assert after_a_swap(bundle, before) == []


def test_other_engines_are_stale_with_the_command_that_builds_them(tmp_path: Path) -> None:
    bundle, workshop = small_copy(tmp_path), Workshop("11.4")
    workshop.build(bundle)
    before = with_other_weights(bundle)
    (line,) = after_a_swap(bundle, before)
    size = f"--size {SIZE.width}x{SIZE.height} --frames {SIZE.frames}"
    command = f"sparsectrl-lcm build {bundle} --backend tensorrt {size} --precision fp16"
    assert line == f"tensorrt engines {SIZE}-fp16: stale; run: {command}"
    Process("11.4", bundle).refuses("was built from another bundle")
    Process("11.4", bundle).load("text_encoder")
