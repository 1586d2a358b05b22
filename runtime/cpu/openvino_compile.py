"""Compiles a graph with OpenVINO, or takes the compiled one from the cache."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..operating_system import forget_mapped_files
from .compiled_cache import CompiledGraph
from .openvino_library import load_openvino

CHANGES = 1
"""Version of what is changed in a graph before it is compiled. Increase it with every change of that."""
FORGET_EVERY = 0.2
"""Seconds between two releases of mapped weights while a graph is compiled."""


def compiled_model(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    device: str,
    options: dict[str, Any],
    compiled: CompiledGraph | None,
) -> Any:
    """OpenVINO's compiled model of an ONNX graph for these input shapes; the arguments are those of `OpenVinoSession`.

    Raises:
        RuntimeError: OpenVINO cannot read or compile the graph.
    """
    if compiled is not None and (blob := compiled.read()) is not None:
        with suppress(RuntimeError):  # compile it again
            return core().import_model(blob, device, options)
    with _releasing_mapped_weights(path.parent):
        model = core().read_model(path)
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        _move_heads_into_batch(model)
        made = core().compile_model(_in_fp32(model), device, options)
        if compiled is not None:
            with suppress(RuntimeError):  # not every graph can be exported
                compiled.write(made.export_model().getvalue())
        return made


def _move_heads_into_batch(model: Any) -> None:
    """Moves the heads into the batch in every attention that has as many positions as heads.

    OpenVINO 2026.4 fuses the transpose of heads and positions into its bf16 kernel, which confuses the two axes if they
    are equal: a clip of 8 frames with 8 heads would come out wrong.
    """
    from openvino import opset13 as operators

    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        shapes = [tuple(node.input_value(index).shape) for index in range(3)]  # [B, heads, S, d]
        if all(heads != positions for _, heads, positions, _ in shapes):
            continue
        result, users = list(node.output(0).shape), node.output(0).get_target_inputs()
        for index, (batch, heads, positions, size) in enumerate(shapes):
            rows = [batch * heads, 1, positions, size]
            source = node.input_value(index)
            node.input(index).replace_source_output(operators.reshape(source, rows, special_zero=False).output(0))
        node.validate_and_infer_types()
        joined = operators.reshape(node.output(0), result, special_zero=False)
        for user in users:
            user.replace_source_output(joined.output(0))


def _in_fp32(model: Any) -> Any:
    """Casts the inputs and outputs of a typed graph to fp32, since numpy has no bf16."""
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    edges = PrePostProcessor(model)
    for index, port in enumerate(model.inputs):
        if port.element_type in (Type.bf16, Type.f16):
            edges.input(index).tensor().set_element_type(Type.f32)
    for index, port in enumerate(model.outputs):
        if port.element_type in (Type.bf16, Type.f16):
            edges.output(index).tensor().set_element_type(Type.f32)
    return edges.build()


@contextmanager
def _releasing_mapped_weights(folder: Path) -> Iterator[None]:
    """Releases the mapped weights while a graph is compiled and after it: packed copies replace them."""
    done = threading.Event()

    def release_regularly() -> None:
        while not done.wait(FORGET_EVERY):
            forget_mapped_files(folder, ".weights")

    thread = threading.Thread(target=release_regularly, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget_mapped_files(folder, ".weights")


@cache
def core() -> Any:
    """OpenVINO, with its plugins."""
    return load_openvino().Core()
