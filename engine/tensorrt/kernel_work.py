"""What a kernel computes and moves: operations from the dimensions that TensorRT gives, bytes with weights."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from ...runtime.format.layer_report import KernelGroup
from .kernels import Kernel, Tensor

Operation = Literal["product", "convolution", "attention", "other"]

_ATTENTION = re.compile(r"^\S* \S*(_mha|flash)")
_CONVOLUTION = re.compile(r"^\S*(correlation|conv(?!ersion))| __myl_\w*(Corr|Deco)")
_TRANSPOSED = re.compile(r"^\S*deconv| __myl_\w*Deco")
_PRODUCT = re.compile(r"^\S*(gemm|matrix_?multiply)| __myl_\w*Fc")
"""They match the kind of a kernel in small letters, a space, and its name."""
_PRECISIONS = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"half|fp16"),
    ("fp32", r"\bfloat\b|fp32"),
    ("fp8", r"fp8"),
    ("int8", r"int8"),
)


def work_of(kernels: Iterable[Kernel]) -> tuple[KernelGroup, ...]:
    """The work of an engine's kernels; equal kernels are one group, the groups with the most operations first."""
    groups = Counter(map(_work, kernels))
    found = [group.model_copy(update={"count": count}) for group, count in groups.items()]
    return tuple(sorted(found, key=lambda group: (-group.flops * group.count, -group.bytes * group.count)))


def operation_of(kernel: Kernel) -> Operation:
    """The main operation of a kernel, by TensorRT's names for it."""
    names = f"{kernel.kind.lower()} {kernel.name}"
    if _ATTENTION.search(names):
        return "attention"
    if _CONVOLUTION.search(names):
        return "convolution"
    return "product" if _PRODUCT.search(names) else "other"


def _work(kernel: Kernel) -> KernelGroup:
    """The work of one kernel, as a group of one."""
    operation = operation_of(kernel)
    count = _COUNTS.get(operation)
    head = kernel.outputs[0].shape[-1] if operation == "attention" and kernel.outputs else 0
    weights = sum(tensor.bytes for tensor in set(kernel.constants))
    return KernelGroup(
        operation=operation,
        precision=_precision(kernel, operation),
        count=1,
        flops=count(kernel) if count else 0,
        head=head,
        bytes=kernel.bytes_moved + weights,
    )


def _attention(kernel: Kernel) -> int:
    """Two products: [queries, head] x [head, keys], and [queries, keys] x [keys, head]."""
    if not kernel.outputs or len(kernel.inputs) < 2:
        return 0
    *batch, _, head = kernel.outputs[0].shape
    keys = kernel.inputs[1].elements // max(1, math.prod(batch) * head)
    return 4 * kernel.outputs[0].elements * keys


def _convolution(kernel: Kernel) -> int:
    """2 operations per weight and result; a transposed convolution (`deconv`) has as many per input."""
    weight, result = _largest(kernel.constants), _largest(kernel.outputs)
    if weight is None or result is None or not kernel.inputs or not weight.shape:
        return 0
    if _TRANSPOSED.search(f"{kernel.kind.lower()} {kernel.name}"):
        return 2 * kernel.inputs[0].elements * weight.elements // weight.shape[0]
    return 2 * result.elements * weight.elements // weight.shape[0]


def _product(kernel: Kernel) -> int:
    """[rows, length] x [length, columns]: the square of all three sides is the product of three numbers of elements."""
    weight, result = _largest(kernel.constants), _largest(kernel.outputs)
    if result is None or not kernel.inputs:
        return 0
    if weight is None or weight.elements <= max(result.shape):  # scales alone: a product of two activations
        if len(kernel.inputs) < 2:
            return 0
        left, right = kernel.inputs[:2]
        batch = math.prod(result.shape[:-2])
        return 2 * math.isqrt(left.elements * right.elements * result.elements // batch)
    return max(2 * math.isqrt(size * weight.elements * result.elements) for size in _operands(kernel, weight, result))


_COUNTS: dict[Operation, Callable[[Kernel], int]] = {
    "attention": _attention,
    "convolution": _convolution,
    "product": _product,
}


def _operands(kernel: Kernel, weight: Tensor, result: Tensor) -> Iterator[int]:
    """The elements of the inputs that fit to weight and result as the left operand of a product; 0 if none does."""
    yield 0
    for tensor in kernel.inputs:
        sides = (tensor.elements * weight.elements, result.elements)
        length = math.isqrt(sides[0] // sides[1])
        if length * length * sides[1] == sides[0] and length in weight.shape:
            yield tensor.elements


def _precision(kernel: Kernel, operation: Operation) -> str:
    """The type of the operands: the wider one of input and weight."""
    weight = _largest(kernel.constants) if operation in ("product", "convolution") else None
    operands = [_largest(kernel.inputs), weight if weight is not None and weight.elements > 1 else None]
    names = [name for tensor in operands if tensor is not None and (name := _type(tensor))]
    order = ("fp32", "bf16", "fp16", "int8", "fp8")
    return min(names, key=order.index, default="unknown")


def _type(tensor: Tensor) -> str:
    words = tensor.format.lower()
    return next((name for name, pattern in _PRECISIONS if re.search(pattern, words)), "")


def _largest(tensors: Iterable[Tensor]) -> Tensor | None:
    return max(tensors, key=lambda tensor: tensor.elements, default=None)
