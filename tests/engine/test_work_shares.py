"""Shares of an engine's operations by precision."""

from sparsectrl_lcm.runtime.format.layer_report import KernelGroup, LayerReport

WORK = (
    KernelGroup(operation="product", precision="fp8", count=3, flops=10, bytes=1),
    KernelGroup(operation="convolution", precision="fp16", count=1, flops=10, bytes=1),
    KernelGroup(operation="attention", precision="fp16", count=2, flops=30, head=40, bytes=1),
    KernelGroup(operation="other", precision="fp8", count=5, bytes=1),
)


def test_the_share_of_a_precision_counts_products_and_convolutions() -> None:
    report = LayerReport(layers={}, attention={}, work=WORK)
    assert report.share("fp8") == 30 / 40
    assert report.share("fp16") == 10 / 40
    assert report.share("fp8", attention=True) == 30 / 100
    assert LayerReport(layers={}, attention={}).share("fp8") == 0
    assert WORK[-1].flops == 0, "other operations have none"
