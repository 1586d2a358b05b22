"""Another motion module for an existing bundle, and motion modules as a graph of their own."""

import gc
import shutil
from pathlib import Path
from secrets import token_hex

import onnx_ir as ir
import torch

from ..runtime.errors import BundleError
from ..runtime.manifest import Manifest, read_manifest
from .check import ExportError, check, largest_error, open_session
from .checkpoints import load_motion_adapter
from .exporter import file_record, weights_file
from .graphs import MotionModules
from .onnx_file import TRANSPOSED, trace, write, write_tensors
from .plan import public_name
from .specs import motion_module_spec
from .temporal import TemporalNorm


def replace_motion_module(source: str, bundle: Path) -> Manifest:
    """Writes the motion-module weights of `bundle` anew from the adapter `source`; nothing else is touched.

    Raises:
        ExportError: the adapter has other shapes than the one that the bundle was exported with.
        BundleError: `bundle` is not a bundle.
    """
    manifest = read_manifest(bundle)
    graph = manifest.graphs["unet"]
    name = next((file for file in graph.weights if file.endswith(weights_file("unet", ".motion_modules."))), None)
    if name is None:
        raise BundleError(f"bundle: {str(bundle)!r} has no file of motion-module weights; export the bundle again")
    model = ir.load(bundle / graph.path)
    places = [
        (key, value.const_value)
        for key, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and str(value.const_value.location) == Path(name).name
    ]
    places.sort(key=lambda item: item[1].offset or 0)
    weights = load_motion_adapter(source).state_dict()
    if weights.keys() != {key for key, _ in places}:
        raise ExportError(f"--motion-adapter {source!r} has other layers than the bundle; export the bundle again")
    tensors = []
    for key, place in places:
        weight = weights[key].T if place.metadata_props.get(TRANSPOSED) else weights[key]
        if tuple(weight.shape) != tuple(place.shape):
            raise ExportError(
                f"--motion-adapter {source!r}: {key} has shape {tuple(weight.shape)}, the bundle's is "
                f"{tuple(place.shape)}; export the bundle again"
            )
        tensors.append(ir.Tensor(weight.contiguous().numpy()))
    del model
    part = bundle / f"{name}.part"
    try:
        write_tensors(part, tensors)
        changed = manifest.model_copy(
            update={
                "sources": {**manifest.sources, "motion_adapter": public_name(source)},
                "files": {**manifest.files, name: file_record(part)},
            }
        )
        part.replace(bundle / name)
        changed.write(bundle)
    except OSError as error:
        raise ExportError(f"--bundle {str(bundle)!r} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return changed


def export_standalone(source: str, temporal_norm: TemporalNorm, output: Path) -> float:
    """Writes the motion modules as one graph, an input and an output per block; returns its largest error.

    Raises:
        ExportError: the adapter cannot be loaded, or the graph differs from torch.
    """
    if temporal_norm not in ("frame", "clip"):
        raise ExportError(f"--temporal-norm {temporal_norm!r} is unknown; choose frame or clip")
    if output.suffix != ".onnx":
        raise ExportError(f"--standalone {str(output)!r}: name a file that ends in .onnx")
    module = MotionModules(load_motion_adapter(source), temporal_norm).eval().requires_grad_(False)
    spec = motion_module_spec([(name, block.proj_in.in_features) for name, block in module.blocks()])
    symbols = {str(size) for item in spec.inputs for size in item.shape if isinstance(size, str)}
    sizes = {name: 4 + index % 5 for index, name in enumerate(sorted(symbols))}
    inputs = spec.sample_inputs({**sizes, "frames": 3}, seed=1)
    with torch.no_grad():
        expected = module(*inputs)
    model = trace(module, spec, spec.sample_inputs(sizes, seed=0))
    staging = output.with_name(f".{output.name}-{token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        files = write(model, staging / output.name, lambda _: f"{output.stem}.weights")
        del module, model
        gc.collect()
        error = largest_error(open_session(staging / output.name), inputs, expected)
        check(spec.name, error, frames=False)
        for file in (*files, staging / output.name):
            file.replace(output.parent / file.name)
    except OSError as failure:
        raise ExportError(f"--standalone {str(output)!r} cannot be written: {failure.strerror or failure}") from failure
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return error
