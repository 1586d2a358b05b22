"""The kernels that TensorRT compiled: read from its inspector, or from the log of TensorRT-RTX's builder.

The inspector needs a GPU that can load the engine. TensorRT-RTX's builder logs the same facts on any machine.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_KERNEL = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w+), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], "
    r"TacticName: (?P<TacticName>.*?), StreamId: .*?(?:, Metadata: (?P<Metadata>.*))?"
)
_TENSOR = re.compile(r"{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[\d,]*)\].*?, Datatype: (?P<Datatype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_BITS = (
    (r"bf16|bfloat16|half|fp16", 16),
    (r"int64", 64),
    (r"int32|float|fp32", 32),
    (r"fp8|u?int8|bool", 8),
    (r"fp4|int4", 4),
)
"""Bits of the types, by words in TensorRT's description of a type or format; the first match counts."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a kernel reads or writes.

    Attributes:
        name: TensorRT's.
        shape: its dimensions.
        format: type and layout in TensorRT's words, such as Half, or Row major linear FP16 format.
    """

    name: str
    shape: tuple[int, ...]
    format: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size; 0 if TensorRT does not give its type."""
        words = self.format.lower()
        return self.elements * next((bits for pattern, bits in _BITS if re.search(pattern, words)), 0) // 8

    @property
    def is_fp32(self) -> bool:
        """Whether its elements are fp32."""
        return bool(re.search(r"\bfloat\b|fp32", self.format.lower()))


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        name: TensorRT's.
        kind: its type of layer, such as kgen, gemm or correlation.
        tactic: the implementation; TensorRT-RTX chooses that of products and convolutions at run time.
        inputs: the activations that it reads; weights are not among them.
        outputs: the activations that it writes.
        nodes: the names of the ONNX nodes that it computes.
        constants: weights and other constants that it reads.
    """

    name: str
    kind: str = "unknown"
    tactic: str = ""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    nodes: tuple[str, ...] = ()
    constants: tuple[Tensor, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """Bytes of the activations that it reads and writes, each tensor once."""
        return sum(tensor.bytes for tensors in (self.inputs, self.outputs) for tensor in set(tensors))


def kernels_of_inspector(text: str) -> list[Kernel]:
    """Reads the engine information of TensorRT's inspector in JSON."""
    return [_kernel(layer) for layer in json.loads(text).get("Layers", [])]


def kernels_of_log(text: str) -> list[Kernel]:
    """Reads the message of TensorRT-RTX's builder that begins with Layers:."""
    found = []
    for match in filter(None, map(_KERNEL.fullmatch, text.splitlines())):
        fields: dict[str, Any] = match.groupdict(default="")
        for name in ("Inputs", "Constants", "Outputs"):
            fields[name] = [tensor.groupdict() for tensor in _TENSOR.finditer(fields[name])]
        found.append(_kernel(fields))
    return found


def _kernel(layer: Any) -> Kernel:
    """Makes a kernel of a layer, which is its name alone in engines that were built without detailed verbosity."""
    if not isinstance(layer, dict):
        return Kernel(str(layer))
    return Kernel(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", "unknown")),
        tactic=str(layer.get("TacticName", "")),
        inputs=_tensors(layer.get("Inputs", ())),
        outputs=_tensors(layer.get("Outputs", ())),
        constants=_tensors(layer.get("Constants", ())) or _weights(layer),
        nodes=tuple(_NODE.findall(str(layer.get("Metadata", "")))),
    )


def _weights(layer: dict[str, Any]) -> tuple[Tensor, ...]:
    """The weights of a convolution of TensorRT, described by their number: [output channels, all others]."""
    weights, channels = layer.get("Weights"), layer.get("OutMaps")
    if not isinstance(weights, dict) or not channels:
        return ()
    shape = (int(channels), int(weights.get("Count", 0)) // int(channels))
    return (Tensor("weights", shape, str(weights.get("Type", ""))),)


def _tensors(described: Iterable[dict[str, Any]]) -> tuple[Tensor, ...]:
    tensors = []
    for one in described:
        shape = one.get("Dimensions", ())
        sides = shape.split(",") if isinstance(shape, str) else shape
        words = str(one.get("Datatype") or one.get("Format/Datatype") or one.get("Format") or "")
        tensors.append(Tensor(str(one.get("Name", "")), tuple(int(side) for side in sides if side != ""), words))
    return tuple(tensors)
