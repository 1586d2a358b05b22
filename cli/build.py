"""`sparsectrl-lcm build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.backends import BACKENDS
from ..runtime.errors import BackendError, InvalidRequest
from .options import parse_size

if TYPE_CHECKING:
    from ..engine.tensorrt.options import TensorRtOptions

BOUNDS = {
    ("fp32", False): 1e-3,
    ("fp32", True): 0.1,
    ("fp16", False): 1e-2,
    ("fp16", True): 3.0,
    ("bf16", False): 5e-2,
    ("bf16", True): 3.0,
}
"""What an output may differ from the portable graph's: relative, and levels in the mean for frames."""


def build(
    bundle: Annotated[Path, typer.Argument(help="A folder that `export` wrote.")],
    backend: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino or onnxruntime.")],
    size: Annotated[
        list[str] | None, typer.Option(metavar="WxH", help="For TensorRT: pixels; may be given several times.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="For TensorRT: frames of a clip.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp16 (default on GPUs), bf16, fp32, or int8; openvino takes what fits the processor."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare each graph with fp32 on the CPU first.")] = True,
    optimization_level: Annotated[int, typer.Option(help="TensorRT: 0 to 5, how long to look for kernels.")] = 3,
    aux_streams: Annotated[int, typer.Option(help="TensorRT: streams besides the main one.")] = 0,
    workspace: Annotated[float | None, typer.Option(metavar="GIB", help="TensorRT: memory for kernels.")] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="TensorRT: fp32 products may round to TF32.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="TensorRT: weights can be replaced later.")] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="TensorRT: leave weights out, read them from the bundle.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: runs on later releases of the same major version.")
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="tensorrt: none, same-compute-capability or ampere-plus.")
    ] = "none",
    compute_capability: Annotated[
        list[str] | None, typer.Option(metavar="X.Y", help="tensorrt-rtx: build for these only, as 8.9.")
    ] = None,
) -> None:
    """Turn the portable graphs of a bundle into engines of a backend."""
    if backend not in BACKENDS:
        raise InvalidRequest("backend", f"{backend!r} is unknown", f"allowed are {', '.join(BACKENDS)}")
    _need_libraries(backend)
    if not backend.startswith("tensorrt"):
        _refuse(
            backend,
            size=size,
            frames=frames,
            precision=precision if backend == "onnxruntime" else None,
            optimization_level=optimization_level != 3,
            aux_streams=aux_streams,
            workspace=workspace,
            tf32=tf32,
            refit=refit,
            strip_weights=strip_weights,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility != "none",
            compute_capability=compute_capability,
        )
    if backend == "onnxruntime":
        build_onnxruntime(bundle)
    elif backend == "onnxruntime-cuda":
        build_onnxruntime_cuda(bundle, precision or "fp16", check)
    elif backend == "openvino":
        build_openvino(bundle, precision, check)
    else:
        from ..engine.tensorrt.options import TensorRtOptions

        options = TensorRtOptions(
            precision=precision or "fp16",
            optimization_level=optimization_level,
            aux_streams=aux_streams,
            workspace=workspace,
            tf32=tf32,
            refit=refit,
            strip_weights=strip_weights,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            compute_capabilities=tuple(compute_capability or ()),
        )
        for width, height in dict.fromkeys(map(parse_size, size)) if size else [(None, None)]:
            build_tensorrt(bundle, backend, width, height, frames, options, check)


def build_onnxruntime(bundle: Path) -> None:
    """Builds the engines of ONNX Runtime and says what was fused."""
    _need_libraries("onnxruntime")
    from ..engine.onnxruntime import build

    for graph, count in build(bundle).items():
        typer.echo(f"{graph}: {count} spatial attentions fused for onnxruntime")


def build_onnxruntime_cuda(bundle: Path, precision: str, check: bool) -> None:
    """Builds the engines of ONNX Runtime's CUDA provider."""
    from ..engine.onnxruntime_cuda import build
    from .progress_bar import Bar

    with Bar() as bar:
        index = build(bundle, precision, bar.update, check)
        bar.update("done", 1.0)
    _tell(index)


def build_openvino(bundle: Path, precision: str | None, check: bool) -> None:
    """Builds the engines of OpenVINO; None takes the precision that fits the processor."""
    from ..engine.openvino import build
    from ..runtime.example_requests import run_samples
    from ..runtime.format.bundle import Bundle
    from .progress_bar import Bar

    opened = Bundle.load(bundle)
    with Bar() as bar:
        index = build(bundle, precision, bar.update, check, lambda sessions: run_samples(opened, sessions))
        bar.update("done", 1.0)
    _tell(index)


def build_tensorrt(
    bundle: Path,
    backend: str,
    width: int | None,
    height: int | None,
    frames: int | None,
    options: "TensorRtOptions",
    check: bool,
) -> None:
    """Builds the engines of TensorRT or TensorRT-RTX for one size; None takes the bundle's own."""
    from ..engine.tensorrt.builder import build
    from ..runtime.format.engine_sets import ClipSize
    from ..runtime.format.manifest import read_manifest
    from .progress_bar import Bar

    sizes = read_manifest(bundle).sizes
    clip = ClipSize(
        width=sizes.width if width is None else width,
        height=sizes.height if height is None else height,
        frames=sizes.frames if frames is None else frames,
    )
    with Bar() as bar:
        index = build(bundle, backend, clip, options, bar.update, check)
        bar.update("done", 1.0)
    _tell(index)


def _tell(index: Any) -> None:
    from ..runtime.format.manifest import DECODERS

    for graph, record in index.engines.items():
        frames = graph in DECODERS.values()
        report = record.report
        facts = [f"{sum(file.bytes for file in record.files.values()) / 1e6:.1f} MB"]
        if "seconds" in report:
            facts.append(f"built in {report['seconds']:.1f} s")
        if report.get("errors"):
            unit = "levels from fp32 in the mean" if frames else "from fp32 (relative)"
            worst, bound = max(report["errors"].values()), BOUNDS.get((index.precision, frames))
            above = f", above the bound of {bound:g}" if bound and worst > bound else ""
            facts.append(f"{worst:.1e} {unit}{above}")
        typer.echo(f"{graph}: {', '.join(facts)}")
    size = f"{index.size} " if index.size else ""
    typer.echo(f"{index.backend} {size}{index.precision}: {len(index.engines)} engines")


def _refuse(backend: str, **given: Any) -> None:
    """Raises InvalidRequest where an option was given that the backend does not have."""
    for name, value in given.items():
        if value:
            raise InvalidRequest(name, f"is not an option of {backend}")


def _need_libraries(backend: str) -> None:
    from importlib.util import find_spec

    from ..runtime.backends import availability

    if backend == "openvino" and (reason := availability(backend).reason) is not None:  # its extra brings onnx-ir
        raise BackendError("backend", reason)
    if not find_spec("onnx_ir"):
        raise BackendError("build", "onnx-ir is not installed", "run: pip install onnx-ir")
    if (reason := availability("onnxruntime").reason) is not None:
        raise BackendError("build", reason)
