"""Engines beside a bundle's portable graphs: where they lie, and the key without which none is loaded.

One set of engines serves one size (or any) in one precision, and lies in a folder of its own with an index:

    engines/<backend>/<set>/engines.json, unet.engine, ...
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError, model_validator

from ..errors import BackendError
from .checksums import first_difference, user_cache
from .manifest import FileRecord, Manifest, Record, RelativePath, resolve_shape

if TYPE_CHECKING:
    from ..gpu.device import Device

INDEX = "engines.json"
ENGINE_DECODE_PIXELS = 8 * 512 * 512
"""Pixels that an engine decodes at a time; bounds the memory of the decoder."""
CONVERSION = 3
"""How portable graphs become those of engines; counts up with every change that makes other engines."""
ANY_DEVICE = "any"
"""The device of engines that are bound to none."""


class ClipSize(Record):
    """The size that a set of engines was built for."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


class EngineSpec(Record):
    """All that an engine depends on; its SHA-256 is the engine's key."""

    graph: str
    graph_sha256: tuple[str, ...]
    """Checksums of the ONNX graph and its external data."""
    conversion: int = CONVERSION
    shapes: dict[str, tuple[int, ...]]
    """Static shapes of the inputs; empty where the engine takes any."""
    precision: str
    flags: dict[str, bool | int | str]
    """Options of the builder."""
    backend: str
    version: str
    """Version of the backend that built it; with a `+` it also runs on later ones of the same major version."""
    device: str
    """What it runs on: a device's name and compute capability, a class of devices, or any."""

    def key(self) -> str:
        """SHA-256 over all fields."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class EngineRecord(Record):
    """One engine of a set."""

    key: str
    spec: EngineSpec
    path: RelativePath
    files: dict[RelativePath, FileRecord]
    """The engine's file, and what lies beside it."""
    report: dict[str, Any]
    """What the build measured: errors against fp32, seconds, layers by type."""

    @model_validator(mode="after")
    def _has_a_checksum(self) -> Self:
        if self.path not in self.files:
            raise ValueError("the engine has no checksum")
        return self


class EngineIndex(Record):
    """What lies in the folder of a set."""

    format: Literal["sparsectrl-lcm-engines-1"] = "sparsectrl-lcm-engines-1"
    backend: str
    precision: str
    size: ClipSize | None = None
    """None where the engines take any size."""
    engines: dict[str, EngineRecord]


