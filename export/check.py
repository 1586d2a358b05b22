"""Compare an exported graph with torch."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from ..runtime.errors import SparseCtrlLcmError

MAX_RELATIVE_ERROR = 1e-4
"""Limit for fp32 outputs, relative to the output's largest value."""
MAX_LEVELS = 1.0
"""Limit for uint8 frames, in levels of 255."""


class ExportError(SparseCtrlLcmError):
    """A checkpoint cannot be exported, or its graph differs from torch."""


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Opens a session that needs as little memory as possible besides the mapped weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_reuse = False  # planning the reuse takes longer than the run
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def largest_error(
    session: onnxruntime.InferenceSession, inputs: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]
) -> float:
    """Returns the largest error of any output: in levels for uint8, else relative to the output's largest value.

    The error is infinite if a shape differs or a value of either side is not finite.
    """
    feeds = {item.name: tensor.numpy() for item, tensor in zip(session.get_inputs(), inputs, strict=True)}
    worst = 0.0
    for actual, reference in zip(session.run(None, feeds), (tensor.numpy() for tensor in expected), strict=True):
        if actual.shape != reference.shape or not (np.isfinite(actual).all() and np.isfinite(reference).all()):
            return float("inf")
        difference = np.abs(actual.astype(np.float32) - reference.astype(np.float32)).max()
        scale = 1.0 if reference.dtype == np.uint8 else np.abs(reference).max() + 1e-12
        worst = max(worst, float(difference / scale))
    return worst


def check(name: str, error: float, frames: bool) -> None:
    """Raises ExportError if the error of graph `name` exceeds its limit."""
    bound = MAX_LEVELS if frames else MAX_RELATIVE_ERROR
    if not error <= bound:
        unit = "levels" if frames else "relative"
        raise ExportError(
            "export",
            f"graph {name!r} differs from torch by {error:.1e} ({unit}), the limit is {bound:.0e}",
            "report this with the names of the checkpoints",
        )
