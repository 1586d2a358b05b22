"""The typed graphs of TensorRT's engines in operators that ONNX Runtime's CPU provider has."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from ...runtime.format.bundle import Bundle
from ..rewrites.attention_steps import write_out_attention
from ..rewrites.precision import DTYPES
from ..rewrites.typed_graph import typed_graph
from .fp8 import FP8, Ranges, calibrate, precision_around, to_fp8


def emulated_graphs(bundle: Bundle, precision: str) -> Callable[[str], ir.Model]:
    """Returns a function that makes the graph of an engine, given its name. See `engine.emulated_sessions`."""

    types = precision_around(precision)
    ranges: dict[str, Ranges] = {}
    if precision == FP8:
        with TemporaryDirectory(prefix="sparsectrl-lcm-") as folder:
            ranges = calibrate(bundle, Path(folder), list(bundle.manifest.graphs))

    def make(graph: str) -> ir.Model:
        model = typed_graph(bundle, graph, types, low_norms=graph in ranges)
        write_out_attention(model, DTYPES[types])
        to_fp8(model, ranges.get(graph, {}))
        return model

    return make
