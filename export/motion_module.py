"""Replace the motion modules of a bundle, or export motion modules as a graph of their own."""

import gc
from contextlib import suppress
from pathlib import Path

import onnx_ir as ir
import torch
from diffusers import MotionAdapter
from diffusers.models.attention_processor import Attention

from ..runtime.errors import BundleError, reason_of
from ..runtime.format.manifest import Manifest, SchedulerRecord, read_manifest
from ..runtime.format.temporary_folders import clear_leftovers, staged_folder
from . import published_models
from .check import ExportError, check, largest_error, open_session
from .checkpoints import load_motion_adapter
from .exporter import file_record, weights_file
from .graph_specs import motion_module_spec
from .onnx_file import TRANSPOSED, trace, write, write_tensors
from .plan import public_name
from .sources import quoted
from .temporal_transformer import TemporalNorm
from .traced_modules import MotionModules


def replace_motion_module(source: str, bundle: Path) -> Manifest:
    """Replaces the motion-module weights of `bundle` by those of the adapter `source`, and updates the manifest.

    New files are written beside the old ones, and two renames at the end replace these. An error before the renames
    leaves the bundle unchanged.

    Raises:
        ExportError: the layers, shapes, heads or norms of the adapter differ from those of the exported one, or the
            bundle cannot be written.
        BundleError: `bundle` is not a bundle, or has no file of motion-module weights.
    """
    manifest = read_manifest(bundle)
    graph = manifest.graphs["unet"]
    name = next((file for file in graph.weights if file.endswith(weights_file("unet", ".motion_modules."))), None)
    if name is None:
        raise BundleError("bundle", f"{str(bundle)!r} has no file of motion-module weights", "export the bundle again")
    model = ir.load(bundle / graph.path)
    places = [
        (key, value.const_value)
        for key, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and str(value.const_value.location) == Path(name).name
    ]
    places.sort(key=lambda item: item[1].offset or 0)
    adapter = load_motion_adapter(source)
    _check_norms(source, adapter, manifest)
    weights = adapter.state_dict()
    if weights.keys() != {key for key, _ in places}:
        raise ExportError(
            "motion_adapter", f"{source!r} and the bundle have different layers", "export the bundle again"
        )
    tensors = []
    for key, place in places:
        weight = weights[key].T if place.metadata_props.get(TRANSPOSED) else weights[key]
        if tuple(weight.shape) != tuple(place.shape):
            raise ExportError(
                "motion_adapter",
                f"{source!r}: {key} has shape {tuple(weight.shape)}, in the bundle {tuple(place.shape)}",
                "export the bundle again",
            )
        tensors.append(ir.Tensor(weight.contiguous().numpy()))
    _check_heads(source, adapter, model.graph)
    del model
    part, manifest_part = bundle / f"{name}.part", bundle / "manifest.json.part"
    try:
        write_tensors(part, tensors)
        changed = manifest.model_copy(
            update={
                "sources": {**manifest.sources, "motion_adapter": public_name(source)},
                "scheduler": _schedule(source, adapter, manifest),
                "files": {**manifest.files, name: file_record(part)},
            }
        )
        changed.write_part(bundle)
        part.replace(bundle / name)
        manifest_part.replace(bundle / "manifest.json")
    except OSError as error:
        raise ExportError("bundle", f"{str(bundle)!r} cannot be written: {reason_of(error)}") from error
    finally:
        for path in (part, manifest_part):
            with suppress(OSError):
                path.unlink()
    return changed


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
                f"{source!r}: {name} has {module.heads} attention heads, in the bundle {heads.get(name, 'none')}",
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


def export_standalone(source: str, temporal_norm: TemporalNorm, output: Path) -> float:
    """Writes the motion modules as one graph with an input and an output per block; returns its largest error.

    Raises:
        ExportError: `temporal_norm` is unknown, `output` is not named `*.onnx` or cannot be written, the adapter cannot
            be loaded, or the graph differs from torch.
    """
    if temporal_norm not in ("frame", "clip"):
        raise ExportError("temporal_norm", f"{temporal_norm!r} is unknown", "choose frame or clip")
    if output.suffix != ".onnx":
        raise ExportError("standalone", f"{str(output)!r} is not the name of a graph", "give a name that ends in .onnx")
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
