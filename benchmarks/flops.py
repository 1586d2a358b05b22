"""Floating-point operations of a bundle's graphs, counted from their shapes alone."""

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
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, engine_layout
from sparsectrl_lcm.runtime.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a graph: floating-point operations, and elements that its products read and write."""

    flops: int
    elements: int


def request_flops(folder: Path, manifest: Manifest, size: ClipSize, steps: int) -> dict[str, int]:
    """Operations of each stage of a request, with scribbles and without guidance, in engines for this size."""
    graphs = ("text_encoder", "controlnet_scribble", "unet", "vae_decoder")
    text, control, denoise, decode = (work.flops for work in graph_work(folder, manifest, size, graphs).values())
    return {"text": text, "control": control * steps, "denoise": denoise * steps, "decode": decode}


def graph_work(folder: Path, manifest: Manifest, size: ClipSize, graphs: Iterable[str]) -> dict[str, Work]:
    """The work of each graph for one prompt; a decoder's work is for all frames."""
    found, layout = {}, engine_layout(manifest, size)
    for graph in graphs:
        runs = layout.decoder_runs(graph) if graph.startswith("vae_decoder") else 1
        one = count_work(folder / manifest.graphs[graph].path, layout.shapes(graph, manifest.graphs[graph]))
        found[graph] = Work(one.flops * runs, one.elements * runs)
    return found


def flops_per_second(flops: Mapping[str, int], seconds: Mapping[str, float]) -> dict[str, float]:
    """Operations per second of each stage, and of the whole request as `wall`.

    Args:
        flops: operations of each stage.
        seconds: seconds of the whole request as `wall`, and of the timed stages. If denoise was timed and text was
            not, the conditioning came from an earlier request, so its operations are not counted.
    """
    kept = "denoise" in seconds and "text" not in seconds
    done = {stage: count for stage, count in flops.items() if not kept or stage in ("denoise", "decode")}
    whole = {"wall": sum(done.values()) / seconds["wall"]}
    return {stage: count / seconds[stage] for stage, count in done.items() if stage in seconds} | whole


def count_flops(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Counts 2 operations per multiply-add of convolutions and matrix products, like torch's FlopCounterMode.

    Args:
        path: an ONNX graph; its weights are not read.
        shapes: shapes of its inputs, by name.
    """
    return count_work(path, shapes).flops


def count_work(path: Path, shapes: dict[str, tuple[int, ...]]) -> Work:
    """Counts operations as `count_flops` does, and the elements of operands and results of the same nodes."""
    return _Walk(onnx.load(path, load_external_data=False), shapes).work()


class _Walk:
    """Infers the type of every value, node by node, and computes the values that shapes depend on.

    ONNX's shape inference for whole graphs cannot compute these values.
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
            if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
                continue
            result, left, right = (self.shape(name) for name in (node.output[0], *node.input[:2]))
            elements += prod(result) + prod(left) + prod(right)
            if node.op_type == "ConvTranspose":  # each element of the input is multiplied by a whole kernel
                flops += 2 * prod(left) * prod(right[1:])
            else:
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
