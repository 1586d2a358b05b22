"""What a TensorRT engine is made of: the part of its record that `inspect` and the benchmarks show."""

from typing import Any, Literal, Self

from pydantic import ValidationError

from .manifest import Record


class AttentionCounts(Record):
    """Attentions of one kind of transformer."""

    fused: int
    """Attentions in one kernel, which never writes the score matrix."""
    split: int
    """Attentions in several kernels."""


class KernelGroup(Record):
    """Kernels of an engine that do the same amount of the same work."""

    operation: Literal["product", "convolution", "attention", "other"]
    precision: str
    """Type of the operands, such as fp16 or fp8; that of the largest input for other operations."""
    count: int
    """Number of these kernels."""
    flops: int = 0
    """Operations of one kernel: 2 for each product that a sum adds; 0 for other operations."""
    head: int = 0
    """Size of an attention's heads."""
    bytes: int
    """Bytes of activations and weights that one kernel reads and writes, each tensor once."""


class LayerReport(Record):
    """The kernels of an engine in short."""

    layers: dict[str, int]
    """Number of kernels of each kind, most frequent first."""
    attention: dict[str, AttentionCounts]
    """For `spatial` and `temporal` transformers."""
    split_attention: tuple[str, ...] = ()
    """Modules whose attention takes several kernels."""
    norms: int = 0
    """Number of normalisations."""
    fp32_norms: tuple[str, ...] = ()
    """Normalisations of which a kernel writes a tensor as large as its input in fp32."""
    bytes_moved: int | None = None
    """Bytes of activations that the kernels read and write in one run; None if TensorRT did not give the tensors."""
    fp16_sums: tuple[str, ...] = ()
    """Names of kernels that add their products in fp16, as far as the names of their implementations tell."""
    work: tuple[KernelGroup, ...] = ()
    """What the kernels compute and move, for `benchmarks/roofline.py`."""

    @classmethod
    def of(cls, report: dict[str, Any]) -> Self | None:
        """The layer report in the report of an engine's record; None if there is none."""
        try:
            return cls.model_validate({name: report[name] for name in cls.model_fields if name in report})
        except ValidationError:
            return None

    def share(self, precision: str, attention: bool = False) -> float:
        """The part of the operations of products and convolutions that have operands of a precision, 0 to 1.

        Args:
            precision: such as fp8.
            attention: count the products within fused attentions, too.
        """
        kinds = ("product", "convolution", *(("attention",) if attention else ()))
        groups = [group for group in self.work if group.operation in kinds]
        matching = sum(group.flops * group.count for group in groups if group.precision == precision)
        return matching / max(1, sum(group.flops * group.count for group in groups))

    @property
    def kernels(self) -> int:
        """Number of kernels."""
        return sum(self.layers.values())
