"""fp8 engines: products and convolutions of E4M3 numbers in graphs whose other values are fp16.

TensorRT multiplies fp8 where it finds QuantizeLinear and DequantizeLinear before both factors. Attention stays in
fp16: its fp8 kernels want head sizes that 16 divides, and those of Stable Diffusion 1.5 begin with 40.

Group norms take and give fp16 in graphs with fp8 layers. In fp16 a sum before a norm is part of the convolution before
it. Beside fp8 it is a kernel of its own, which would also do a cast to fp32 for the norm, and write twice the bytes.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path

import onnx_ir as ir

from ...runtime.cpu.onnxruntime import OnnxRuntimeSessions
from ...runtime.errors import BackendError, InvalidRequest
from ...runtime.example_requests import sample_size
from ...runtime.format.build_options import BuildOptions
from ...runtime.format.bundle import Bundle
from ...runtime.gpu.device import FP8_SINCE, Device, computes_in_fp8
from ..quantization.number_formats import E4M3
from ..quantization.observer import observe_samples
from ..quantization.quantize_dequantize import InputRounding, quantize
from ..rewrites.attention_steps import write_out_attention

FP8 = E4M3.name

MAX_SIDE = 64
"""Pixels of the sample requests. They run on the CPU, where a full-size UNet takes half a minute at 64x64x16."""
HEADROOM = 2.0
"""Factor on the largest observed magnitude, for larger clips and other requests. Values beyond it are cut off.

On the demo model magnitudes grow from 64x64 to 256x256 by 2.24 at most, and in 10 of 363 layers by more than 2. A
factor of 4 would cost half a decibel there: the smallest values lose digits.
"""

Ranges = dict[str, float]
"""The magnitude of each layer's input that becomes 448, by the layer's name."""


def precision_around(precision: str) -> str:
    """The precision of all values but fp8 ones in a set of engines of this precision."""
    return "fp16" if precision == FP8 else precision


def in_fp8(graph: str) -> bool:
    """Whether a graph has fp8 layers. The others are a small part of the work, or run once."""
    return graph in ("unet", "vae_decoder") or graph.startswith("controlnet_")


def check_fp8(options: BuildOptions, device: Device | None) -> None:
    """Raises an error if the options, or the GPU that the build is for, do not allow fp8.

    Raises:
        InvalidRequest: an option does not go with fp8.
        BackendError: the GPU does not compute in fp8, and no other is named.
    """
    for name in ("refit", "strip_weights"):
        if getattr(options, name):
            raise InvalidRequest(name, "not with fp8: its weights are rounded at the build", "build fp16 engines")
    if options.hardware_compatibility == "ampere-plus":
        raise InvalidRequest("hardware_compatibility", "Ampere does not compute in fp8", "leave it out")
    for capability in options.compute_capabilities:
        if not computes_in_fp8(capability):
            raise InvalidRequest(
                "compute_capabilities", f"{capability} does not compute in fp8", f"give {FP8_SINCE} or above"
            )
    if device is not None and not options.compute_capabilities and not computes_in_fp8(device.compute_capability):
        raise BackendError("precision", f"{device} does not compute in fp8", "build fp16 engines")


def calibrate(bundle: Bundle, folder: Path, graphs: Collection[str]) -> dict[str, Ranges]:
    """Measures the range of each layer's input in the sample requests, with ONNX Runtime on the portable graphs.

    Args:
        bundle: the bundle.
        folder: holds the observed graphs while the requests run.
        graphs: those to measure.
    """
    models = {graph: partial(ir.load, bundle.folder / bundle.graph(graph).path) for graph in graphs if in_fp8(graph)}
    sizes = [sample_size(bundle, MAX_SIDE)]
    found = observe_samples(bundle, folder, models, OnnxRuntimeSessions(bundle), sizes=sizes)
    return {graph: {layer: HEADROOM * seen.largest for layer, seen in of.items()} for graph, of in found.items()}


def to_fp8(model: ir.Model, ranges: Ranges) -> None:
    """Rounds the layers of a graph in fp16 with a known range to E4M3, in place.

    Its attentions are written out: TensorRT recognises them, and makes one kernel of each that also rounds its result
    to fp8. After ONNX's Attention that rounding is a kernel of its own.
    """
    if ranges:
        write_out_attention(model, ir.DataType.FLOAT16, scores=ir.DataType.FLOAT16)
    quantize(model, {layer: InputRounding(magnitude) for layer, magnitude in ranges.items()}, E4M3)
