"""What a build may be asked for."""

from dataclasses import asdict, dataclass

from ...runtime.errors import InvalidRequest
from ...runtime.format.engine_sets import ClipSize
from ...runtime.format.manifest import MAX_SIDE, Manifest
from ..rewrites.types import PRECISIONS

HARDWARE_COMPATIBILITY = ("none", "same-compute-capability", "ampere-plus")


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """Options of TensorRT's builder.

    Attributes:
        precision: fp16, bf16 or fp32; stands in the graphs.
        optimization_level: 0 to 5; how long the builder looks for faster kernels.
        aux_streams: streams besides the main one; 0 makes the simplest CUDA graph.
        workspace: GiB that kernels may take to work in; None leaves the device's memory as the bound.
        tf32: whether products of what is in fp32 may round their inputs to TF32, which has the mantissa of fp16.
        refit: whether weights can be replaced later. It may cost speed.
        strip_weights: leave the weights out; they are read from the bundle when the engine is loaded.
        version_compatible: the engine runs on every release of the same major version.
        hardware_compatibility: none, same-compute-capability or ampere-plus.
        compute_capabilities: for TensorRT-RTX, as 8.9 and 12.0; empty for all that it supports.
    """

    precision: str = "fp16"
    optimization_level: int = 3
    aux_streams: int = 0
    workspace: float | None = None
    tf32: bool = False
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidRequest("precision", f"{self.precision!r} is unknown", f"allowed are {', '.join(PRECISIONS)}")
        if not 0 <= self.optimization_level <= 5:
            raise InvalidRequest(
                "optimization_level", f"{self.optimization_level} is out of range", "allowed are 0 to 5"
            )
        if not 0 <= self.aux_streams <= 16:
            raise InvalidRequest("aux_streams", f"{self.aux_streams} is out of range", "allowed are 0 to 16")
        if self.workspace is not None and not 0 < self.workspace <= 1024:
            raise InvalidRequest("workspace", f"{self.workspace:g} is out of range", "give GiB above 0")
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise InvalidRequest(
                "hardware_compatibility",
                f"{self.hardware_compatibility!r} is unknown",
                f"allowed are {', '.join(HARDWARE_COMPATIBILITY)}",
            )

    @property
    def sorted_capabilities(self) -> list[str]:
        """The compute capabilities, each once and in order."""
        return sorted(set(self.compute_capabilities), key=float)

    @property
    def flags(self) -> dict[str, bool | int | str]:
        """What enters the engine's key: all that is not off."""
        options = asdict(self)
        del options["precision"], options["compute_capabilities"]
        flags = {name: value for name, value in options.items() if value is not None and value is not False}
        if "workspace" in flags:
            flags["workspace"] = f"{flags['workspace']:g} GiB"
        if self.compute_capabilities:
            flags["compute_capabilities"] = ", ".join(self.sorted_capabilities)
        return flags


def check_size(manifest: Manifest, size: ClipSize) -> None:
    """Raises InvalidRequest where a clip of this size cannot be made."""
    sizes = manifest.sizes
    for side in (size.width, size.height):
        if side % sizes.multiple or not sizes.multiple <= side <= MAX_SIDE:
            raise InvalidRequest(
                "size",
                f"{size.width}x{size.height} is not allowed",
                f"give multiples of {sizes.multiple} from {sizes.multiple} to {MAX_SIDE - MAX_SIDE % sizes.multiple}",
            )
    if not 1 <= size.frames <= sizes.max_frames:
        raise InvalidRequest("frames", f"{size.frames} is out of range", f"allowed are 1 to {sizes.max_frames}")
