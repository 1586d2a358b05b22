"""The typed graphs of TensorRT's engines in operators that ONNX Runtime's CPU provider has."""

from collections.abc import Callable

import onnx_ir as ir

from ...runtime.format.bundle import Bundle
from ..rewrites.attention_steps import write_out_attention
from ..rewrites.precision import DTYPES
from ..rewrites.typed_graph import typed_graph


def emulated_graphs(bundle: Bundle, precision: str) -> Callable[[str], ir.Model]:
    """Returns a function that makes the graph of an engine, given its name. See `engine.emulated_sessions`."""

    def make(graph: str) -> ir.Model:
        model = typed_graph(bundle, graph, precision)
        write_out_attention(model, DTYPES[precision])
        return model

    return make
