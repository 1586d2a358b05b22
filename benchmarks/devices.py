"""What GPUs can do: the rates that roofline.py divides by, each with its source."""

from dataclasses import dataclass

ADA = "NVIDIA Ada GPU Architecture, appendix A, and the data sheet of the L40S"
HOPPER = "data sheets of H100 SXM and H200 SXM, without sparsity"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, appendix A"


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of a GPU: operations per second without sparsity, bytes per second.

    Attributes:
        name: its name in results.
        fp16: products of fp16 or bf16 that are added in fp32.
        fp16_sums: products of fp16 that are added in fp16.
        fp8: products of fp8 that are added in fp32.
        fp32: products of fp32 without tensor cores.
        bandwidth: of its memory.
        source: of the rates.
        product_share: part of the rates that products and convolutions reach.
        attention_share: part of the rate of fp16 that a fused attention reaches, its heads padded.
        bandwidth_share: part of the bandwidth that kernels reach.
        launch: seconds from the end of a kernel to the start of the next within a CUDA graph.
    """

    name: str
    fp16: float
    fp16_sums: float
    fp8: float
    fp32: float
    bandwidth: float
    source: str
    product_share: float = 0.627
    attention_share: float = 0.354
    bandwidth_share: float = 0.8125
    launch: float = 2e-6

    def product_rate(self, precision: str, fp16_sums: bool = False) -> float:
        """Operations per second of products and convolutions.

        Args:
            precision: type of the operands.
            fp16_sums: whether products of fp16 are added in fp16.
        """
        rates = {"fp8": self.fp8, "fp32": self.fp32}
        if precision == "fp16" and fp16_sums:
            return self.fp16_sums * self.product_share
        return rates.get(precision, self.fp16) * self.product_share

    def attention_rate(self, fp16_sums: bool = False) -> float:
        """Operations per second of a fused attention in fp16, those on padding counted."""
        return (self.fp16_sums if fp16_sums else self.fp16) * self.attention_share

    def byte_rate(self) -> float:
        """Bytes per second that kernels read and write."""
        return self.bandwidth * self.bandwidth_share


DEVICES = {
    device.name: device
    for device in (
        Device("H200", 989e12, 989e12, 1979e12, 67e12, 4.8e12, HOPPER),
        Device("H100", 989e12, 989e12, 1979e12, 67e12, 3.35e12, HOPPER),
        Device("L40S", 362e12, 362e12, 733e12, 91.6e12, 0.864e12, ADA),
        Device("RTX 4090", 165.2e12, 330.3e12, 330.3e12, 82.6e12, 1.008e12, ADA),
        Device("RTX 5090", 209.5e12, 419e12, 419e12, 104.8e12, 1.792e12, BLACKWELL),
    )
}
"""The shares are those of an H200. Large fp16 products were measured to reach 790 of its 989 TFLOP/s; the products of
these graphs are assumed to reach 620, attention 350, and all kernels 3.9 of 4.8 TB/s. Other GPUs are assumed to reach
the same shares."""
