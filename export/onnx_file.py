"""Trace a module to ONNX, and write the graph with its weights under their checkpoint names."""

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn

from .graph_specs import GraphSpec
from .torch_exporter import to_onnx
from .upsampling import merge_cuts

IR_VERSION = 10
PREFIX = "model."
"""Prefix of the weights' names: the modules of `traced_modules.py` keep the checkpoint's model as `self.model`."""
TRANSPOSED = "transposed"
"""Metadata key of an initializer that holds the transposed matrix of the checkpoint."""
_ALIGNMENT = 64


def trace(module: nn.Module, spec: GraphSpec, inputs: tuple[torch.Tensor, ...]) -> ir.Model:
    """Traces `module` with torch's dynamo exporter; all named dimensions of `spec` stay symbolic."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes: list[Any] = [
        {axis: dynamic for axis, size in enumerate(item.shape) if isinstance(size, str)} or None for item in spec.inputs
    ]
    if spec.variadic is not None:
        shapes = [*shapes[: spec.variadic], tuple(shapes[spec.variadic :])]
    with torch.no_grad():
        model = to_onnx(
            module,
            inputs,
            dynamic_shapes=tuple(shapes),
            input_names=[item.name for item in spec.inputs],
            output_names=[name for name, _ in spec.outputs],
        )
    _restore_weight_names(model.graph)
    _fold_weight_transposes(model.graph)
    _simplify(model)
    _name_nodes(model.graph)
    _clean(model, spec)
    return model


def write(model: ir.Model, path: Path, weights: Callable[[str], str]) -> list[Path]:
    """Writes the graph to `path` and its weights to external-data files beside it.

    Args:
        model: the graph.
        path: file of the graph.
        weights: returns the name of the external-data file for the name of a weight.

    Returns:
        The external-data files, in the order of their first weight.
    """
    files: dict[str, list[ir.Value]] = {}
    for name, value in model.graph.initializers.items():
        if "." in name:
            files.setdefault(weights(name), []).append(value)
    for file_name, values in files.items():
        layout = write_tensors(path.parent / file_name, [_tensor(value) for value in values])
        for value, (offset, length) in zip(values, layout, strict=True):
            tensor = _tensor(value)
            value.const_value = ir.ExternalTensor(
                file_name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=tensor.name,
                base_dir=path.parent,
                metadata_props=tensor.metadata_props,
            )
    ir.save(model, path)
    return [path.parent / name for name in files]


def write_tensors(path: Path, tensors: list[ir.TensorProtocol]) -> list[tuple[int, int]]:
    """Writes raw tensors in sequence, each aligned to 64 bytes; returns the offset and length of each in bytes."""
    layout = []
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            file.write(tensor.numpy().tobytes())
            layout.append((offset, file.tell() - offset))
        file.flush()
        os.fsync(file.fileno())
    return layout


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    assert value.name is not None
    del graph.initializers[value.name]
    value.name = name
    _tensor(value).name = name
    graph.initializers[name] = value


def _restore_weight_names(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if name.startswith(PREFIX):
            _rename(graph, value, name.removeprefix(PREFIX))


def _fold_weight_transposes(graph: ir.Graph) -> None:
    """Replaces Transpose(weight) by the transposed weight, which keeps its name and is computed only when written."""
    for weight in list(graph.initializers.values()):
        nodes = [use.node for use in weight.uses()]
        permutations = {tuple(node.attributes["perm"].as_ints()) for node in nodes if node.op_type == "Transpose"}
        if len(permutations) != 1 or any(node.op_type != "Transpose" for node in nodes):
            continue
        source, (permutation,) = _tensor(weight), permutations
        weight.shape = ir.Shape([source.shape[axis] for axis in permutation])
        weight.const_value = ir.LazyTensor(
            lambda source=source, permutation=permutation: ir.Tensor(source.numpy().transpose(permutation)),
            dtype=source.dtype,
            shape=weight.shape,
            name=weight.name,
            metadata_props={TRANSPOSED: "1"},
        )
        for node in nodes:
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)


def _simplify(model: ir.Model) -> None:
    def should_fold(node: ir.Node) -> bool | None:
        weights = any(value is not None and value.name in model.graph.initializers for value in node.inputs)
        return False if weights and node.op_type != "Constant" else None

    common.InlinePass()(model)
    _drop_zero_biases(model.graph)
    merge_cuts(model.graph)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.OutputFixPass()(model)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """Removes the zero bias that the tracer adds to convolutions without one: engine builders want a constant bias."""
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        maker = bias.producer() if bias is not None else None
        if maker is not None and maker.op_type == "Expand":
            node.resize_inputs(2)


def _merge_constants(graph: ir.Graph) -> None:
    """Merges equal constants. Weights are never merged, so that each can be replaced by its name."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if "." in name or value.is_graph_output():
            continue
        tensor = _tensor(value)
        same = kept.setdefault((tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[name]


def _name_nodes(graph: ir.Graph) -> None:
    """Names each node after its module, so that its layer can be found in an engine."""
    for index, node in enumerate(graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        module = scopes[-2].removeprefix(PREFIX) if len(scopes) > 1 else ""
        node.name = f"{module}/{node.op_type}_{index}".lstrip("/")


def _clean(model: ir.Model, spec: GraphSpec) -> None:
    """Removes the tracer's metadata and inferred shapes, and gives inputs and outputs the shapes of `spec`."""
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
            if not value.is_graph_output():
                value.type = None
    signature = [(item.name, item.shape) for item in spec.inputs] + list(spec.outputs)
    for value, (name, shape) in zip((*model.graph.inputs, *model.graph.outputs), signature, strict=True):
        assert value.name == name, f"found {value.name} in the place of {name}"
        value.shape = ir.Shape(shape)
    model.ir_version = IR_VERSION
    model.producer_name = "sparsectrl-lcm"
    model.producer_version = None
    model.graph.name = spec.name
