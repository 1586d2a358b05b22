"""Replace weights of a bundle by their names. The graphs stay as they are: nothing is traced again."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..runtime.errors import BundleError, reason_of
from ..runtime.format.bundle import bundle_folder
from ..runtime.format.manifest import FileRecord, GraphRecord, Manifest, SchedulerRecord, read_manifest
from ..runtime.format.replacement import only_replacement, replace_files
from ..runtime.format.temporary_folders import clear_leftovers, complete_folder, staged_folder
from ..runtime.format.weights import read_weight
from .check import ExportError
from .exporter import check_output, file_record
from .onnx_file import TRANSPOSED, write_tensors
from .sources import quoted

AGAIN = "export the bundle again"


@dataclass(slots=True)
class Swap:
    """A bundle that gets other weights.

    Attributes:
        folder: of the bundle.
        manifest: of the bundle.
        staged: the folder for its new files; None if nothing is to be written.
        files: records of the new files.
        graphs: new records of graphs.
        sources, scheduler: those of the manifest, to be changed by the caller.
        report: a line for each file of weights.
    """

    folder: Path
    manifest: Manifest
    staged: Path | None
    files: dict[str, FileRecord] = field(default_factory=dict)
    graphs: dict[str, GraphRecord] = field(default_factory=dict)
    sources: dict[str, str] = field(init=False)
    scheduler: SchedulerRecord = field(init=False)
    report: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sources = dict(self.manifest.sources)
        self.scheduler = self.manifest.scheduler

    def weights(self, graph: str, file: str) -> list[tuple[str, ir.ExternalTensor]]:
        """Returns the weights in a file of a graph with their places, in their order.

        Raises:
            BundleError: the graph cannot be read.
        """
        path = self.folder / self.manifest.graphs[graph].path
        try:
            initializers = ir.load(path).graph.initializers
        except Exception as error:
            raise BundleError("bundle", f"cannot read {str(path)!r}: {error}"[:190], AGAIN) from None
        places = [
            (name, value.const_value)
            for name, value in initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
            and str(value.const_value.location) == PurePosixPath(file).name
        ]
        return sorted(places, key=lambda place: place[1].offset or 0)

    def read(self, file: str, place: ir.ExternalTensor) -> torch.Tensor:
        """Returns a weight of the bundle, as its checkpoint has it."""
        values = read_weight(self.folder / file, place.dtype.numpy(), place.offset or 0, place.shape.numpy())
        weight = torch.from_numpy(values)
        return weight.T if place.metadata_props.get(TRANSPOSED) else weight

    def replace(
        self, graph: str, file: str, field: str, source: str, weights: Mapping[str, torch.Tensor], same: bool = False
    ) -> None:
        """Replaces the weights in a file of a graph.

        Args:
            graph: name of the graph.
            file: one of its files of weights.
            field: of errors.
            source: where the weights come from, for errors.
            weights: by their names in the checkpoint; there may be others.
            same: whether the weights must be those of the bundle but for LoRAs, which leave the norms alone.

        Raises:
            ExportError: a weight is missing, has another shape or values that are not finite, or the norms differ.
        """
        places = self.weights(graph, file)
        for name, place in places:
            if name not in weights:
                raise ExportError(field, f"{quoted(source)} and the bundle have different layers: no {name}", AGAIN)
            shape, needed = tuple(weights[name].shape), tuple(place.shape)
            if (shape[::-1] if place.metadata_props.get(TRANSPOSED) else shape) != needed:
                reason = f"{quoted(source)}: {name} has shape {shape}, in the bundle {needed}"
                raise ExportError(field, reason, AGAIN)
            norm = same and len(needed) == 1 and "norm" in name
            if norm and not torch.equal(self.read(file, place), weights[name].detach()):
                reason = f"{quoted(source)} is not what the bundle was exported from: {name} differs"
                raise ExportError(field, reason, f"give its {field}")
            if not torch.isfinite(weights[name]).all():
                cause = "with its LoRAs, " if same else ""
                raise ExportError(field, f"{quoted(source)}: {cause}{name} has values that are NaN or infinite"[:190])
        size = self.manifest.files[file].bytes
        self.report.append(f"{file}: {len(places)} weights, {size / 1e6:.1f} MB")
        if self.staged is None:
            return
        path = self.staged / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, [_ordered(weights[name], place) for name, place in places])
        self.files[file] = file_record(path)

    def changed(self) -> Manifest:
        """Returns the manifest of the bundle with its new weights."""
        return self.manifest.model_copy(
            update={
                "sources": self.sources,
                "scheduler": self.scheduler,
                "trained_for": None,
                "files": self.manifest.files | self.files,
                "graphs": self.manifest.graphs | self.graphs,
            }
        )


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters and buffers of a model, also those that its checkpoint leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _ordered(weight: torch.Tensor, place: ir.ExternalTensor) -> ir.TensorProtocol:
    """Returns a weight as its graph takes it; it is copied only when it is written."""

    def values() -> ir.Tensor:
        taken = weight.detach().T if place.metadata_props.get(TRANSPOSED) else weight.detach()
        return ir.Tensor(np.ascontiguousarray(taken.numpy().astype(place.dtype.numpy(), copy=False)))

    return ir.LazyTensor(values, dtype=place.dtype, shape=ir.Shape(place.shape))


@contextmanager
def open_swap(bundle: Path, output: Path | None = None, *, dry_run: bool = False) -> Iterator[Swap]:
    """A bundle whose weights the block replaces. They count when the block has ended without an error.

    Args:
        bundle: the bundle's folder.
        output: a new or empty folder that gets the bundle with its new weights; None changes `bundle`.
        dry_run: whether everything is checked and nothing written.

    Raises:
        BundleError: `bundle` is not a bundle.
        ExportError: a folder cannot be written, or `output` is not empty.
    """
    folder = bundle_folder(bundle)
    if output is None and folder != bundle:
        raise ExportError("bundle", f"the files of {quoted(str(bundle))} are links, as in a hub's cache", "give -o")
    if output is not None:
        check_output(output)
    manifest = read_manifest(folder)
    if dry_run:
        yield Swap(folder, manifest, None)
        return
    try:
        with complete_folder(output) if output else _folder_in(folder) as staged:
            swap = Swap(folder, manifest, staged)
            yield swap
            swap.changed().write(staged)
            with only_replacement(folder) if output is None else nullcontext():
                _finish(swap, staged, output)
    except OSError as error:
        field, place = ("output", output) if output else ("bundle", folder)
        raise ExportError(field, f"{quoted(str(place))} cannot be written: {reason_of(error)}") from error


def _folder_in(bundle: Path) -> AbstractContextManager[Path]:
    """A temporary folder in the bundle. Those that killed processes left are removed."""
    clear_leftovers(bundle, "swap")
    return staged_folder(bundle, "swap")


def _finish(swap: Swap, staged: Path, output: Path | None) -> None:
    """Moves the new files into the bundle; for an `output`, adds copies of the other files to them.

    Raises:
        ExportError: another process has changed the bundle meanwhile.
    """
    folder, manifest = swap.folder, swap.manifest
    if output is not None:
        _copy_others(folder, manifest, staged)
    if read_manifest(folder) != manifest:
        raise ExportError("bundle", f"{quoted(str(folder))} was changed meanwhile", "run the command again")
    if output is None:
        replace_files(staged, folder)


def _copy_others(folder: Path, manifest: Manifest, staged: Path) -> None:
    """Copies the files that stay. Hard links would be smaller, but onnx-ir refuses weights that have several."""
    for name in manifest.files:
        target = staged / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, target)
