"""Replace a SparseCtrl of a bundle by another one of the same architecture."""

import gc
import shutil
from pathlib import Path

import torch

from ..runtime.errors import first_line
from ..runtime.format.manifest import GraphRecord, Manifest
from . import checkpoints, configurations
from .check import MAX_RELATIVE_ERROR, ExportError, largest_error, open_session
from .compatibility import per_level
from .loading import DEFAULTS, LoadOptions
from .options import ExportOptions, public_name
from .plan import Job, Parts, plan_jobs
from .sources import quoted
from .swap import AGAIN, Swap, open_swap, weights_of


def replace_controlnets(
    bundle: Path,
    controlnets: dict[str, str],
    options: LoadOptions = DEFAULTS,
    output: Path | None = None,
    *,
    dry_run: bool = False,
) -> tuple[Manifest, list[str]]:
    """Replaces the SparseCtrls of a bundle and compares each new graph with torch.

    Args:
        bundle: the bundle's folder.
        controlnets: the new ones by kind, `scribble` or `rgb`.
        options: how to load them.
        output: a new or empty folder for the bundle with its new weights; None changes `bundle`.
        dry_run: whether everything is checked that can be without writing; the comparison with torch is left out.

    Returns:
        The new manifest, and a line for each file of weights that is replaced.

    Raises:
        ExportError: a source cannot be loaded, has another architecture than the one in the bundle, or the bundle has
            none of its kind or cannot be written.
        BundleError: `bundle` is not a bundle.
    """
    with open_swap(bundle, output, dry_run=dry_run) as swap:
        for kind, source in controlnets.items():
            if kind not in swap.manifest.controlnets:
                raise ExportError(f"controlnet_{kind}", f"{quoted(str(bundle))} has no SparseCtrl for {kind}", AGAIN)
            _replace(swap, kind, source, options)
            swap.sources[f"controlnet_{kind}"] = public_name(source)
    return swap.changed(), swap.report


def _replace(swap: Swap, kind: str, source: str, options: LoadOptions) -> None:
    field, record = f"controlnet_{kind}", swap.manifest.graphs[f"controlnet_{kind}"]
    job = _job(swap.manifest, kind, source, options)
    if dict(job.spec.outputs) != {item.name: item.shape for item in record.outputs}:
        raise ExportError(field, f"{quoted(source)} has other layers or channels than the bundle's", AGAIN)
    weights = weights_of(checkpoints.load_controlnet(kind, source, options))
    for file in record.weights:
        swap.replace(job.spec.name, file, field, source, weights)
    del weights
    if swap.staged is not None:
        error = _compare(swap, swap.staged, job, field, source)
        swap.graphs[job.spec.name] = record.model_copy(update={"max_error": error})


def _job(manifest: Manifest, kind: str, source: str, options: LoadOptions) -> Job:
    """Returns the job of an export that writes the graph of a SparseCtrl with the sizes of the bundle."""
    config = configurations.load_controlnet_config(kind, source)
    if config["use_simplified_condition_embedding"] != (kind == "rgb"):
        other = "scribble" if kind == "rgb" else "rgb"
        raise ExportError(f"controlnet_{kind}", f"{quoted(source)} is a SparseCtrl for {other}", f"give it as {other}")
    given = ExportOptions(
        "", "", {kind: source}, temporal_norm=manifest.temporal_norm, base_config=options.base_config,
        variant=options.variant,
    )  # fmt: skip
    parts = Parts(
        options=given,
        choices=(),
        temporal_norm=manifest.temporal_norm,
        sizes=manifest.sizes,
        scheduler=manifest.scheduler,
        vocabulary=1,
        max_tokens=manifest.max_tokens,
        text_width=_text_width(manifest.graphs[f"controlnet_{kind}"]),
        text_layers=1,
        channels=tuple(config["block_out_channels"]),
        layers=per_level(config["layers_per_block"], config),
    )
    return next(job for job in plan_jobs(parts) if job.spec.name == f"controlnet_{kind}")


def _text_width(record: GraphRecord) -> int:
    return next(int(item.shape[-1]) for item in record.inputs if item.name == "prompt_embeds")


def _compare(swap: Swap, staged: Path, job: Job, field: str, source: str) -> float:
    """Returns how much the graph with its new weights differs from torch.

    It tells what shapes do not: another number of heads or groups, or another order of colours.

    Raises:
        ExportError: the difference is above the limit of an export.
    """
    path = staged / swap.manifest.graphs[job.spec.name].path
    shutil.copy2(swap.folder / swap.manifest.graphs[job.spec.name].path, path)
    module = job.build().eval().requires_grad_(False)
    inputs = job.check_inputs()[0]
    try:
        with torch.no_grad():
            expected = module(*inputs)
        del module
        gc.collect()
        error = largest_error(open_session(path), inputs, expected)
    except Exception as failure:  # torch and ONNX Runtime raise anything
        reason = f"{quoted(source)} does not run in the bundle: {first_line(failure)}"
        raise ExportError(field, reason[:150], AGAIN) from None
    finally:
        path.unlink()
    if not error <= MAX_RELATIVE_ERROR:
        reason = f"{quoted(source)} has other heads, groups or colours than the bundle's: it differs by {error:.1e}"
        raise ExportError(field, reason, AGAIN)
    return error
