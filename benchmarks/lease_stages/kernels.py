"""The kernels that decide the design of the engines: each in the variants that an engine could have."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .processes import Settings, Write

SAMPLES, LEAST_SECONDS, MOST_RUNS = 15, 0.02, 100
ATTENTIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in one variant.

    Attributes:
        name: what it computes.
        variant: how.
        shape: of its input.
        flops: operations.
        make: allocates the inputs and returns the function to time.
    """

    name: str
    variant: str
    shape: tuple[int, ...]
    flops: float
    make: Callable[[], Run]


class Kernels:
    """Makes the kernels of the full-size model at 512x512 and 16 frames; in a dry run of a tiny one.

    The most useful come first. Compiled ones come last: torch.compile takes the longest and may fail.
    """

    def __init__(self, dry_run: bool) -> None:
        self.device = "cpu" if dry_run else "cuda"
        self.dtype = torch.float32 if dry_run else torch.float16
        self.scale = 16 if dry_run else 1

    def __iter__(self) -> Iterator[Kernel]:
        scale = self.scale
        for channels, side in ((512, 128), (256, 256), (128, 512)):
            yield from self.convolutions(8 // min(scale, 8), channels // scale, side // scale)
        for channels, side in ((512, 64), (512, 128), (256, 256)):
            yield from self.upsamplings(8 // min(scale, 8), channels // scale, side // scale)
        for rows, inner, columns in ((65536, 320, 2560), (16384, 640, 5120), (8192, 8192, 8192)):
            yield from self.products(rows // scale, inner // scale, columns // scale)
        norms = [
            (max(1, batch // scale), max(32, channels // scale // 32 * 32), side // scale)
            for batch, channels, side in ((16, 320, 64), (16, 640, 32), (8, 128, 512))
        ]
        for shape in norms:
            yield from self.norms(*shape)
        for tokens, width in ((4096, 40), (1024, 80), (256, 160)):
            yield from self.attentions("spatial attention", 16 // scale, tokens // scale, width)
            yield from self.attentions("temporal attention", tokens // scale, 16, width)
        if self.device == "cuda":
            for shape in norms:
                yield self.compiled_norm(*shape)

    def tensor(self, *shape: int, last: bool = False) -> torch.Tensor:
        values = torch.randn(shape, device=self.device, dtype=self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if last else values

    def convolutions(self, batch: int, channels: int, side: int) -> Iterator[Kernel]:
        """A 3x3 convolution of the decoder."""
        shape = (batch, channels, side, side)
        flops = 2.0 * 9 * channels**2 * batch * side**2
        for last in (True, False):

            def make(last: bool = last) -> Run:
                values, weight = self.tensor(*shape, last=last), self.tensor(channels, channels, 3, 3, last=last)
                return lambda: F.conv2d(values, weight, padding=1)

            yield Kernel("convolution 3x3", layout(last), shape, flops, make)

    def upsamplings(self, batch: int, channels: int, side: int) -> Iterator[Kernel]:
        """Upsampling and a 3x3 convolution, and the transposed 4x4 convolution that computes the same."""
        shape = (batch, channels, side, side)
        pixels = batch * (2 * side) ** 2
        for last in (True, False):

            def upsample(last: bool = last) -> Run:
                values, weight = self.tensor(*shape, last=last), self.tensor(channels, channels, 3, 3, last=last)
                return lambda: F.conv2d(F.interpolate(values, scale_factor=2.0, mode="nearest"), weight, padding=1)

            def transposed(last: bool = last) -> Run:
                values, weight = self.tensor(*shape, last=last), self.tensor(channels, channels, 4, 4, last=last)
                return lambda: F.conv_transpose2d(values, weight, stride=2, padding=1)

            for name, taps, make in (("upsampling, convolution", 9, upsample), ("transposed", 4, transposed)):
                flops = 2.0 * taps * channels**2 * pixels
                yield Kernel("upsampling by 2", f"{name}, {layout(last)}", shape, flops, make)

    def norms(self, batch: int, channels: int, side: int) -> Iterator[Kernel]:
        """GroupNorm and SiLU, in one type and with fp32 in between."""
        shape = (batch, channels, side, side)
        variants: list[tuple[str, bool, torch.dtype]] = [
            (f"{layout(last)}{suffix}", last, dtype)
            for last in (True, False)
            for suffix, dtype in (("", self.dtype), (", fp32 inside", torch.float32))
        ]
        for variant, last, dtype in variants:

            def make(last: bool = last, dtype: torch.dtype = dtype) -> Run:
                values, (weight, bias) = self.tensor(*shape, last=last), self.tensor(2, channels).to(dtype)
                return lambda: norm_and_silu(values, weight, bias)

            yield Kernel("GroupNorm, SiLU", variant, shape, 0.0, make)

    def compiled_norm(self, batch: int, channels: int, side: int) -> Kernel:
        """GroupNorm and SiLU in one kernel of torch.compile."""
        shape = (batch, channels, side, side)

        def compiled() -> Run:
            values, (weight, bias) = self.tensor(*shape, last=True), self.tensor(2, channels)
            function = torch.compile(norm_and_silu, dynamic=False)
            return lambda: function(values, weight, bias)

        return Kernel("GroupNorm, SiLU", "channels last, torch.compile", shape, 0.0, compiled)

    def attentions(self, name: str, batch: int, tokens: int, width: int) -> Iterator[Kernel]:
        """Self-attention with 8 heads; head sizes such as 40 also padded to the next multiple of 64."""
        shape = (batch, 8, tokens, width)
        flops = 4.0 * batch * 8 * tokens**2 * width
        for variant, backend in ATTENTIONS.items():
            if variant == "math" and tokens > 1024:
                continue  # gigabytes of scores

            def make(backend: SDPBackend = backend) -> Run:
                query, key, value = (self.tensor(*shape) for _ in range(3))

                def run() -> Any:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(query, key, value)

                return run

            yield Kernel(name, variant, shape, flops, make)

        def padded() -> Run:
            query, key, value = (F.pad(self.tensor(*shape), (0, -width % 64)) for _ in range(3))
            return lambda: F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)

        yield Kernel(name, f"padded to {width + -width % 64}", shape, flops, padded)

    def products(self, rows: int, inner: int, columns: int) -> Iterator[Kernel]:
        """A matrix product in fp16 and in fp8 with a scale for each tensor."""
        shape = (rows, inner, columns)
        flops = 2.0 * rows * inner * columns

        def half() -> Run:
            left, right = self.tensor(rows, inner), self.tensor(columns, inner)
            return lambda: left @ right.t()

        def eight() -> Run:
            left, right = (self.tensor(*size).to(torch.float8_e4m3fn) for size in ((rows, inner), (columns, inner)))
            one = torch.ones((), device=self.device)
            return lambda: torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.float16)

        yield Kernel("matrix product", "fp16" if self.device == "cuda" else "fp32", shape, flops, half)
        if self.device == "cuda":
            yield Kernel("matrix product", "fp8", shape, flops, eight)


def measure(settings: Settings, write: Write) -> None:
    """Writes a row for each kernel and variant. One that cannot run here gets the reason."""
    torch.manual_seed(0)
    for kernel in Kernels(settings.dry_run):
        row = {"kernel": kernel.name, "variant": kernel.variant, "shape": kernel.shape}
        try:
            with torch.inference_mode():
                seconds = median_seconds(kernel.make(), settings.dry_run)
        except (RuntimeError, AttributeError, TypeError) as error:
            write(row | {"reason": (str(error).strip() or type(error).__name__).splitlines()[0]})
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
            continue
        write(row | {"kernel_s": seconds} | ({"flops_per_s": kernel.flops / seconds} if kernel.flops else {}))


def norm_and_silu(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Normalizes in the type of the weight."""
    return F.silu(F.group_norm(values.to(weight.dtype), 32, weight, bias).to(values.dtype))


def layout(last: bool) -> str:
    """The name of a layout."""
    return "channels last" if last else "channels first"


def median_seconds(run: Run, dry_run: bool) -> float:
    """The median time of a run. On a device a CUDA graph replays as many runs as take `LEAST_SECONDS`.

    Launches from Python would take longer than many kernels.
    """

    def seconds(function: Run) -> float:
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        return time.perf_counter() - begin

    synchronize: Run = (lambda: None) if dry_run else torch.cuda.synchronize
    run()
    if dry_run:
        return seconds(run)
    count = max(1, min(MOST_RUNS, round(LEAST_SECONDS / min(seconds(run) for _ in range(3)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    return sorted(seconds(graph.replay) / count for _ in range(SAMPLES))[SAMPLES // 2]
