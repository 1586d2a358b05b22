"""A portable graph of the first two levels of Stable Diffusion 1.5's UNet with motion modules, at true width.

It has the patterns that torch's exporter writes, static shapes, and one residual block, transformer and motion module
for each level: 320 channels at 64x64 latents and 640 at 32x32, 16 frames, 8 heads, 77 text embeddings of 768.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sparsectrl_lcm.engine.rewrites.typed_graph import IR_VERSION, write_typed
from sparsectrl_lcm.engine.tensorrt.configuration import configure
from sparsectrl_lcm.engine.tensorrt.kernels import Kernel, kernels_of_log
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.gpu.tensorrt_library import load_library

FRAMES, SIDE, HEADS, GROUPS, TOKENS, TEXT, TIME = 16, 64, 8, 32, 77, 768, 1280
CHANNELS = (320, 640)
ATTENTIONS = tuple(
    f"down_blocks.{level}.{part}.0.transformer_blocks.0.attn{number}"
    for level in (0, 1)
    for part in ("attentions", "motion_modules")
    for number in (1, 2)
)
GROUP_NORMS = tuple(
    f"down_blocks.{level}.{part}"
    for level in (0, 1)
    for part in ("resnets.0.norm1", "resnets.0.norm2", "attentions.0.norm", "motion_modules.0.norm")
)


def true_width_graph() -> ir.Model:
    """Returns the graph in fp32 with random weights."""
    writer = _Writer()
    sample = writer.input("latents", [FRAMES, CHANNELS[0], SIDE, SIDE])  # of this name: in fp32, as after `conv_in`
    time, text = writer.input("time", [1, TIME]), writer.input("prompt_embeds", [1, TOKENS, TEXT])
    side, width = SIDE, CHANNELS[0]
    for level, channels in enumerate(CHANNELS):
        block = f"down_blocks.{level}"
        if level:
            side //= 2
            sample = writer.conv(f"{block}.downsamplers.0.conv", sample, width, width, 3, stride=2)
        sample = writer.resnet(f"{block}.resnets.0", sample, time, width, channels, side)
        sample = writer.transformer(f"{block}.attentions.0", sample, text, channels, side)
        sample = writer.motion_module(f"{block}.motion_modules.0", sample, channels, side)
        width = channels
    return writer.model(sample, [FRAMES, width, side, side])


def compiled(model: ir.Model, path: Path) -> list[Kernel]:
    """Returns the kernels that TensorRT-RTX makes of a typed graph, which is written to `path`."""
    model.ir_version = IR_VERSION
    write_typed(model, path)
    library = load_library("tensorrt-rtx")
    trt = library.module
    builder = trt.Builder(library.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    config = builder.create_builder_config()
    configure(trt, config, True, BuildOptions())
    library.logger.layers = ""
    assert builder.build_serialized_network(network, config) is not None
    return kernels_of_log(library.logger.layers)


class _Writer:
    """Appends nodes under the names that modules have in a checkpoint."""

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []
        self._random = np.random.default_rng(0)

    def model(self, output: ir.Value, shape: list[int]) -> ir.Model:
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph = ir.Graph(
            self._inputs, [output], nodes=self._nodes, initializers=self._weights, opset_imports={"": 21}, name="unet"
        )
        return ir.Model(graph, ir_version=10)

    def input(self, name: str, shape: list[int]) -> ir.Value:
        self._inputs.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
        return self._inputs[-1]

    def resnet(self, name: str, x: ir.Value, time: ir.Value, width: int, channels: int, side: int) -> ir.Value:
        hidden = self.silu(name, self.group_norm(f"{name}.norm1", x, [FRAMES, width, side, side]))
        hidden = self.conv(f"{name}.conv1", hidden, width, channels, 3)
        weights = self._weight(f"{name}.time_emb_proj.weight", [channels, TIME]), self._bias(name, channels)
        shift = self._op(f"{name}.time_emb_proj", "Gemm", [self.silu(name, time), *weights], transB=1)
        shift = self._op(name, "Unsqueeze", [shift, self._ints([2, 3])])
        hidden = self._op(name, "Add", [hidden, shift])
        hidden = self.silu(name, self.group_norm(f"{name}.norm2", hidden, [FRAMES, channels, side, side]))
        hidden = self.conv(f"{name}.conv2", hidden, channels, channels, 3)
        if width != channels:
            x = self.conv(f"{name}.conv_shortcut", x, width, channels, 1)
        return self._op(name, "Div", [self._op(name, "Add", [x, hidden]), self._scalar(1.0)])

    def transformer(self, name: str, x: ir.Value, text: ir.Value, channels: int, side: int) -> ir.Value:
        hidden = self.group_norm(f"{name}.norm", x, [FRAMES, channels, side, side])
        hidden = self.conv(f"{name}.proj_in", hidden, channels, channels, 1)
        hidden = self._op(name, "Transpose", [hidden], perm=[0, 2, 3, 1])
        hidden = self._reshape(name, hidden, [FRAMES, side * side, channels])
        block = f"{name}.transformer_blocks.0"
        normed = self.layer_norm(f"{block}.norm1", hidden, channels)
        hidden = self._op(block, "Add", [self.attention(f"{block}.attn1", normed, normed, channels), hidden])
        normed = self.layer_norm(f"{block}.norm2", hidden, channels)
        queries = self._reshape(name, normed, [1, FRAMES * side * side, channels])  # the text is not repeated
        mixed = self.attention(f"{block}.attn2", queries, text, channels)
        mixed = self._reshape(name, mixed, [FRAMES, side * side, channels])
        hidden = self.feed_forward(block, self._op(block, "Add", [mixed, hidden]), channels)
        hidden = self._reshape(name, hidden, [FRAMES, side, side, channels])
        hidden = self._op(name, "Transpose", [hidden], perm=[0, 3, 1, 2])
        return self._op(name, "Add", [self.conv(f"{name}.proj_out", hidden, channels, channels, 1), x])

    def motion_module(self, name: str, x: ir.Value, channels: int, side: int) -> ir.Value:
        hidden = self.group_norm(f"{name}.norm", x, [FRAMES, channels, side, side])
        hidden = self._reshape(name, hidden, [1, FRAMES, channels, side * side])
        hidden = self._op(name, "Transpose", [hidden], perm=[0, 3, 1, 2])
        hidden = self._reshape(name, hidden, [side * side, FRAMES, channels])
        hidden = self.linear(f"{name}.proj_in", hidden, channels, channels)
        block = f"{name}.transformer_blocks.0"
        positions = self._weight(f"{block}.pos_embed.pe", [1, FRAMES, channels])
        for number in (1, 2):
            normed = self.layer_norm(f"{block}.norm{number}", hidden, channels)
            placed = self._op(f"{block}.pos_embed", "Add", [normed, positions])
            mixed = self.attention(f"{block}.attn{number}", placed, placed, channels)
            hidden = self._op(block, "Add", [mixed, hidden])
        hidden = self.linear(f"{name}.proj_out", self.feed_forward(block, hidden, channels), channels, channels)
        hidden = self._reshape(name, hidden, [1, side * side, FRAMES, channels])
        hidden = self._op(name, "Transpose", [hidden], perm=[0, 2, 3, 1])
        hidden = self._reshape(name, hidden, [FRAMES, channels, side, side])
        return self._op(name, "Add", [x, hidden])

    def attention(self, name: str, x: ir.Value, context: ir.Value, channels: int) -> ir.Value:
        width = channels if context is x else TEXT
        head = channels // HEADS
        root = self._op(name, "Sqrt", [self._scalar(head**-0.5)])
        heads = {}
        for part, source, inner in (("q", x, channels), ("k", context, width), ("v", context, width)):
            projected = self.linear(f"{name}.to_{part}", source, inner, channels, bias=False)
            split = self._reshape(name, projected, [0, -1, HEADS, head])
            heads[part] = self._op(name, "Transpose", [split], perm=[0, 2, 1, 3])
        keys = self._op(name, "Transpose", [heads["k"]], perm=[0, 1, 3, 2])
        scaled = [self._op(name, "Mul", [value, root]) for value in (heads["q"], keys)]
        weights = self._op(name, "Softmax", [self._op(name, "MatMul", scaled)], axis=-1)
        merged = self._op(name, "Transpose", [self._op(name, "MatMul", [weights, heads["v"]])], perm=[0, 2, 1, 3])
        return self.linear(f"{name}.to_out.0", self._reshape(name, merged, [0, -1, channels]), channels, channels)

    def feed_forward(self, block: str, x: ir.Value, channels: int) -> ir.Value:
        normed = self.layer_norm(f"{block}.norm3", x, channels)
        wide = self.linear(f"{block}.ff.net.0.proj", normed, channels, 8 * channels)
        halves = ir.node("Split", [wide], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{block}.ff.net.0/Split")
        self._nodes.append(halves)
        for number, value in enumerate(halves.outputs):
            value.name = f"{block}.split_{number}"
        gate = self._op(f"{block}.ff.net.0", "Gelu", [halves.outputs[1]])
        gated = self._op(f"{block}.ff.net.0", "Mul", [halves.outputs[0], gate])
        return self._op(block, "Add", [self.linear(f"{block}.ff.net.2", gated, 4 * channels, channels), x])

    def group_norm(self, name: str, x: ir.Value, shape: list[int]) -> ir.Value:
        channels, ones = shape[1], [1] * (len(shape) - 2)
        split = self._reshape(name, x, [0, GROUPS, -1])
        unit = [self._constant(np.full(GROUPS, value, np.float32)) for value in (1, 0)]
        normed = self._op(name, "InstanceNormalization", [split, *unit], epsilon=1e-5)
        value = self._reshape(name, normed, shape)
        for operator, part in (("Mul", "weight"), ("Add", "bias")):
            parameter = self._reshape(name, self._weight(f"{name}.{part}", [channels]), [channels, *ones])
            value = self._op(name, operator, [value, parameter])
        return value

    def layer_norm(self, name: str, x: ir.Value, channels: int) -> ir.Value:
        parameters = [self._weight(f"{name}.{part}", [channels]) for part in ("weight", "bias")]
        return self._op(name, "LayerNormalization", [x, *parameters], axis=-1, epsilon=1e-5)

    def linear(self, name: str, x: ir.Value, width: int, channels: int, bias: bool = True) -> ir.Value:
        product = self._op(name, "MatMul", [x, self._weight(f"{name}.weight", [width, channels])])
        return self._op(name, "Add", [product, self._bias(name, channels)]) if bias else product

    def conv(self, name: str, x: ir.Value, width: int, channels: int, kernel: int, stride: int = 1) -> ir.Value:
        weights = self._weight(f"{name}.weight", [channels, width, kernel, kernel]), self._bias(name, channels)
        return self._op(name, "Conv", [x, *weights], pads=[kernel // 2] * 4, strides=[stride, stride])

    def silu(self, name: str, x: ir.Value) -> ir.Value:
        module = f"{name}.nonlinearity"
        return self._op(module, "Mul", [x, self._op(module, "Sigmoid", [x])])

    def _op(self, module: str, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{module}/{operator}_{len(self._nodes)}")
        node.outputs[0].name = f"value_{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def _reshape(self, module: str, x: ir.Value, shape: list[int]) -> ir.Value:
        return self._op(module, "Reshape", [x, self._ints(shape)])

    def _ints(self, values: list[int]) -> ir.Value:
        return self._constant(np.asarray(values, np.int64))

    def _scalar(self, value: float) -> ir.Value:
        return self._constant(np.float32(value))

    def _constant(self, array: Any) -> ir.Value:
        return self._initializer(f"constant_{len(self._weights)}", np.asarray(array))

    def _weight(self, name: str, shape: list[int]) -> ir.Value:
        return self._initializer(name, 0.02 * self._random.standard_normal(shape, np.float32))

    def _bias(self, name: str, channels: int) -> ir.Value:
        return self._weight(f"{name}.bias", [channels])

    def _initializer(self, name: str, array: Any) -> ir.Value:
        self._weights.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self._weights[-1]
