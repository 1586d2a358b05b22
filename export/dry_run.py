"""Say what each source of an export is and what would be made of it, without writing anything."""

from collections.abc import Iterator
from pathlib import Path

from .embeddings import read_vectors
from .options import public_name
from .original_formats import describe
from .plan import ExportOptions, plan_jobs, read_parts
from .source_check import open_sources
from .sources import is_file, read_weights


def dry_run(options: ExportOptions) -> Iterator[str]:
    """Yields a line for each source, one for the sizes and schedule, and one for each graph.

    Everything is opened and checked as an export does before it writes the first graph.

    Raises:
        ExportError: a checkpoint cannot be loaded, or the parts do not fit together.
    """
    parts = read_parts(options)
    for name, source in _sources(options):
        yield f"{name} {Path(source).name if Path(source).exists() else source}: {_kind(name, source)}"
    for item in options.embeddings:
        inversion = read_vectors(item)
        count = f"{len(inversion.vectors)} vectors" if len(inversion.vectors) > 1 else "one vector"
        yield f"embedding {public_name(item.source)}: a textual inversion of {count}, in prompts {inversion.token!r}"
    if is_file(options.base):
        yield f"base_config {options.base_config}: tokenizer and settings of the base"
    yield from parts.choices
    sizes, scheduler = parts.sizes, parts.scheduler
    yield (
        f"clips: {sizes.width}x{sizes.height}, sides in multiples of {sizes.multiple}; "
        f"{sizes.frames} frames, at most {sizes.max_frames}; temporal norm {parts.temporal_norm}"
    )
    yield (
        f"schedule: LCM, {scheduler.original_inference_steps} original steps, beta_schedule {scheduler.beta_schedule}, "
        f"prediction_type {scheduler.prediction_type}"
    )
    graphs: list[str] = []
    open_sources(plan_jobs(parts), lambda graph, size: graphs.append(f"graph {graph}: {size / 1e6:.1f} MB of weights"))
    yield from graphs


def _sources(options: ExportOptions) -> Iterator[tuple[str, str]]:
    yield "base", options.base
    yield "motion_adapter", options.motion_adapter
    for kind, source in options.controlnets.items():
        yield f"controlnet_{kind}", source
    for name, other in (("vae", options.vae), ("tiny_decoder", options.tiny_decoder)):
        if other:
            yield name, other
    for lora in options.loras:
        yield "lora", lora.source


def _kind(name: str, source: str) -> str:
    if not is_file(source):
        return "a folder in diffusers format" if Path(source).is_dir() else "a name on the hub"
    weights = read_weights(name, source)
    kind = "weights in TAESD's own format" if name == "tiny_decoder" else describe(weights)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
    return f"{kind}, {len(weights.tensors)} tensors, {' and '.join(types)}"
