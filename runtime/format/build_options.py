"""The options of `build`, their part in an engine's key, and the command that repeats a build."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..operating_system import quote_argument
from .clip_layout import ClipSize
from .manifest import Sizes

HARDWARE_COMPATIBILITY = ("none", "same-compute-capability", "ampere-plus")

COMMON_OPTIONS = frozenset({"precision", "check", "graphs"})
"""Options that every backend takes."""

NOT_IN_KEYS = ("width", "height", "frames", "keyframe_slots", "precision", "check", "graphs", "keep_source")
"""Options that are no flags of an engine's key: they give its shapes and precision, or have no effect on the engine."""

OnBuildProgress = Callable[[str, float], None]
"""Called with the current work of a build, in words, and the fraction that is done, 0 to 1."""

Flags = Mapping[str, bool | int | str]
"""Builder options as an engine's key holds them."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of `build`. Each backend supports some of them.

    Attributes:
        width: pixels; None takes the bundle's default.
        height: pixels; None takes the bundle's default.
        frames: frames of a clip; None takes the bundle's default.
        keyframe_slots: keyframes that the engines take, at most one for each frame; None takes the manifest's number.
        precision: a precision of the backend; None takes the best one for this machine.
        check: compare each graph's results with fp32 before accepting its engine.
        graphs: the graphs to build; empty for all. The set can be loaded once all its graphs have engines.
        optimization_level: 0 to 5; a higher level lets TensorRT search longer for faster kernels.
        aux_streams: streams besides the main one; 0 gives the simplest CUDA graph.
        workspace: scratch memory of the kernels in GiB; None allows all of the device's memory.
        tf32: allow fp32 products to round their inputs to TF32, which has the mantissa of fp16.
        fp16_sums: allow products of fp16 to be added in fp16: faster on GeForce, less exact.
        refit: allow the weights to be replaced later. This may cost speed.
        strip_weights: leave the weights out; loading the engine reads them from the bundle.
        version_compatible: the engine also runs on later releases of the same major version.
        hardware_compatibility: none, same-compute-capability or ampere-plus.
        compute_capabilities: such as 8.9 and 12.0; empty for all that the backend supports.
        transposed_upsampling: compute a doubling and its convolution as one transposed convolution: 4 products for
            each output instead of 9.
        keep_source: leave the typed ONNX graph, which the library compiled, beside each engine.

    Raises:
        InvalidRequest: no backend allows a value.
    """

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    keyframe_slots: int | None = None
    precision: str | None = None
    check: bool = True
    graphs: tuple[str, ...] = ()
    optimization_level: int = 3
    aux_streams: int = 0
    workspace: float | None = None
    tf32: bool = False
    fp16_sums: bool = False
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    compute_capabilities: tuple[str, ...] = ()
    transposed_upsampling: bool = False
    keep_source: bool = False

    def __post_init__(self) -> None:
        for name, high in (("optimization_level", 5), ("aux_streams", 16)):
            if not 0 <= getattr(self, name) <= high:
                raise InvalidRequest(name, f"{getattr(self, name)} is out of range", f"allowed are 0 to {high}")
        if self.workspace is not None and not 0 < self.workspace <= 1024:
            raise InvalidRequest("workspace", f"{self.workspace:g} is out of range", "give GiB above 0")
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise InvalidRequest(
                "hardware_compatibility",
                f"{self.hardware_compatibility!r} is unknown",
                f"allowed are {', '.join(HARDWARE_COMPATIBILITY)}",
            )

    def clip_size(self, sizes: Sizes) -> ClipSize:
        """The clip size to build for."""
        return ClipSize(
            width=sizes.width if self.width is None else self.width,
            height=sizes.height if self.height is None else self.height,
            frames=sizes.frames if self.frames is None else self.frames,
        )

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = ((item, getattr(self, item.name)) for item in fields(self))
        return {item.name: value for item, value in values if value != item.default}

    @property
    def sorted_capabilities(self) -> list[str]:
        """The compute capabilities, sorted and without duplicates."""
        return sorted(set(self.compute_capabilities), key=float)

    @property
    def flags(self) -> dict[str, bool | int | str]:
        """The options for an engine's key: every builder option that is not off."""
        options = asdict(self)
        for name in (*NOT_IN_KEYS, "compute_capabilities"):
            del options[name]
        flags = {name: value for name, value in options.items() if value is not None and value is not False}
        if "workspace" in flags:
            flags["workspace"] = f"{flags['workspace']:g} GiB"
        if self.compute_capabilities:
            flags["compute_capabilities"] = ", ".join(self.sorted_capabilities)
        return flags

    def command(self, bundle: Path, backend: str) -> str:
        """The command that builds a backend's engines with these options."""
        return build_command(bundle, backend, self.given)


def options_of_engine(
    precision: str | None, size: ClipSize | None, flags: Flags, keyframe_slots: int | None = None
) -> dict[str, Any]:
    """The options that differ from their defaults in an engine with these flags: the inverse of `BuildOptions.flags`.

    Nothing is checked, so that a command can be given for an index that was changed.
    """
    defaults = {item.name: item.default for item in fields(BuildOptions)}
    options = dict(size) if size is not None else {}
    if keyframe_slots is not None:
        options["keyframe_slots"] = keyframe_slots
    if precision is not None:
        options["precision"] = precision
    for name in (name for name in defaults if name in flags):
        value: Any = flags[name]
        if name == "workspace":
            value = str(value).removesuffix(" GiB")
        elif name == "compute_capabilities":
            value = str(value).split(", ")
        if value != defaults[name]:
            options[name] = value
    return options


def build_command(bundle: Path, backend: str, options: Mapping[str, Any]) -> str:
    """The command that builds a backend's engines.

    Args:
        bundle: the bundle's folder.
        backend: a name of `BACKENDS`.
        options: those of `BuildOptions` that differ from their defaults.
    """
    words = ["sparsectrl-lcm", "build", quote_argument(str(bundle)), "--backend", backend]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        match name:
            case "width":
                words += ["--size", f"{value}x{options['height']}"]
            case "height":
                continue
            case "keyframe_slots":
                words += ["--keyframes", str(value)]
            case "compute_capabilities":
                words += [word for each in value for word in ("--compute-capability", each)]
            case "graphs":
                words += [word for each in value for word in ("--graph", each)]
            case "check":
                words.append("--no-check")
            case _:
                text = f"{value:g}" if isinstance(value, float) else str(value)
                words += [option] if value is True else [option, text]
    return " ".join(words)
