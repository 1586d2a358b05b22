"""Count the floating-point operations of an ONNX graph from the shapes in ONNX Runtime's profile of a run."""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def count_flops(path: Path, feeds: dict[str, np.ndarray], folder: Path) -> int:
    """Counts 2 per multiply-add of convolutions and matrix products, as torch's FlopCounterMode does."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape in the profile
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return sum(_flops(event["args"]) for event in events if event.get("cat") == "Node" and "op_name" in event["args"])


def _flops(args: dict[str, Any]) -> int:
    if "output_type_shape" not in args:
        return 0
    shapes = [next(iter(item.values())) for item in args["input_type_shape"]]
    output = next(iter(args["output_type_shape"][0].values()))
    match args["op_name"]:
        case "Conv":
            return 2 * prod(output) * prod(shapes[1][1:])
        case "ConvTranspose":
            return 2 * prod(shapes[0]) * prod(shapes[1][1:])
        case "MatMul" | "Gemm":
            return 2 * prod(output) * shapes[0][-1]
    return 0
