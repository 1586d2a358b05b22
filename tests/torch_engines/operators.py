"""The operators of the typed graphs in torch.

Each function here takes a node's attributes and the inputs that are known before the first run, such as the shape of
a Reshape, and returns a function of the other inputs. The definitions are those of ONNX's opset 23, and of
com.microsoft's MultiHeadAttention. `Silu` and `Linear` come from `fusions.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attributes = Mapping[str, Any]
Function = Callable[..., Any]
ONNX_TYPES = {1: torch.float32, 2: torch.uint8, 7: torch.int64, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Operator:
    """How to make the function of a node.

    Attributes:
        make: takes the attributes and the known inputs.
        known: places of the inputs that must be known.
        elementwise: whether a constant with one value may stay on the host.
    """

    make: Callable[..., Function]
    known: tuple[int, ...] = ()
    elementwise: bool = False


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, known: tuple[int, ...] = ()) -> Callable[[Callable[..., Function]], Callable[..., Function]]:
    """Registers the function that follows."""

    def register(make: Callable[..., Function]) -> Callable[..., Function]:
        OPERATORS.update(dict.fromkeys(names, Operator(make, known)))
        return make

    return register


def _elementwise(name: str, function: Function) -> None:
    OPERATORS[name] = Operator(lambda attributes: function, elementwise=True)


for _name, _function in {
    "Add": torch.add,
    "Cos": torch.cos,
    "Div": lambda left, right: torch.div(left, right, rounding_mode=None if left.is_floating_point() else "trunc"),
    "Equal": torch.eq,
    "Exp": torch.exp,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Silu": F.silu,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
}.items():
    _elementwise(_name, _function)


@operator("Cast")
def _cast(attributes: Attributes) -> Function:
    dtype = ONNX_TYPES[attributes["to"]]
    return lambda values: values.to(dtype)


@operator("Gelu")
def _gelu(attributes: Attributes) -> Function:
    kind = attributes.get("approximate", "none")
    return lambda values: F.gelu(values, approximate=kind)


@operator("Softmax")
def _softmax(attributes: Attributes) -> Function:
    axis = attributes.get("axis", -1)
    return lambda values: torch.softmax(values, axis)


@operator("MatMul")
def _matmul(attributes: Attributes) -> Function:
    return torch.matmul


@operator("Linear")
def _linear(attributes: Attributes) -> Function:
    return lambda values, weight, bias: F.linear(values, weight.t(), bias)


@operator("Gemm")
def _gemm(attributes: Attributes) -> Function:
    assert (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) == (1.0, 1.0)
    assert not attributes.get("transA", 0)
    transposed = attributes.get("transB", 0)
    return lambda values, weight, bias: F.linear(values, weight if transposed else weight.t(), bias)


@operator("Conv")
def _conv(attributes: Attributes) -> Function:
    pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
    assert pads[:2] == pads[2:]
    assert attributes.get("auto_pad", "NOTSET") == "NOTSET"
    options = {
        "stride": tuple(attributes.get("strides", (1, 1))),
        "padding": pads[:2],
        "dilation": tuple(attributes.get("dilations", (1, 1))),
        "groups": attributes.get("group", 1),
    }
    return lambda values, weight, bias=None: F.conv2d(values, weight, bias, **options)


@operator("Attention")
def _attention(attributes: Attributes) -> Function:
    scale = attributes.get("scale")
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, scale=scale)


@operator("MultiHeadAttention")
def _multi_head_attention(attributes: Attributes) -> Function:
    heads, scale = attributes["num_heads"], attributes.get("scale")

    def run(*projections: Tensor) -> Tensor:
        query, key, value = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in projections)
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)

    return run


@operator("LayerNormalization")
def _layer_norm(attributes: Attributes) -> Function:
    assert attributes.get("axis", -1) == -1
    epsilon = attributes["epsilon"]
    return lambda values, weight, bias: F.layer_norm(values, weight.shape, weight, bias, epsilon)


@operator("GroupNormalization")
def _group_norm(attributes: Attributes) -> Function:
    groups, epsilon = attributes["num_groups"], attributes["epsilon"]
    return lambda values, weight, bias: F.group_norm(values, groups, weight, bias, epsilon)


@operator("InstanceNormalization")
def _instance_norm(attributes: Attributes) -> Function:
    epsilon = attributes["epsilon"]
    return lambda values, weight, bias: F.instance_norm(values, weight=weight, bias=bias, eps=epsilon)


@operator("ReduceMean", known=(1,))
def _reduce_mean(attributes: Attributes, axes: Tensor) -> Function:
    dims, keep = axes.tolist(), bool(attributes.get("keepdims", 1))
    return lambda values: values.mean(dims, keepdim=keep)


@operator("Shape")
def _shape(attributes: Attributes) -> Function:
    part = slice(attributes.get("start", 0), attributes.get("end"))
    return lambda values: torch.tensor(values.shape[part], dtype=torch.int64)


@operator("Reshape", known=(1,))
def _reshape(attributes: Attributes, shape: Tensor) -> Function:
    sizes, literal = shape.tolist(), attributes.get("allowzero", 0)

    def run(values: Tensor) -> Tensor:
        given = values.shape
        return values.reshape([given[at] if not (size or literal) else size for at, size in enumerate(sizes)])

    return run


@operator("Expand", known=(1,))
def _expand(attributes: Attributes, shape: Tensor) -> Function:
    sizes = shape.tolist()
    return lambda values: values.expand(torch.broadcast_shapes(values.shape, sizes))


@operator("Transpose")
def _transpose(attributes: Attributes) -> Function:
    order = attributes["perm"]
    return lambda values: values.permute(*order)


@operator("Squeeze", known=(1,))
def _squeeze(attributes: Attributes, axes: Tensor | None = None) -> Function:
    dims = None if axes is None else tuple(axes.tolist())
    return lambda values: values.squeeze() if dims is None else values.squeeze(dims)


@operator("Unsqueeze", known=(1,))
def _unsqueeze(attributes: Attributes, axes: Tensor) -> Function:
    dims = axes.tolist()

    def run(values: Tensor) -> Tensor:
        rank = values.ndim + len(dims)
        for dim in sorted(dim % rank for dim in dims):
            values = values.unsqueeze(dim)
        return values

    return run


@operator("Concat")
def _concat(attributes: Attributes) -> Function:
    axis = attributes["axis"]
    return lambda *parts: torch.cat(parts, axis)


@operator("Split")
def _split(attributes: Attributes) -> Function:
    axis, count = attributes.get("axis", 0), attributes["num_outputs"]
    return lambda values: values.split(math.ceil(values.shape[axis] / count), axis)


@operator("Slice", known=(1, 2, 3, 4))
def _slice(
    attributes: Attributes, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Function:
    first, last = starts.tolist(), ends.tolist()
    dims = range(len(first)) if axes is None else axes.tolist()
    strides = [1] * len(first) if steps is None else steps.tolist()
    assert min(strides) > 0

    def run(values: Tensor) -> Tensor:
        cuts = [slice(None)] * values.ndim
        for dim, start, end, stride in zip(dims, first, last, strides, strict=True):
            cuts[dim] = slice(*slice(start, end, stride).indices(values.shape[dim]))
        return values[tuple(cuts)]

    return run


@operator("Gather")
def _gather(attributes: Attributes) -> Function:
    axis = attributes.get("axis", 0)

    def run(values: Tensor, indices: Tensor) -> Tensor:
        place = axis % values.ndim
        found = values.index_select(place, indices.reshape(-1))
        return found.reshape(*values.shape[:place], *indices.shape, *values.shape[place + 1 :])

    return run


@operator("Pad", known=(1, 2))
def _pad(attributes: Attributes, pads: Tensor, value: Tensor) -> Function:
    assert attributes.get("mode", "constant") == "constant"
    begins, ends = pads.reshape(2, -1).tolist()
    both = [side for pair in zip(reversed(begins), reversed(ends), strict=True) for side in pair]
    return lambda values: F.pad(values, both, value=value.item())


@operator("Resize", known=(1, 2))
def _resize(attributes: Attributes, roi: Tensor | None, scales: Tensor) -> Function:
    assert attributes["mode"] == "nearest"
    assert attributes["nearest_mode"] == "floor"
    assert attributes["coordinate_transformation_mode"] == "asymmetric"
    factors = scales.tolist()
    assert factors[:2] == [1, 1]
    return lambda values: F.interpolate(values, scale_factor=factors[2:], mode="nearest")


@operator("Range", known=(0, 1, 2))
def _range(attributes: Attributes, start: Tensor, limit: Tensor, step: Tensor) -> Function:
    values = torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)
    return lambda: values
