"""The limits of a machine: the speed of large matrix products and of copies in memory."""

import time
from collections.abc import Callable
from typing import Any

PRODUCT_SIDE = 4096
COPIED_BYTES = 2**28
CUDA_PRODUCT_SIDE = 8192
CUDA_PRODUCTS = 20
"""Products in one sample; a single one is too short to time."""
DATA_SHEET_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Dense fp16 operations per second, from NVIDIA's data sheets."""


def product_rate() -> float:
    """Floating-point operations per second of the CPU, in a product of two large bf16 matrices."""
    import torch

    left, right = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).bfloat16() for _ in range(2))
    return 2 * PRODUCT_SIDE**3 / best_seconds(lambda: torch.matmul(left, right))


def copy_rate() -> float:
    """Bytes per second that a copy of memory reads and writes."""
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source))


def cuda_product_rate() -> dict[str, Any]:
    """Floating-point operations per second of the GPU, in products of two large fp16 matrices.

    Raises:
        RuntimeError: torch has no CUDA here.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch has no CUDA here")
    side = CUDA_PRODUCT_SIDE
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.float16) for _ in range(2))

    def products() -> None:
        for _ in range(CUDA_PRODUCTS):
            torch.matmul(left, right)
        torch.cuda.synchronize()

    rate = CUDA_PRODUCTS * 2 * side**3 / best_seconds(products)
    return {"flops_per_s": rate, "source": f"torch.matmul, fp16, {side}x{side}"}


def data_sheet_peak(device: str) -> dict[str, Any]:
    """The peak of a device by its name; None as the rate if it is not in `DATA_SHEET_PEAKS`."""
    peak = next((peak for part, peak in DATA_SHEET_PEAKS.items() if part in device), None)
    return {"flops_per_s": peak, "source": "data sheet"}


def best_seconds(function: Callable[[], object]) -> float:
    """The seconds of the shortest of five runs, after one untimed run."""
    function()
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        function()
        samples.append(time.perf_counter() - begin)
    return min(samples)
