"""A bundle without weights, a few megabytes, and random weights for it on another machine.

The weights are never zero and scaled as by `randomize` in random_checkpoints.py. They are cut from one block of random
numbers, so that gigabytes are written in seconds.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from sparsectrl_lcm.runtime.errors import BundleError
from sparsectrl_lcm.runtime.format.manifest import FileRecord, read_manifest

LEFT_OUT = ("controlnet_rgb", "vae_encoder", "vae_decoder_tiny")
"""Graphs that the measured requests do not use: 2 GB less to write."""
BLOCK = 1 << 24
"""Numbers in the random block."""
STRIDE = 1_000_003
"""A prime: the pieces of one weight begin that far from each other in the block."""
LEAST = 1e-2
GAINS = {"controlnet_cond_embedding": 1.8, "motion_modules": 1.3}
"""Those of random_checkpoints.py, which this module does not import because it imports diffusers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight in a file: random values times `gain`, plus `shift`. Without a gain: 0, 1, 2, ... as int64."""

    file: str
    offset: int
    count: int
    gain: float | None
    shift: float = 0.0


def strip(bundle: Path, target: Path) -> None:
    """Copies a bundle without its weights, and without `LEFT_OUT`."""
    manifest = read_manifest(bundle)
    graphs = {name: record for name, record in manifest.graphs.items() if name not in LEFT_OUT}
    kept = {manifest.tokenizer, *(record.path for record in graphs.values())}
    weights = {file for record in graphs.values() for file in record.weights}
    for name in kept:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / name, target / name)
    files = {name: record for name, record in manifest.files.items() if name in kept | weights}
    manifest.model_copy(update={"graphs": graphs, "files": files, "sources": {}}).write(target)


def holds_graphs_alone(folder: Path) -> bool:
    """Whether a folder is a bundle without weights, as `strip` writes it."""
    try:
        graphs = read_manifest(folder).graphs
    except BundleError:
        return False
    return not any((folder / file).exists() for record in graphs.values() for file in record.weights)


def write_weights(graphs: Path, target: Path, seed: int = 0) -> int:
    """Completes a stripped bundle with random weights. Does nothing if that was done before. Returns their bytes."""
    manifest = read_manifest(graphs)
    sizes = {file: manifest.files[file].bytes for record in manifest.graphs.values() for file in record.weights}
    if (target / "manifest.json").exists():
        return sum(sizes.values())
    for name in manifest.files.keys() - sizes.keys():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(graphs / name, target / name)
    block = random_block(seed)
    views = {file: np.memmap(target / file, np.uint8, "w+", shape=(nbytes,)) for file, nbytes in sizes.items()}
    weights = [weight for record in manifest.graphs.values() for weight in weights_of(graphs / record.path)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda weight: fill(views[weight.file], weight, block), weights))
        digests = dict(zip(views, pool.map(lambda view: hashlib.sha256(view).hexdigest(), views.values()), strict=True))
    written = {file: FileRecord(sha256=digests[file], bytes=nbytes) for file, nbytes in sizes.items()}
    manifest.model_copy(update={"files": {**manifest.files, **written}}).write(target)
    return sum(sizes.values())


def random_block(seed: int) -> NDArray[np.float32]:
    """Normal values, none near zero."""
    values = np.random.default_rng(seed).standard_normal(BLOCK, np.float32)
    return np.where(np.abs(values) < LEAST, np.float32(LEAST), values)


def fill(view: NDArray[np.uint8], weight: Weight, block: NDArray[np.float32]) -> None:
    """Writes a weight, in pieces of half a block; each begins at another place of the block."""
    if weight.gain is None:
        view[weight.offset : weight.offset + 8 * weight.count].view(np.int64)[:] = np.arange(weight.count)
        return
    half = block.size // 2
    target = view[weight.offset : weight.offset + 4 * weight.count].view(np.float32)
    for number, begin in enumerate(range(0, weight.count, half)):
        piece = target[begin : begin + half]
        start = (weight.offset // 4 + number * STRIDE) % half
        np.multiply(block[start : start + piece.size], np.float32(weight.gain), out=piece)
        piece += np.float32(weight.shift)


def weights_of(path: Path) -> Iterator[Weight]:
    """The weights of a graph, with the scale that keeps activations near unit size."""
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (Path(path.parent.name) / tensor.location).as_posix()
        shape = tuple(int(size) for size in tensor.shape)
        if name.endswith("position_ids"):
            yield Weight(file, tensor.offset or 0, prod(shape), None)
            continue
        assert tensor.dtype == ir.DataType.FLOAT, f"{name} is not float32"
        gain, shift = 0.1, 0.0
        if len(shape) > 1 and "embedding.weight" not in name:
            gain = prod(factor for part, factor in GAINS.items() if part in name) / fan_in(value, shape) ** 0.5
        elif len(shape) == 1 and name.endswith("weight"):
            gain, shift = 0.2, 1.0
        yield Weight(file, tensor.offset or 0, prod(shape), gain, shift)


def fan_in(value: ir.Value, shape: tuple[int, ...]) -> int:
    """The number of inputs of each output."""
    transposed = any(use.node.op_type == "MatMul" for use in value.uses())
    return shape[0] if transposed else prod(shape[1:])
