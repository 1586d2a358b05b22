"""Builds the engines of any backend: the one entry point."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from ..runtime.backends import REFERENCE, Backend, availability, find_backend
from ..runtime.errors import BackendError, InvalidRequest
from ..runtime.format.build_options import COMMON_OPTIONS, BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.clip_layout import ClipSize
from ..runtime.format.engine_keys import EngineIndex
from ..runtime.format.engine_sets import EngineSet, find_set, set_name, writable_engine_folder
from ..runtime.format.manifest import MAX_SIDE, Manifest

DEFAULTS = BuildOptions()


class Builder(Protocol):
    """The interface of a module of `engine` that builds a backend's engines."""

    def build(self, bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
        """Writes a complete set of engines, or keeps the finished ones for the next build."""


def build(
    bundle: Path | Bundle,
    backend: str,
    options: BuildOptions = DEFAULTS,
    on_progress: OnBuildProgress = lambda text, fraction: None,
) -> EngineSet:
    """Builds a set of engines. It replaces a set of the same size and precision once it is complete.

    A build that ends early, even by SIGKILL, keeps its finished engines: the next build with the same options goes on
    with the missing ones.

    Args:
        bundle: a bundle or its folder.
        backend: a name of `BACKENDS`.
        options: what to build.
        on_progress: called with the current step and the fraction of the build that is done, 0 to 1.

    Returns:
        The set. If `options.graphs` leaves graphs without an engine, they are in `index.missing`, and there is no such
        set to load yet.

    Raises:
        BundleError: `bundle` is not a bundle.
        InvalidRequest: the backend is unknown, or does not accept an option or its value.
        BackendError: a library or a GPU is missing, a graph cannot be built or is not exact enough, or the engines
            cannot be written.
        KeyboardInterrupt: the build was stopped.
    """
    record = check_build(backend, options)
    builder = cast(Builder, import_module(f".{record.builder}", __package__))
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if "width" in record.build_options:
        check_size(opened.manifest, options.clip_size(opened.manifest.sizes))
        check_keyframe_slots(options.keyframe_slots, options.clip_size(opened.manifest.sizes))
    index = builder.build(opened, backend, options, on_progress)
    name = set_name(index.precision, index.size)
    if index.missing:
        return EngineSet(opened.folder, writable_engine_folder(opened.folder, backend) / name, index)
    built = find_set(opened.folder, backend, name)
    assert built is not None
    return built


def check_build(backend: str, options: BuildOptions) -> Backend:
    """Checks all that can be checked before a bundle is read, and returns the backend's record.

    Raises:
        InvalidRequest: the backend does not take an option or the precision.
        BackendError: the backend is unknown, or a library that the build needs is not installed.
    """
    record = find_backend(backend)
    for name in options.given:
        if name not in COMMON_OPTIONS and name not in record.build_options:
            raise InvalidRequest("size" if name in ("width", "height") else name, f"not an option of {backend}")
    if options.precision not in (None, *record.precisions):
        allowed = ", ".join(record.precisions)
        raise InvalidRequest("precision", f"{options.precision!r} is not one of {backend}", f"allowed are {allowed}")
    if record.build_needs_library and (error := availability(backend).error) is not None:
        raise error
    if not find_spec("onnx_ir"):
        raise BackendError("build", "onnx-ir is not installed", "run: pip install onnx-ir")
    if (error := availability(REFERENCE).error) is not None:
        raise BackendError("build", error.reason, error.remedy)
    return record


def check_size(manifest: Manifest, size: ClipSize) -> None:
    """Raises InvalidRequest if a bundle does not make clips of this size."""
    sizes = manifest.sizes
    high = MAX_SIDE - MAX_SIDE % sizes.multiple
    for side in (size.width, size.height):
        if side % sizes.multiple or not sizes.multiple <= side <= MAX_SIDE:
            raise InvalidRequest(
                "size",
                f"{size.width}x{size.height} is not allowed",
                f"give multiples of {sizes.multiple} from {sizes.multiple} to {high}",
            )
    if not 1 <= size.frames <= sizes.max_frames:
        raise InvalidRequest("frames", f"{size.frames} is out of range", f"allowed are 1 to {sizes.max_frames}")


def check_keyframe_slots(slots: int | None, size: ClipSize) -> None:
    """Raises InvalidRequest if clips of this size cannot have so many keyframes."""
    if slots is not None and not 1 <= slots <= size.frames:
        raise InvalidRequest("keyframe_slots", f"{slots} is out of range", f"allowed are 1 to {size.frames}")
