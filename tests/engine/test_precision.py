"""Typed graphs: which operators are fp16, which stay in fp32, and how far results differ from fp32."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import Exported
from sparsectrl_lcm.engine import check
from sparsectrl_lcm.engine.rewrites import precision
from sparsectrl_lcm.engine.rewrites import typed_graph as typed
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.weights import convert
from standard_operators import fuse_in_standard_operators, fuse_transformer_attention, run

GRAPHS = (
    *("text_encoder", "vae_encoder", "controlnet_scribble", "controlnet_rgb"),
    *("unet", "lcm_update", "vae_decoder"),
)


def write(bundle: Bundle, graph: str, kind: str, folder: Path) -> Path:
    path = folder / f"{graph}.onnx"
    typed.write_typed(typed.typed_graph(bundle, graph, kind), path)
    return path


@pytest.mark.parametrize("graph", [*GRAPHS, "vae_decoder_tiny"])
def test_errors_are_within_the_bound(exported: Exported, graph: str, tmp_path: Path) -> None:
    """Outputs are close to fp32, frames within 3 levels in the mean, and 30 times the input does not overflow.

    The largest error depends on the random inputs: in the deeper architecture it is up to 1.2e-2 over five draws.
    """
    limit = {"sd15_like": 1e-2, "other": 2e-2}[exported.name]
    bundle = Bundle.load(exported.bundle)
    path = write(bundle, graph, "fp16", tmp_path)
    before = set(tmp_path.iterdir())
    errors = check.check_precision(bundle, graph, "fp16", path)
    assert set(errors) == {item.name for item in bundle.graph(graph).outputs}
    assert max(errors.values()) <= (3 if graph.startswith("vae_decoder") else limit)
    if graph != "lcm_update":
        assert min(errors.values()) > 0, "rounding shows: the check compares two different graphs"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("graph", GRAPHS)
def test_typed_graphs_are_valid_and_run(graph: str, tmp_path: Path) -> None:
    bundle = Bundle.load()
    feeds = check.random_inputs(bundle, graph)
    expected = run(bundle.folder / bundle.graph(graph).path, feeds)
    path = tmp_path / f"{graph}.onnx"
    typed.write_typed(typed.typed_graph(bundle, graph, "fp16", fuse_in_standard_operators), path)
    onnx.checker.check_model(path, full_check=True)
    types = {item.name: item.type for item in onnxruntime.InferenceSession(path).get_inputs()}
    low = [name for name, kind in types.items() if kind == "tensor(float16)"]
    assert set(low) == {name for name in feeds if name == "prompt_embeds" or "residual" in name}
    feeds |= {name: feeds[name].astype(np.float16) for name in low}
    for actual, reference in zip(run(path, feeds), expected, strict=True):
        scale = np.abs(reference.astype(np.float32)).max()
        assert np.abs(actual.astype(np.float32) - reference).max() <= 2e-2 * scale


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_norms_softmax_and_the_update_stay_in_fp32(kind: str) -> None:
    """Group norms without a SiLU are in the low precision, and the UNet's first, which takes what `conv_in` gives."""
    bundle = Bundle.load()
    for graph in GRAPHS:
        model = typed.typed_graph(bundle, graph, kind)
        for node in model.graph:
            if node.op_type in ("LayerNormalization", "InstanceNormalization", "Softmax", "Round"):
                assert {dtype_of(value) for value in node.inputs} == {ir.DataType.FLOAT}, node.name
            elif node.op_type == "GroupNormalization":
                silu = {use.node.op_type for use in node.outputs[0].uses()} == {"Sigmoid", "Mul"}
                first = graph == "unet" and (node.name or "").startswith("down_blocks.0.resnets.0.norm1/")
                expected = ir.DataType.FLOAT if silu and not first else precision.DTYPES[kind]
                assert {dtype_of(value) for value in node.inputs} == {expected}, node.name
            heavy = node.op_type in ("Attention", "Conv") or (node.op_type == "MatMul" and ".to_" in (node.name or ""))
            if heavy and not (node.name or "").startswith("conv_in/"):
                assert {dtype_of(value) for value in node.inputs} == {precision.DTYPES[kind]}, node.name
            if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) == precision.DTYPES[kind]:
                assert not moved_only_here(node), f"{node.name} comes after a copy in fp32, which moves twice the bytes"
    update = typed.typed_graph(bundle, "lcm_update", kind)
    assert "Cast" not in {node.op_type for node in update.graph}


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("graph", "count"), [("vae_decoder", 21), ("unet", 22)])
def test_the_silu_after_a_group_norm_is_in_fp32_and_its_result_in_the_low_precision(
    graph: str, count: int, kind: str
) -> None:
    """No cast stands between norm and SiLU, and one after both: TensorRT then builds one kernel, which writes fp16."""
    model = typed.typed_graph(Bundle.load(), graph, kind)
    of_resnets = re.compile(r"resnets\.\d+\.norm[12]/|conv_norm_out/")
    first = "down_blocks.0.resnets.0.norm1/"  # takes what `conv_in` gives, in fp32
    norms = {node.name or "": node for node in model.graph if node.op_type == "GroupNormalization"}
    with_silu = [norm for name, norm in norms.items() if of_resnets.search(name) and not name.startswith(first)]
    assert len(with_silu) == count
    for norm in with_silu:
        users = {use.node.op_type: use.node for use in norm.outputs[0].uses()}
        assert users.keys() == {"Sigmoid", "Mul"}
        product = users["Mul"]
        assert {dtype_of(value) for value in product.inputs} == {ir.DataType.FLOAT}
        (cast,) = (use.node for use in product.outputs[0].uses())
        assert dtype_of(cast.outputs[0]) == precision.DTYPES[kind], cast.name


