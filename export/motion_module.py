"""Replace the motion modules of a bundle, or export motion modules as a graph of their own."""

import gc
from pathlib import Path

import onnx_ir as ir
import torch
from diffusers import MotionAdapter
from diffusers.models.attention_processor import Attention

from ..runtime.errors import BundleError, reason_of
from ..runtime.format.manifest import Manifest, SchedulerRecord
from ..runtime.format.temporary_folders import clear_leftovers, staged_folder
from . import published_models
from .check import ExportError, check, largest_error, open_session
from .checkpoints import load_motion_adapter
from .exporter import weights_file
from .graph_specs import motion_module_spec
from .onnx_file import trace, write
from .plan import public_name
from .sources import quoted
from .swap import AGAIN, open_swap
from .temporal_transformer import TemporalNorm
from .traced_modules import MotionModules


def replace_motion_module(
    source: str, bundle: Path, output: Path | None = None, *, dry_run: bool = False
) -> tuple[Manifest, list[str]]:
    """Replaces the motion-module weights of `bundle` by those of the adapter `source`.

    Args:
        source: of the new motion modules.
        bundle: the bundle's folder.
        output: a new or empty folder for the bundle with its new weights; None changes `bundle`.
        dry_run: whether everything is checked and nothing written.

    Returns:
        The new manifest, and a line for each file of weights that is replaced.

    Raises:
        ExportError: the layers, shapes, heads or norms of the adapter differ from those of the exported one, or the
            bundle cannot be written.
        BundleError: `bundle` is not a bundle, or has no file of motion-module weights.
    """
    with open_swap(bundle, output, dry_run=dry_run) as swap:
        graph = swap.manifest.graphs["unet"]
        file = next((name for name in graph.weights if name.endswith(weights_file("unet", ".motion_modules."))), None)
        if file is None:
            raise BundleError("bundle", f"{quoted(str(bundle))} has no file of motion-module weights", AGAIN)
        adapter = load_motion_adapter(source)
        _check_norms(source, adapter, swap.manifest)
        weights = adapter.state_dict()
        if extra := sorted(weights.keys() - {name for name, _ in swap.weights("unet", file)}):
            reason = f"{quoted(source)} and the bundle have different layers: {extra[0]} is new"
            raise ExportError("motion_adapter", reason, AGAIN)
        _check_heads(source, adapter, ir.load(swap.folder / graph.path).graph)
        swap.replace("unet", file, "motion_adapter", source, weights)
        swap.scheduler = _schedule(source, adapter, swap.manifest)
        swap.sources["motion_adapter"] = public_name(source)
    return swap.changed(), swap.report


def _check_norms(source: str, adapter: MotionAdapter, manifest: Manifest) -> None:
    """Raises ExportError if the UNet of the bundle has other norms than the adapter was trained with.

    The norms over `frame` and `clip` may both be used with the same adapter: that choice stays with the bundle.
    """
    trained, exported = published_models.temporal_norm(adapter.config), manifest.temporal_norm
    if (trained == "resnet-clip") != (exported == "resnet-clip"):
        raise ExportError(
            "motion_adapter",
            f"{quoted(source)} needs temporal norm {trained}, the bundle has {exported}",
            "export the bundle again",
        )


def _schedule(source: str, adapter: MotionAdapter, manifest: Manifest) -> SchedulerRecord:
    """Returns the schedule of the bundle, with other original steps if AnimateLCM comes or goes.

    A number that was chosen at export stays.
    """
    old = published_models.is_named_animatelcm(manifest.sources.get("motion_adapter", ""))
    new = published_models.is_animatelcm(source, adapter.config)
    steps = {True: published_models.ANIMATELCM_STEPS, False: published_models.LCM_STEPS}
    record = manifest.scheduler
    if old == new or record.original_inference_steps != steps[old]:
        return record
    return record.model_copy(update={"original_inference_steps": steps[new]})


def _check_heads(source: str, adapter: MotionAdapter, graph: ir.Graph) -> None:
    """Raises ExportError if an attention of the graph has another number of heads than the adapter's.

    The shapes of the weights do not depend on the number of heads.
    """
    heads = _attention_heads(graph)
    for name, module in adapter.named_modules():
        if isinstance(module, Attention) and module.heads != heads.get(name):
            raise ExportError(
                "motion_adapter",
                f"{quoted(source)}: {name} has {module.heads} attention heads, in the bundle {heads.get(name, 'none')}",
                "export the bundle again",
            )


def _attention_heads(graph: ir.Graph) -> dict[str, int]:
    """Returns the number of heads of each attention by name: the third size of its reshape to [B, S, heads, d]."""
    heads = {}
    for node in graph:
        name, _, operator = (node.name or "").partition("/")
        if not name.endswith((".attn1", ".attn2")) or not operator.startswith("Reshape"):
            continue
        shape = node.inputs[1].producer() if node.inputs[1] is not None else None
        size = shape.inputs[2] if shape is not None and shape.op_type == "Concat" and len(shape.inputs) == 4 else None
        if size is not None and size.const_value is not None:
            heads[name] = int(size.const_value.numpy()[0])
    return heads


def check_standalone(temporal_norm: TemporalNorm, output: Path) -> None:
    """Checks the options of a graph of its own.

    Raises:
        ExportError: `temporal_norm` is not for such a graph, or `output` is not named `*.onnx`.
    """
    if temporal_norm not in ("frame", "clip"):
        raise ExportError("temporal_norm", f"{temporal_norm!r} is not for --standalone", "choose frame or clip")
    if output.suffix != ".onnx":
        reason = f"{quoted(str(output))} is not the name of a graph"
        raise ExportError("standalone", reason, "give a name that ends in .onnx")


def export_standalone(source: str, temporal_norm: TemporalNorm, output: Path) -> float:
    """Writes the motion modules as one graph with an input and an output per block; returns its largest error.

    Raises:
        ExportError: `temporal_norm` is unknown, `output` is not named `*.onnx` or cannot be written, the adapter cannot
            be loaded, or the graph differs from torch.
    """
    check_standalone(temporal_norm, output)
    module = MotionModules(load_motion_adapter(source), temporal_norm).eval().requires_grad_(False)
    spec = motion_module_spec([(name, block.proj_in.in_features) for name, block in module.blocks()])
    symbols = {str(size) for item in spec.inputs for size in item.shape if isinstance(size, str)}
    sizes = {name: 4 + index % 5 for index, name in enumerate(sorted(symbols))}
    inputs = spec.sample_inputs({**sizes, "frames": 3}, seed=1)
    with torch.no_grad():
        expected = module(*inputs)
    model = trace(module, spec, spec.sample_inputs(sizes, seed=0))
    clear_leftovers(output.parent, output.name)
    try:
        with staged_folder(output.parent, output.name) as folder:
            files = write(model, folder / output.name, lambda _: f"{output.stem}.weights")
            del module, model
            gc.collect()
            error = largest_error(open_session(folder / output.name), inputs, expected)
            check(spec.name, error, frames=False)
            for file in (*files, folder / output.name):
                file.replace(output.parent / file.name)
    except OSError as failure:
        raise ExportError("standalone", f"{str(output)!r} cannot be written: {reason_of(failure)}") from failure
    return error
