"""Writes the precision into the graph: every tensor gets a type, and values that fp16 cannot hold stay in fp32.

TensorRT 11 takes only strongly typed networks, so the builder chooses no type. Weights and most activations get the
low precision. These stay in fp32: layer norms, group norms with their SiLU, statistics, softmax (a fused attention
keeps its own in fp32), the timestep's sinusoids, rounding to uint8, and the LCM update.
"""

import re
from collections.abc import Callable

import onnx_ir as ir

from ...runtime.format.weights import convert
from .node_helpers import cast, insert_behind

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}

_FLOAT = ir.DataType.FLOAT
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ISLAND_GRAPHS = ("lcm_update",)
_ISLAND_INPUTS = ("latents", "timestep", "conditioning", "conditioning_mask", "conditioning_scale", "prediction")
"""Inputs and outputs in fp32; prompt embeddings and residuals get the low precision."""
_ISLAND_OPERATORS = {
    *("InstanceNormalization", "LayerNormalization", "Softmax"),
    *("ReduceL2", "ReduceMean", "ReduceSum"),
    *("Clip", "Cos", "Exp", "Max", "Min", "Round", "Sin"),
}
_ISLAND_MODULES = re.compile(
    r"^conv_in/|(^|\.)(norm\d*|layer_norm\d|final_layer_norm|group_norm|conv_norm_out|time_proj)/"
)
"""The UNet's first convolution takes the latents, whose rounding all layers after it would see."""
_LAST_CONVOLUTION = re.compile(r"^conv_(act|out)/")
_FP32_WEIGHTS = "GroupNorm"
"""ONNX Runtime's group norm. It takes and gives the low precision, but no other weights than fp32."""
_FUSED_NORMS = ("GroupNormalization", _FP32_WEIGHTS)
"""They compute in fp32 whatever they take and give."""
_RESIDUAL_STREAMS = re.compile(r"(resnets|attentions|motion_modules|transformer_blocks)\.\d+/(Add|Div)_|(^|\.)time_emb")