def moved_only_here(cast: ir.Node) -> bool:
    """Whether a cast takes what an operator only moved, and nothing else takes it."""
    source = cast.inputs[0]
    assert source is not None
    move = source.producer()
    moves = ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
    return move is not None and move.op_type in moves and len(source.uses()) == 1


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """Returns the type of a value, derived from the last cast, weight or input before it."""
    while value is not None:
        if value.const_value is not None:
            return value.const_value.dtype
        if value.dtype is not None:
            return value.dtype
        node = value.producer()
        assert node is not None
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        floats = [item for item in node.inputs if item is not None and item.dtype != ir.DataType.INT64]
        value = next((item for item in floats if item.const_value is None), floats[0])
    return None


def test_weights_keep_their_names(exported: Exported) -> None:
    bundle = Bundle.load(exported.bundle)
    names = set(ir.load(bundle.folder / "onnx/unet.onnx").graph.initializers)
    model = typed.typed_graph(bundle, "unet", "fp16")
    assert {name for name in names if "." in name} <= set(model.graph.initializers)
    table = typed.weight_table(bundle, "unet", model)
    assert {name for name in names if "." in name} == set(table.root)
    motion = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight"
    assert table.root[motion].path == "onnx/unet.motion.weights"
    assert table.root[motion].precision == "fp16"
    assert table.root["down_blocks.0.resnets.0.norm2.weight"].precision == "fp32"
    assert table.root["down_blocks.0.attentions.0.norm.weight"].precision == "fp16"


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_the_table_reads_what_the_graph_holds(kind: str, tmp_path: Path) -> None:
    bundle = Bundle.load()
    model = typed.typed_graph(bundle, "unet", kind)
    table = typed.weight_table(bundle, "unet", model)
    assert len(table.root) > 300
    for name in table.root:
        held = model.graph.initializers[name].const_value
        assert held is not None
        read = table.read(bundle, name)
        assert read.tobytes() == held.numpy().tobytes(), name
        assert read.shape == tuple(held.shape)


def graph_of(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def float_value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))


@pytest.mark.parametrize(
    ("kind", "expected"), [("fp16", [0.5, np.inf, 0.0, 20000]), ("bf16", [0.5, 45000.0, 2e-10, 20000])]
)
def test_the_check_sees_what_overflows_between_two_operators(kind: str, expected: list[float], tmp_path: Path) -> None:
    """(x + x)^2 overflows in fp16, although the output, half of it, does not."""
    x = float_value("x")
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5), name="half"))
    nodes = [ir.node("Add", [x, x], name="a")]
    nodes.append(ir.node("Mul", [nodes[0].outputs[0], nodes[0].outputs[0]], name="b"))
    nodes.append(ir.node("Mul", [nodes[1].outputs[0], half], name="c"))
    out = nodes[2].outputs[0]
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    model = graph_of(nodes, [x], [out])
    model.graph.initializers["half"] = half
    precision.assign_types(model, kind)
    check.round_results(model)
    path = tmp_path / "g.onnx"
    typed.write_typed(model, path)
    (outputs,) = check.run_portable(path, {"x": np.array([0.5, 150, 1e-5, 100], np.float32)})
    np.testing.assert_allclose(outputs["y"], expected, rtol=1e-2, atol=0)


