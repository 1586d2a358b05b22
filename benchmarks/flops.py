"""Floating-point operations: of a bundle's graphs, from their shapes alone, and what a device can do of them."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs
from sparsectrl_lcm.runtime.format.engine_keys import ClipSize
from sparsectrl_lcm.runtime.format.engine_sets import decode_frames, static_shapes
from sparsectrl_lcm.runtime.format.manifest import Manifest

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Dense fp16 operations per second, from NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a graph computes: floating-point operations, and the elements that its products read and write."""

    flops: int
    elements: int


def request_flops(folder: Path, manifest: Manifest, size: ClipSize, steps: int) -> dict[str, int]:
    """Operations of each stage of a request with scribbles and without guidance, as an engine of `size` runs them."""
    graphs = ("text_encoder", "controlnet_scribble", "unet", "vae_decoder")
    text, control, denoise, decode = (work.flops for work in graph_work(folder, manifest, size, graphs).values())
    return {"text": text, "control": control * steps, "denoise": denoise * steps, "decode": decode}


def graph_work(folder: Path, manifest: Manifest, size: ClipSize, graphs: Iterable[str]) -> dict[str, Work]:
    """The work of each graph for one prompt, of a decoder for all frames."""
    found = {}
    for graph in graphs:
        runs = size.frames // decode_frames(manifest, size) if graph.startswith("vae_decoder") else 1
        one = count_work(folder / manifest.graphs[graph].path, static_shapes(manifest, graph, size))
        found[graph] = Work(one.flops * runs, one.elements * runs)
    return found


def flops_per_second(flops: Mapping[str, int], seconds: Mapping[str, float]) -> dict[str, float]:
    """Rates of the stages, and of the whole by its `wall`.

    Args:
        flops: of each stage.
        seconds: `wall`, and those stages that could be told apart. Where denoise is there and text is not, the
            conditioning was kept and is not counted.
    """
    kept = "denoise" in seconds and "text" not in seconds
    done = {stage: count for stage, count in flops.items() if not kept or stage in ("denoise", "decode")}
    whole = {"wall": sum(done.values()) / seconds["wall"]}
    return {stage: count / seconds[stage] for stage, count in done.items() if stage in seconds} | whole


def matmul_peak() -> dict[str, Any]:
    """Operations per second of a large fp16 matrix product, the best of five runs."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch has no CUDA here")
    side, count, best = 8192, 20, 0.0
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            torch.matmul(left, right)
        torch.cuda.synchronize()
        best = max(best, count * 2 * side**3 / (time.perf_counter() - begin))
    return {"flops_per_s": best, "source": f"torch.matmul, fp16, {side}x{side}"}


def data_sheet_peak(device: str) -> dict[str, Any]:
    """The peak of a device by its name; None where it is not in the table."""
    return {"flops_per_s": next((peak for part, peak in PEAKS.items() if part in device), None), "source": "data sheet"}


def count_flops(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """2 per multiply-add of convolutions and matrix products, as torch's FlopCounterMode counts them.

    Args:
        path: an ONNX graph; its weights need not be there.
        shapes: of its inputs, by name.
    """
    return count_work(path, shapes).flops


def count_work(path: Path, shapes: dict[str, tuple[int, ...]]) -> Work:
    """Operations as `count_flops`; elements are the operands and results of convolutions and matrix products."""
    return _Walk(onnx.load(path, load_external_data=False), shapes).work()


class _Walk:
    """Knows the type of every value, and the values that shapes are computed from.

    ONNX's inference for whole graphs loses its way in those computations, so the nodes are gone through one by one.
    """

    def __init__(self, model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.nodes = model.graph.node
        self.opsets = model.opset_import
        self.versions = {item.domain: item.version for item in model.opset_import}
        self.types = {
            item.name: helper.make_tensor_type_proto(item.type.tensor_type.elem_type, shapes[item.name])
            for item in model.graph.input
        }
        self.values: dict[str, Any] = {}
        for weight in model.graph.initializer:
            self.types[weight.name] = helper.make_tensor_type_proto(weight.data_type, weight.dims)
            if weight.data_location != onnx.TensorProto.EXTERNAL:
                self.values[weight.name] = numpy_helper.to_array(weight)

    def work(self) -> Work:
        flops = elements = 0
        for node in self.nodes:
            self.visit(node)
            if node.op_type not in ("Conv", "MatMul", "Gemm"):
                continue
            result, left, right = (self.shape(name) for name in (node.output[0], *node.input[:2]))
            elements += prod(result) + prod(left) + prod(right)
            flops += 2 * prod(result) * (prod(right[1:]) if node.op_type == "Conv" else left[-1])
        return Work(flops, elements)

    def shape(self, name: str) -> tuple[int, ...]:
        dimensions = self.types[name].tensor_type.shape.dim
        assert all(dimension.HasField("dim_value") for dimension in dimensions), f"the shape of {name} is not known"
        return tuple(dimension.dim_value for dimension in dimensions)

    def visit(self, node: Any) -> None:
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape":
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            shape = self.shape(node.input[0])[ends.get("start") : ends.get("end")]
            self.set(node.output[0], np.array(shape, np.int64))
        elif all(name in self.values for name in inputs):
            results = ReferenceEvaluator(node).run(None, {name: self.values[name] for name in inputs})
            for name, value in zip(node.output, results, strict=True):
                self.set(name, value)
        else:
            schema = onnx.defs.get_schema(node.op_type, self.versions[node.domain], node.domain)
            known = {name: numpy_helper.from_array(self.values[name]) for name in inputs if name in self.values}
            types = {name: self.types[name] for name in inputs}
            self.types |= infer_node_outputs(schema, node, types, known, opset_imports=self.opsets)

    def set(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
