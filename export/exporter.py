"""Export checkpoints to a bundle, one graph at a time. Each graph is compared with torch as soon as it is written."""

import gc
import hashlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from ..runtime.errors import first_line, reason_of
from ..runtime.format.manifest import FORMAT, VERSION, FileRecord, GraphRecord, Manifest, TemporalNorm
from ..runtime.format.temporary_folders import complete_folder, is_vacant
from . import checkpoints, graph_specs
from .check import ExportError, check, largest_error, open_session
from .onnx_file import trace, write
from .plan import ExportOptions, Job, plan_jobs, read_parts
from .source_check import open_sources
from .sources import quoted
from .tokenizer import write_tokenizer

KEYFRAME_SLOTS = 3

OnGraph = Callable[[str, int, int], None]
"""Called with the name of the graph in progress, the number of finished graphs and the number of all graphs."""


OnChoice = Callable[[str], None]
"""Called with a line for each setting that the export takes by itself because of what a source is."""


def export_bundle(
    options: ExportOptions, output: Path, on_graph: OnGraph | None = None, on_choice: OnChoice | None = None
) -> Manifest:
    """Writes a bundle to the folder `output`, which gets its files only when all of them are complete.

    Raises:
        ExportError: an option is not allowed, `output` is not empty or cannot be written, a checkpoint cannot be
            loaded, the parts do not fit together, or a graph differs from torch.
    """
    if options.temporal_norm not in (None, *get_args(TemporalNorm)):
        raise ExportError("temporal_norm", f"{options.temporal_norm!r} is unknown", "choose frame, clip or resnet-clip")
    check_output(output)
    try:
        with complete_folder(output) as folder:
            manifest = _Exporter(options, folder, on_graph or (lambda *_: None), on_choice or (lambda _: None)).run()
    except OSError as error:
        raise ExportError("output", f"{str(output)!r} cannot be written: {reason_of(error)}") from error
    return manifest


def check_output(output: Path) -> None:
    """Raises ExportError if `output` is not a new or empty folder, or cannot be read."""
    try:
        vacant = is_vacant(output)
    except OSError as error:
        raise ExportError("output", f"{quoted(str(output))} cannot be read: {reason_of(error)}") from error
    if not vacant:
        raise ExportError("output", f"{quoted(str(output))} exists and is not an empty folder", "give a new folder")


class _Exporter:
    def __init__(self, options: ExportOptions, folder: Path, on_graph: OnGraph, on_choice: OnChoice) -> None:
        self.options = options
        self.folder = folder
        self.on_graph = on_graph
        self.on_choice = on_choice
        self.loaded: dict[str, nn.Module] = {}
        (folder / "onnx").mkdir()

    def run(self) -> Manifest:
        options = self.options
        parts = read_parts(options)
        for choice in parts.choices:
            self.on_choice(choice)
        tokenizer = checkpoints.load_tokenizer(options.base, options.loading, options.embeddings)
        write_tokenizer(tokenizer, parts.max_tokens, self.folder / "tokenizer.json")
        jobs = plan_jobs(parts)
        self.loaded = open_sources(jobs)
        records = {}
        for index, job in enumerate(sorted(jobs, key=lambda job: job.spec.name not in self.loaded)):
            self.on_graph(job.spec.name, index, len(jobs))
            records[job.spec.name] = self.guarded(job)
        self.on_graph("done", len(jobs), len(jobs))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            created_by=f"sparsectrl-lcm {package_version()}",
            sources=options.sources(),
            sizes=parts.sizes,
            scheduler=parts.scheduler,
            temporal_norm=parts.temporal_norm,
            max_tokens=parts.max_tokens,
            text_layers=parts.text_layers,
            keyframe_slots=KEYFRAME_SLOTS,
            tokenizer="tokenizer.json",
            graphs={job.spec.name: records[job.spec.name] for job in jobs},
            files={
                path.relative_to(self.folder).as_posix(): file_record(path)
                for path in sorted(self.folder.rglob("*"))
                if path.is_file()
            },
        )
        manifest.write(self.folder)
        return manifest

    def guarded(self, job: Job) -> GraphRecord:
        """Exports a graph; reports any failure of torch or ONNX Runtime as an ExportError of one line."""
        try:
            return self.export(job)
        except (ExportError, OSError, MemoryError):
            raise
        except Exception as error:
            raise ExportError("export", f"graph {job.spec.name!r} cannot be written: {first_line(error)}") from error

    def export(self, job: Job) -> GraphRecord:
        """Traces, writes and checks one graph.

        Memory holds the weights once: torch's copy is freed before the check maps the written file.
        """
        spec = job.spec
        module = self.loaded.pop(spec.name) if spec.name in self.loaded else job.build()
        module = module.eval().requires_grad_(False)
        checks = job.check_inputs()
        with torch.no_grad():
            expected = [_as_tuple(module(*inputs)) for inputs in checks]
        model = trace(module, spec, job.trace_inputs())
        path = self.folder / "onnx" / f"{spec.name}.onnx"
        files = write(model, path, lambda name: weights_file(spec.name, name))
        del module, model
        gc.collect()
        session = open_session(path)
        error = max(largest_error(session, inputs, outputs) for inputs, outputs in zip(checks, expected, strict=True))
        check(spec.name, error, frames=expected[0][0].dtype == torch.uint8)
        return GraphRecord(
            path=f"onnx/{path.name}",
            weights=tuple(f"onnx/{file.name}" for file in files),
            inputs=graph_specs.tensor_records([(item.name, item.shape) for item in spec.inputs], checks[0]),
            outputs=graph_specs.tensor_records(list(spec.outputs), expected[0]),
            max_error=error,
        )


def weights_file(graph: str, weight: str) -> str:
    """Returns the name of a weight's external-data file: the UNet's motion modules have a file of their own."""
    motion = graph == "unet" and ".motion_modules." in weight
    return f"{graph}.motion.weights" if motion else f"{graph}.weights"


def file_record(path: Path) -> FileRecord:
    """Returns the SHA-256 checksum and the size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size)


def package_version() -> str:
    """Returns the version of this package, or `unknown` if it is not installed."""
    try:
        return version("sparsectrl-lcm")
    except PackageNotFoundError:
        return "unknown"


def _as_tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