def spoil(path: Path, name: str, factor: float) -> None:
    """Scales a weight of a typed graph."""
    model = ir.load(path)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    values = value.const_value.numpy() * value.const_value.numpy().dtype.type(factor)
    value.const_value = ir.Tensor(values, name=name)
    typed.write_typed(model, path)


@pytest.mark.parametrize(
    ("graph", "weight", "factor", "where"),
    [
        ("vae_decoder", "decoder.conv_out.bias", np.nan, "; build"),
        ("vae_decoder", "decoder.conv_in.weight", 3e4, "; build"),
        ("text_encoder", "embeddings.token_embedding.weight", 3e4, " with activations scaled up by 30; build"),
        ("vae_encoder", "encoder.conv_in.weight", 2e3, " with activations scaled up by 30; build"),
        ("controlnet_scribble", "controlnet_cond_embedding.conv_in.weight", 2e3, " with activations scaled up by 30"),
    ],
)
def test_what_overflows_within_a_graph_is_refused(
    graph: str, weight: str, factor: float, where: str, tmp_path: Path
) -> None:
    """The check detects the overflow even if the frames, clipped to uint8, do not show it."""
    bundle = Bundle.load()
    path = write(bundle, graph, "fp16", tmp_path)
    check.check_precision(bundle, graph, "fp16", path)
    spoil(path, weight, factor)
    before = {item.name for item in tmp_path.iterdir()}
    with pytest.raises(BackendError, match=f"gives NaN or infinity at .*{where}"):
        check.check_precision(bundle, graph, "fp16", path)
    assert {item.name for item in tmp_path.iterdir()} == before


def test_conversion_rounds_as_numpy_and_ml_dtypes_do() -> None:
    import ml_dtypes

    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(10_000) * 10, [0, 1 + 2**-8, 1 + 3 * 2**-8, 65504]]
    )
    values = values.astype(np.float32)
    assert (convert(values, "fp16") == values.astype(np.float16)).all()
    assert (convert(values, "bf16").view(ml_dtypes.bfloat16) == values.astype(ml_dtypes.bfloat16)).all()
    assert convert(values, "fp32") is values
    mask = np.array([0, np.finfo(np.float32).min, -np.inf], np.float32)
    assert convert(mask, "fp16").tolist() == [0, -10000, -10000]


def leave_out_scales(model: ir.Model) -> None:
    """Adds SparseCtrl's residuals unscaled. Engines take them in bf16 and scale them by 1 exactly.

    Here they come in fp32, so that rounding the product would add an error of its own.
    """
    for node in list(model.graph):
        names = [value.name for value in node.inputs if value is not None]
        if node.op_type == "Mul" and "conditioning_scale.bfloat16" in names:
            for use in list(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, node.inputs[0])


def test_sums_through_the_whole_network_in_fp32_bring_bf16_closer(tmp_path: Path) -> None:
    """Compares the root mean square error with and without the fp32 operators of OpenVINO's engines.

    Residuals outweigh the values that the layers add to them. The more levels a network has, the more sums there are.
    """
    bundle = Bundle.load(demo_bundle())
    feeds = check.random_inputs(bundle, "unet")
    (expected,) = check.run_portable(bundle.folder / bundle.graph("unet").path, feeds)
    errors = []
    for keep_fp32 in (lambda node: False, precision.is_residual_stream):
        model = typed.typed_graph(bundle, "unet", "bf16", fuse_transformer_attention, keep_fp32)
        leave_out_scales(model)
        check.round_results(model)
        path = tmp_path / f"{len(errors)}.onnx"
        typed.write_typed(model, path)
        (actual,) = check.run_portable(path, feeds)
        errors.append(np.sqrt(np.mean((actual["prediction"] - expected["prediction"]) ** 2)))
    assert 0 < errors[1] < 0.85 * errors[0]
