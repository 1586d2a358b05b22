"""Engines on the device, each compared with the portable graph on ONNX Runtime's CPU provider."""

import numpy as np
import pytest
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.comparison import measure
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes

from .conftest import Engines, open_executor

pytestmark = pytest.mark.gpu

GRAPHS = ("text_encoder", "vae_encoder", "controlnet_scribble", "controlnet_rgb", "unet", "lcm_update", "vae_decoder")


@pytest.mark.parametrize("precision, bound", [("fp16", 2e-2), ("fp32", 2e-3)])
@pytest.mark.parametrize("graph", GRAPHS)
def test_an_engine_gives_what_the_portable_graph_gives(
    engines: Engines, backend: str, graph: str, precision: str, bound: float
) -> None:
    """`bound` is relative to the largest value; for frames, on average, to 255."""
    bundle = Bundle.load(engines.bundle(backend, precision))
    record, sizes = bundle.graph(graph), bundle.manifest.sizes
    size = ClipSize(width=sizes.width, height=sizes.height, frames=sizes.frames)
    shapes = static_shapes(bundle.manifest, graph, size)
    feeds = {name: np.resize(values, shapes[name]) for name, values in random_inputs(bundle, graph).items()}
    (expected,) = run_portable(bundle.folder / record.path, feeds)
    executor = open_executor(bundle, backend, precision)
    try:
        opened = executor.open_graph(graph, size)
        try:
            outputs = opened.run(feeds)
        finally:
            opened.close()
    finally:
        executor.close()
    for item, actual in zip(record.outputs, outputs, strict=True):
        assert np.ptp(expected[item.name]) > 0, item.name
        found = measure(actual, expected[item.name])
        assert found.error <= bound * (1 if found.levels is None else 255), item.name
