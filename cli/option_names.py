"""Names the options of a command in errors, which name fields."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..runtime.errors import BackendError, BundleError, InvalidRequest, SparseCtrlLcmError

_OPTIONS = {
    "compute_capabilities": "--compute-capability",
    "control_guidance_end": "--control-end",
    "control_guidance_start": "--control-start",
    "controlnet_rgb": "--rgb",
    "controlnet_scribble": "--scribble",
    "graphs": "--graph",
    "guidance_scale": "--guidance",
    "keyframe_slots": "--keyframes",
    "keyframes": "--keyframe",
    "num_frames": "--frames",
    "num_inference_steps": "--steps",
}
"""Options that have another name than the field, in a command without an option of the field's name."""
_PARTS_OF_OPTIONS = {
    "height": ("--size", "--warm"),
    "keyframe index": ("--keyframe",),
    "width": ("--size", "--warm"),
}
"""Fields that are one part of an option's value, and the options that have it: each command has at most one of them."""
_PARTS = ("backend", "build", "bundle", "refit")
"""Fields of BackendError and BundleError that mean the part itself, not the option of that name."""


@contextmanager
def options_named(options: Collection[str]) -> Iterator[None]:
    """Raises the errors of a command with the name of its option instead of the field.

    Args:
        options: of the command, such as `--steps`.

    Raises:
        SparseCtrlLcmError: for any error of the package, and if the memory is full.
    """
    try:
        yield
    except SparseCtrlLcmError as error:
        raise SparseCtrlLcmError(_name(error, options), error.reason, error.remedy) from error
    except MemoryError:
        remedy = "choose a smaller --size or fewer --frames" if {"--size", "--frames"} <= set(options) else ""
        raise SparseCtrlLcmError("", "out of memory", remedy) from None


def _name(error: SparseCtrlLcmError, options: Collection[str]) -> str:
    field = error.field
    of_part = isinstance(error, BackendError | BundleError) and not isinstance(error, InvalidRequest)
    if of_part and field in _PARTS:
        return field
    for option in _PARTS_OF_OPTIONS.get(field, ()):
        if option in options:
            return f"{option} {field.split()[-1]}"
    candidates = (f"--{field.replace('_', '-')}", _OPTIONS.get(field, ""))
    return next((option for option in candidates if option in options), field)
