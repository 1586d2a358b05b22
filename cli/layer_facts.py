"""Describes the layer report of an engine, for `build` and `inspect`."""

from collections.abc import Iterator
from typing import Any


def layer_facts(report: dict[str, Any]) -> list[str]:
    """Returns the facts of an engine's report in words; none if the report has no layers."""
    from ..runtime.format.layer_report import LayerReport

    layers = LayerReport.of(report)
    if layers is None:
        return []
    facts = [f"{layers.kernels} kernels"]
    fused = sum(counts.fused for counts in layers.attention.values())
    split = sum(counts.split for counts in layers.attention.values())
    if fused + split:
        facts.append(f"{fused} of {fused + split} attentions fused")
    if layers.norms:
        facts.append(f"{len(layers.fp32_norms)} of {layers.norms} norms write fp32")
    if layers.fp16_sums:
        facts.append(f"{len(layers.fp16_sums)} with fp16 sums")
    if layers.bytes_moved is not None:
        facts.append(f"{size_of(layers.bytes_moved)} moved")
    return facts


def size_of(count: int) -> str:
    """Returns a number of bytes in GB, or MB if it is less than one, with three digits."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def layer_details(report: dict[str, Any]) -> Iterator[str]:
    """Yields the kinds of kernels, each split attention and each norm that writes fp32."""
    from ..runtime.format.layer_report import LayerReport

    layers = LayerReport.of(report)
    if layers is not None:
        yield "kernels: " + ", ".join(f"{count} {kind}" for kind, count in layers.layers.items())
        yield from (f"attention in several kernels: {module}" for module in layers.split_attention)
        yield from (f"norm that writes fp32: {norm}" for norm in layers.fp32_norms)
        yield from (f"kernel that adds fp16 products in fp16: {kernel}" for kernel in layers.fp16_sums)
