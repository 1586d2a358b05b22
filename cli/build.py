"""`sparsectrl-lcm build`."""

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import SparseCtrlLcmError


def build(
    bundle: Annotated[Path, typer.Argument(help="A folder that `export` wrote.")],
    backend: Annotated[str, typer.Option(help="onnxruntime; `export` has built it already.")],
) -> None:
    """Turn the portable graphs of a bundle into engines of a backend."""
    if backend != "onnxruntime":
        raise SparseCtrlLcmError(f"--backend {backend!r} has no engines in this release; allowed is onnxruntime")
    build_onnxruntime(bundle)


def build_onnxruntime(bundle: Path) -> None:
    """Builds the engines of ONNX Runtime and says what was fused."""
    from importlib.util import find_spec

    if not find_spec("onnx_ir"):
        raise SparseCtrlLcmError("build needs onnx-ir; install the export extra: pip install '.[export]' in a clone")
    from ..engine.onnxruntime import build

    for graph, count in build(bundle).items():
        typer.echo(f"{graph}: {count} spatial attentions fused for onnxruntime")