@dataclass(frozen=True, slots=True)
class EngineSet:
    """A folder of engines and what its index says."""

    bundle: Path
    folder: Path
    index: EngineIndex

    def open(
        self,
        manifest: Manifest,
        graph: str,
        version: str,
        device: str = ANY_DEVICE,
        inputs: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Path:
        """The file of a graph's engine, if it may be loaded here.

        Args:
            manifest: the bundle's.
            graph: name of the graph.
            version: version of the backend that is to load it.
            device: what the engine has to be bound to.
            inputs: the shapes that it has to be built for; None for any.

        Raises:
            BackendError: the engine is of another bundle, version or device, or is damaged; names the command that
                builds it anew.
        """
        record = self.index.engines.get(graph)
        if record is None:
            raise self._refuse(graph, "is missing")
        wanted = record.spec.model_copy(
            update={
                "graph": graph,
                "conversion": CONVERSION,
                "graph_sha256": graph_checksums(manifest, graph),
                "backend": self.index.backend,
                "precision": self.index.precision,
                "version": version,
                "device": device,
                "shapes": dict(inputs or {}),
            }
        )
        if record.spec.conversion != wanted.conversion:
            raise self._refuse(graph, "was built by another release of sparsectrl-lcm")
        if record.spec.graph_sha256 != wanted.graph_sha256:
            raise self._refuse(graph, "was built from another bundle")
        if record.spec.version != version:
            raise self._refuse(graph, f"was built by version {record.spec.version}, here is {version}")
        if record.spec.device != device:
            raise self._refuse(graph, f"was built for {record.spec.device}, here is {device}", other_device=True)
        if record.spec.shapes != wanted.shapes:
            raise self._refuse(graph, "was built for other shapes")
        if record.spec != wanted or record.key != wanted.key():
            raise self._refuse(graph, "has another key than its index says")
        if difference := first_difference(self.folder, record.files):
            raise self._refuse(graph, difference[1])
        return self.folder / record.path

    def fault(self, manifest: Manifest, graph: str) -> str | None:
        """Why an engine cannot be loaded even where it was built for; None if it can."""
        spec = self.index.engines[graph].spec
        try:
            self.open(manifest, graph, spec.version, spec.device, spec.shapes)
        except BackendError as error:
            return str(error).split(";", maxsplit=1)[0].removeprefix("backend: the ")
        return None

    def _refuse(self, graph: str, reason: str, other_device: bool = False) -> BackendError:
        index = self.index
        record = index.engines.get(graph)
        flags = dict(record.spec.flags) if record else {}
        if other_device:  # what excluded it must not do so again
            flags.pop("compute_capabilities", None)
            flags.pop("hardware_compatibility", None)
        reason = f"engine of {graph!r} {reason}"
        return refusal(self.bundle, index.backend, index.precision, index.size, reason, flags)


def static_shapes(manifest: Manifest, graph: str, size: ClipSize) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs and outputs in an engine of one size.

    The batch is one prompt: with guidance an engine runs twice, so that one set of weights and activations serves
    both, and up to 704x704 pixels no attention has more than 65,535 rows of batch and heads. SparseCtrl and the VAE's
    encoder take all keyframe slots, the decoder a part of the frames.
    """
    sizes, slots = manifest.sizes, manifest.keyframe_slots
    dimensions = {
        "batch": 1,
        "frames": size.frames,
        "height": size.height,
        "width": size.width,
        "latent_height": size.height // sizes.vae_scale_factor,
        "latent_width": size.width // sizes.vae_scale_factor,
        "distinct_frames": slots + 1,
        "images": slots if graph == "vae_encoder" else decode_frames(manifest, size),
    }
    record = manifest.graphs[graph]
    return {item.name: resolve_shape(item.shape, dimensions) for item in (*record.inputs, *record.outputs)}


def decode_frames(manifest: Manifest, size: ClipSize) -> int:
    """Frames that an engine decodes at a time: as many as fit into the bound, in parts that begin at aligned places."""
    sizes, pixels = manifest.sizes, size.height * size.width
    latents = sizes.latent_channels * pixels // sizes.vae_scale_factor**2
    parts = [count for count in range(1, size.frames + 1) if not size.frames % count]
    aligned = [
        count for count in parts if count == size.frames or not (4 * count * latents % 256 or 3 * count * pixels % 256)
    ]
    return max((count for count in aligned if count * pixels <= ENGINE_DECODE_PIXELS), default=aligned[0])


def device_scope(backend: str, device: "Device | None", flags: Mapping[str, Any]) -> str:
    """What an engine with these options is bound to: the device, a class that it belongs to, or any."""
    if backend == "tensorrt-rtx":
        capabilities = str(flags.get("compute_capabilities", ""))
        if device is not None and capabilities and device.compute_capability not in capabilities.split(", "):
            return str(device)
        return capabilities or ANY_DEVICE
    assert device is not None
    level = flags.get("hardware_compatibility", "none")
    if level == "ampere-plus" and float(device.compute_capability) >= 8:
        return "compute capability 8.0 and above"
    if level == "same-compute-capability":
        return f"compute capability {device.compute_capability}"
    return str(device)


def version_scope(version: str, flags: Mapping[str, Any], built: str | None = None) -> str:
    """The version that an engine with these options is bound to.

    Args:
        version: the backend's here.
        flags: options of the builder.
        built: what the engine's record says; None where it is being built.
    """
    if not flags.get("version_compatible"):
        return version
    if built is None:
        return f"{version}+"
    here, there = (_numbers(text.removesuffix("+")) for text in (version, built))
    return built if here[:1] == there[:1] and here >= there else version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def graph_checksums(manifest: Manifest, graph: str) -> tuple[str, ...]:
    """Checksums of a graph and its external data."""
    record = manifest.graphs[graph]
    return tuple(manifest.files[name].sha256 for name in (record.path, *record.weights))


def refusal(
    bundle: Path,
    backend: str,
    precision: str | None,
    size: ClipSize | None,
    reason: str,
    flags: Mapping[str, bool | int | str] | None = None,
) -> BackendError:
    """An error that ends with the command that builds a set of engines."""
    command = f"sparsectrl-lcm build {shlex.quote(str(bundle))} --backend {backend}"
    if size is not None:
        command += f" --size {size.width}x{size.height} --frames {size.frames}"
    if precision is not None and backend != "onnxruntime":
        command += f" --precision {precision}"
    for option, value in (flags or {}).items():
        command += _option(option, value)
    return BackendError("backend", f"the {backend} {reason}", f"run: {command}")


_DEFAULTS: Mapping[str, bool | int | str] = {
    "optimization_level": 3,
    "aux_streams": 0,
    "hardware_compatibility": "none",
}


def _option(name: str, value: bool | int | str) -> str:
    """An option of the builder on the command line; empty where it is the default."""
    if _DEFAULTS.get(name) == value:
        return ""
    if name == "compute_capabilities":
        return "".join(f" --compute-capability {each}" for each in str(value).split(", "))
    argument = "" if value is True else f" {str(value).removesuffix(' GiB')}"
    return f" --{name.replace('_', '-')}{argument}"


def engine_folders(bundle: Path, backend: str) -> tuple[Path, Path]:
    """Where engines may lie: in the bundle, or, where that is read-only, in the user's cache folder."""
    return bundle / "engines" / backend, user_cache(bundle, "engines") / backend


def writable_engine_folder(bundle: Path, backend: str) -> Path:
    """The first of `engine_folders` that can be written; it is made."""
    inside, outside = engine_folders(bundle, backend)
    try:
        inside.mkdir(parents=True, exist_ok=True)
        writable = os.access(inside, os.W_OK)
    except OSError:
        writable = False
    folder = inside if writable else outside
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def set_name(precision: str, size: ClipSize | None = None) -> str:
    """The folder of a set: `512x512x16-fp16`, or `fp32` where it takes any size."""
    return f"{size}-{precision}" if size else precision


def parse_set_name(name: str) -> tuple[ClipSize | None, str | None]:
    """Size and precision of a set by the name of its folder; None where it has none."""
    parts = re.fullmatch(r"(?:(\d+)x(\d+)x(\d+)-)?(fp16|bf16|fp32|int8)", name)
    if parts is None:
        return None, None
    width, height, frames, precision = parts.groups()
    if width is None:
        return None, precision
    return ClipSize(width=int(width), height=int(height), frames=int(frames)), precision


def write_index(folder: Path, index: EngineIndex) -> None:
    """Writes `engines.json` into the folder of a set."""
    (folder / INDEX).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")


def find_set(bundle: Path, backend: str, name: str) -> EngineSet | None:
    """A set of engines, or None where none was built.

    Raises:
        BackendError: its index cannot be read.
    """
    paths = [folder / name / INDEX for folder in engine_folders(bundle, backend)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return None
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)  # a read-only bundle may bring engines of its own
    size, precision = parse_set_name(name)
    try:
        index = EngineIndex.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise refusal(bundle, backend, precision, size, f"index {str(path)!r} cannot be read") from None
    if (index.backend, index.size, index.precision) != (backend, size, precision):
        raise refusal(bundle, backend, precision, size, f"index {str(path)!r} is that of another set")
    return EngineSet(bundle, path.parent, index)


def choose_set(
    bundle: Path, backend: str, order: Sequence[str], precision: str | None, size: ClipSize | None = None
) -> EngineSet | None:
    """The set of a precision, or where none is asked for the first in `order` that was built; None without any.

    Raises:
        BackendError: the backend has no such precision, or it was not built; names the command that builds it.
    """
    if precision not in (None, *order):
        raise BackendError(
            "precision", f"{precision!r} is unknown to {backend}", f"allowed are {', '.join(sorted(order))}"
        )
    for name in order if precision is None else (precision,):
        if (found := find_set(bundle, backend, set_name(name, size))) is not None:
            return found
    if precision is not None:
        what = f"{precision} engines{f' for {size}' if size else ''} were not built"
        raise refusal(bundle, backend, precision, size, what)
    return None


def set_names(bundle: Path, backend: str) -> list[str]:
    """The sets of a backend."""
    found = {path.parent.name for folder in engine_folders(bundle, backend) for path in folder.glob(f"*/{INDEX}")}
    return sorted(name for name in found if not name.startswith("."))
