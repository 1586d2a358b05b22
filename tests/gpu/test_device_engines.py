"""Engines on the device, each compared with ONNX Runtime's CPU provider on the portable graph."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from sparsectrl_lcm.engine.check import random_inputs
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.gpu.buffers import Block, Inputs, aligned

from .conftest import Engines, open_executor

pytestmark = pytest.mark.gpu

GRAPHS = ("text_encoder", "vae_encoder", "controlnet_scribble", "controlnet_rgb", "unet", "lcm_update", "vae_decoder")

Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize("precision, bound", [("fp16", 2e-2), ("fp32", 2e-3)])
@pytest.mark.parametrize("graph", GRAPHS)
def test_an_engine_gives_what_the_portable_graph_gives(
    engines: Engines, backend: str, graph: str, precision: str, bound: float
) -> None:
    bundle = Bundle.load(engines.bundle(backend, precision))
    sizes = bundle.manifest.sizes
    size = ClipSize(width=sizes.width, height=sizes.height, frames=sizes.frames)
    shapes = static_shapes(bundle.manifest, graph, size)
    feeds = {name: np.resize(values, shapes[name]) for name, values in random_inputs(bundle, graph).items()}
    session = onnxruntime.InferenceSession(bundle.folder / bundle.graph(graph).path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    expected = dict(zip(names, session.run(None, feeds), strict=True))
    actual = run_engine(bundle, backend, precision, graph, size, feeds)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert np.ptp(values) > 0, name
        assert error(actual[name], values) <= bound, name


def run_engine(bundle: Bundle, backend: str, precision: str, graph: str, size: ClipSize, feeds: Arrays) -> Arrays:
    """Runs an engine once and returns its outputs."""
    executor: Any = open_executor(bundle, backend, precision)
    cuda, shapes = executor._cuda, static_shapes(bundle.manifest, graph, size)
    engine = executor._loader.open(bundle, graph, size, shapes, cuda)
    block = Block()
    for name, shape in shapes.items():
        block.add(name, shape, engine.dtypes[name])
    buffers = Inputs(cuda, block)
    activation = cuda.allocate(aligned(max(engine.activation_bytes, 1)))
    try:
        for name, values in feeds.items():
            buffers.array(name)[:] = values
        cuda.copy_in(block.address, buffers.host, block.nbytes)
        engine.use_activation(activation, aligned(max(engine.activation_bytes, 1)))
        engine.enqueue({name: block.at(name) for name in shapes})
        cuda.copy_out(buffers.host, block.address, block.nbytes)
        cuda.synchronize()
        return {item.name: buffers.array(item.name).copy() for item in bundle.graph(graph).outputs}
    finally:
        cuda.synchronize()
        engine.close()
        buffers.close()
        cuda.free(activation)
        executor.close()


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference relative to the largest value, or for frames the mean difference / 255."""
    off = np.abs(actual.astype(np.float64) - expected)
    return float(off.mean() / 255) if expected.dtype == np.uint8 else float(off.max() / np.abs(expected).max())