Islands = Callable[[ir.Node], bool]
"""Whether a node stays in fp32, besides those that always do."""
MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape"),
    *("Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""Operators that move values and keep their type."""
_MOVES_ONE = {"Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Those that move a single input, independent of its values."""


def is_residual_stream(node: ir.Node) -> bool:
    """Whether a node adds to a residual stream, which bf16 with its 8 bits would round at every layer."""
    return _RESIDUAL_STREAMS.search(node.name or "") is not None


def is_last_convolution(node: ir.Node) -> bool:
    """Whether a node is the UNet's last convolution, whose result is the prediction, or the SiLU before it."""
    return _LAST_CONVOLUTION.search(node.name or "") is not None


def _has_silu(norm: ir.Node) -> bool:
    """Whether a SiLU takes the result of a norm."""
    return {use.node.op_type for use in norm.outputs[0].uses()} == {"Mul", "Sigmoid"}


def _is_silu_of_norm(node: ir.Node) -> bool:
    """Whether a node belongs to the SiLU after a GroupNormalization."""
    before = [value.producer() for value in node.inputs if value is not None]
    operators = sorted(maker.op_type for maker in before if maker is not None)
    return (node.op_type, *operators) in (
        ("Sigmoid", "GroupNormalization"),
        ("Mul", "GroupNormalization", "Sigmoid"),
    )


def assign_types(
    model: ir.Model, precision: str, islands: Islands = lambda node: False, low_norms: bool = False
) -> None:
    """Gives every value of a graph its type, in place. Inserts casts between types and converts weights.

    Args:
        model: a graph in fp32, portable or fused.
        precision: fp16, bf16 or fp32.
        islands: whether a node stays in fp32, besides those that always do.
        low_norms: whether fused group norms take and give the low precision even if a SiLU follows.
    """
    if precision != "fp32" and model.graph.name not in _ISLAND_GRAPHS:
        _Typing(model.graph, DTYPES[precision], islands, low_norms).run()


class _Typing:
    """One walk over a graph in its order; `types` holds every float value seen so far."""

    def __init__(self, graph: ir.Graph, low: ir.DataType, islands: Islands, low_norms: bool) -> None:
        self.graph = graph
        self.islands = islands
        self.low_norms = low_norms
        self.low = low
        self.precision = next(name for name, dtype in DTYPES.items() if dtype == low)
        self.types: dict[ir.Value, ir.DataType] = {}
        self.twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == _FLOAT:
                self.types[value] = _FLOAT
        for value in self.graph.inputs:
            if value.dtype == _FLOAT:
                self.types[value] = value.dtype = self.boundary(value)
        for node in list(self.graph):
            self.visit(node)
        for index, value in enumerate(self.graph.outputs):
            if value in self.types:
                self.graph.outputs[index] = self.output(value)
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        for node in list(self.graph):
            if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) == self.low:
                self.hoist(node)

    def hoist(self, cast: ir.Node) -> None:
        """Moves a cast to the low type before operators that only move values: they then move half the bytes."""
        result = cast.outputs[0]
        while (source := cast.inputs[0]) and (move := source.producer()) and move.op_type in _MOVES_ONE:
            moved = move.outputs[0]
            if len(moved.uses()) != 1 or self.types.get(moved) != _FLOAT or result in self.graph.outputs:
                return
            users = list(result.uses())
            cast.replace_input_with(0, move.inputs[0])
            move.replace_input_with(0, result)
            for use in users:
                use.node.replace_input_with(use.idx, moved)
            self.graph.remove(cast)
            self.graph.insert_before(move, cast)
            self.types[moved] = self.low

    def boundary(self, value: ir.Value) -> ir.DataType:
        return _FLOAT if value.name in _ISLAND_INPUTS else self.low

    def visit(self, node: ir.Node) -> None:
        first_only = node.op_type in ("Resize", _FP32_WEIGHTS)  # scales, weight and bias are always in fp32
        inputs = node.inputs[:1] if first_only else node.inputs
        floats = [value for value in inputs if value in self.types]
        if node.op_type == "Cast":
            target = ir.DataType(node.attributes["to"].as_int())
            if target in _FLOATS:
                self.types[node.outputs[0]] = target
        elif floats and node.op_type != "Shape":
            wanted = self.node_type(node, floats)
            for index, value in enumerate(inputs):
                if value in self.types and self.types[value] != wanted:
                    node.replace_input_with(index, self.twin(value, wanted))
            for output in node.outputs:
                self.types[output] = wanted

    def node_type(self, node: ir.Node, floats: list[ir.Value | None]) -> ir.DataType:
        computed = {self.types[value] for value in floats if value is not None and value.const_value is None}
        if node.op_type in MOVES and len(computed) == 1:
            return computed.pop()
        if node.op_type in _FUSED_NORMS:
            return _FLOAT if self.is_fp32_norm(node, computed) else self.low
        if _is_silu_of_norm(node):
            return computed.pop()
        island = node.op_type in _ISLAND_OPERATORS or _ISLAND_MODULES.search(node.name or "")
        return _FLOAT if island or self.islands(node) else self.low

    def is_fp32_norm(self, norm: ir.Node, computed: set[ir.DataType]) -> bool:
        """Whether a fused group norm is in fp32, with casts before and after it.

        TensorRT makes one kernel of casts, norm and SiLU, which reads and writes the low precision, while the weights
        stay exact. A cast after the norm itself would be a kernel of its own: that norm is in the low precision.
        """
        takes_low = norm.op_type == "GroupNormalization" and computed == {self.low}
        return takes_low and _has_silu(norm) and not self.low_norms

    def twin(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """Returns `value` in another type, one twin for all users."""
        if (value, wanted) not in self.twins:
            make = self.converted if value.const_value is not None else self.cast
            self.twins[value, wanted] = make(value, wanted)
            self.types[self.twins[value, wanted]] = wanted
        return self.twins[value, wanted]

    def cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        name = f"{value.name}.{wanted.name.lower()}"
        node = cast(value, wanted, name)
        insert_behind(self.graph, value, node)
        return node.outputs[0]

    def converted(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """Returns a weight in another type. It takes over the name, by which refit finds it."""
        source, name = value.const_value, value.name
        assert source is not None
        assert name is not None
        del self.graph.initializers[name]
        value.name = source.name = f"{name}.float"
        self.graph.initializers[value.name] = value
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(convert(source.numpy(), self.precision).view(wanted.numpy()), dtype=wanted),
            dtype=wanted,
            shape=ir.Shape(source.shape),
            name=name,
        )
        twin = ir.Value(name=name, const_value=tensor, shape=ir.Shape(source.shape), type=ir.TensorType(wanted))
        self.graph.initializers[name] = twin
        return twin

    def output(self, value: ir.Value) -> ir.Value:
        """Returns an output in its type at the graph's boundary."""
        wanted = self.boundary(value)
        if self.types[value] != wanted:
            name, shape = value.name, value.shape
            value.name, value.type, value.shape = f"{name}.{self.types[value].name.lower()}", None, None
            value = self.cast(value, wanted)
            value.name, value.shape = name, shape
        value.dtype = wanted
        return value
