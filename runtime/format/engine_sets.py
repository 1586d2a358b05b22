"""Sets of engines beside a bundle's portable graphs: where they are stored, and which of them may be loaded.

A set serves one clip size (or any) in one precision. It has a folder of its own with an index:

    engines/<backend>/<set>/engines.json, unet.engine, ...
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..errors import BackendError, InvalidRequest
from ..operating_system import check_writable
from .build_options import Flags, build_command, options_of_engine
from .checksums import first_difference, user_cache
from .clip_layout import ClipSize
from .engine_keys import ANY_DEVICE, CONVERSION, EngineIndex, graph_checksums
from .manifest import Manifest

INDEX = "engines.json"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why an engine may not be loaded."""

    reason: str
    other_device: bool = False


@dataclass(frozen=True, slots=True)
class EngineSet:
    """A folder of engines and its index."""

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
        """The file of a graph's engine, after checking that it may be loaded here.

        Args:
            manifest: the bundle's.
            graph: name of the graph.
            version: version of the backend that will load it.
            device: the device that the engine must be bound to.
            inputs: the input shapes that it must be built for; None for an engine that takes any.

        Raises:
            BackendError: the engine belongs to another bundle, version or device, or is damaged. The remedy is the
                command that builds it again.
        """
        if found := self.mismatch(manifest, graph, version, device, inputs):
            record = self.index.engines.get(graph)
            flags = dict(record.spec.flags) if record else {}
            if found.other_device:  # these options would exclude this device again
                flags.pop("compute_capabilities", None)
                flags.pop("hardware_compatibility", None)
            index, reason = self.index, f"engine of {graph!r} {found.reason}"
            raise refusal(self.bundle, index.backend, index.precision, index.size, reason, flags, index.keyframe_slots)
        return self.folder / self.index.engines[graph].path

    def check_keyframes(self, manifest: Manifest, keyframes: int) -> int:
        """The number of keyframes that static engines of this set take.

        Raises:
            InvalidRequest: `keyframes` are more; the remedy is the command that builds engines for them.
        """
        index = self.index
        slots = index.keyframe_slots or manifest.keyframe_slots
        if keyframes > slots:
            flags = next((record.spec.flags for record in index.engines.values()), {})
            options = options_of_engine(index.precision, index.size, flags, keyframes)
            command = build_command(self.bundle, index.backend, options)
            raise InvalidRequest("keyframes", f"{keyframes} were given, the engines take {slots}", f"run: {command}")
        return slots

    def mismatch(
        self,
        manifest: Manifest,
        graph: str,
        version: str,
        device: str = ANY_DEVICE,
        inputs: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Mismatch | None:
        """Why `open` would refuse a graph's engine; None if it would not."""
        record = self.index.engines.get(graph)
        if record is None:
            return Mismatch("is missing")
        spec = record.spec
        wanted = spec.model_copy(
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
        other = self.other_machine(graph, version, device)
        checks = (
            (spec.conversion != wanted.conversion, Mismatch("was built by another release of sparsectrl-lcm")),
            (spec.graph_sha256 != wanted.graph_sha256, Mismatch("was built from another bundle")),
            (other is not None, other),
            (spec.shapes != wanted.shapes, Mismatch("was built for other shapes")),
            (spec != wanted or record.key != wanted.key(), Mismatch("does not match the key in its index")),
        )
        found = next((mismatch for differs, mismatch in checks if differs), None)
        if found is None and (difference := first_difference(self.folder, record.files)):
            return Mismatch(difference[1])
        return found

    def other_machine(self, graph: str, version: str, device: str) -> Mismatch | None:
        """The mismatch if an engine is bound to another version of its backend or to another device; None if not."""
        spec = self.index.engines[graph].spec
        if spec.version != version:
            return Mismatch(f"was built by version {spec.version}, this machine has {version}")
        if spec.device != device:
            return Mismatch(f"was built for {spec.device}, this machine has {device}", other_device=True)
        return None

    def fault(self, manifest: Manifest, graph: str) -> str | None:
        """Why an engine cannot be loaded even on the machine that it was built for; None if it can."""
        spec = self.index.engines[graph].spec
        found = self.mismatch(manifest, graph, spec.version, spec.device, spec.shapes)
        return f"{self.index.backend} engine of {graph!r} {found.reason}" if found else None


def refusal(
    bundle: Path,
    backend: str,
    precision: str | None,
    size: ClipSize | None,
    reason: str,
    flags: Flags | None = None,
    keyframe_slots: int | None = None,
) -> BackendError:
    """An error whose remedy is the command that builds a set of engines."""
    command = build_command(bundle, backend, options_of_engine(precision, size, flags or {}, keyframe_slots))
    return BackendError("backend", f"the {backend} {reason}", f"run: {command}")


def engine_folders(bundle: Path, backend: str) -> tuple[Path, Path]:
    """The folders for engines: one in the bundle, and one in the user's cache in case the bundle is read-only."""
    return bundle / "engines" / backend, user_cache(bundle, "engines") / backend


def writable_engine_folder(bundle: Path, backend: str) -> Path:
    """Creates the first of `engine_folders` that can be written, and returns it."""
    inside, outside = engine_folders(bundle, backend)
    try:
        inside.mkdir(parents=True, exist_ok=True)
        check_writable(inside)
    except OSError:
        outside.mkdir(parents=True, exist_ok=True)
        return outside
    return inside


def set_name(precision: str, size: ClipSize | None = None) -> str:
    """The folder of a set: `512x512x16-fp16`, or `fp32` if it takes any size."""
    return f"{size}-{precision}" if size else precision


def parse_set_name(name: str) -> tuple[ClipSize | None, str | None]:
    """Size and precision in the name of a set's folder; None for each that the name does not give."""
    parts = re.fullmatch(r"(?:(\d+)x(\d+)x(\d+)-)?([a-z]+\d+)", name)
    if parts is None:
        return None, None
    width, height, frames, precision = parts.groups()
    if width is None:
        return None, precision
    return ClipSize(width=int(width), height=int(height), frames=int(frames)), precision


def write_index(folder: Path, index: EngineIndex) -> None:
    """Writes `engines.json` into the folder of a set, at once."""
    part = folder / f"{INDEX}.part"
    part.write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(folder / INDEX)


def find_set(bundle: Path, backend: str, name: str) -> EngineSet | None:
    """A set of engines; None if it was not built.

    Raises:
        BackendError: its index cannot be read.
    """
    paths = [folder / name / INDEX for folder in engine_folders(bundle, backend)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return None
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)  # a read-only bundle may ship its own engines
    size, precision = parse_set_name(name)
    try:
        index = EngineIndex.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise refusal(bundle, backend, precision, size, f"index {str(path)!r} cannot be read") from None
    if (index.backend, index.size, index.precision) != (backend, size, precision):
        raise refusal(bundle, backend, precision, size, f"index {str(path)!r} belongs to another set")
    return EngineSet(bundle, path.parent, index)


def set_names(bundle: Path, backend: str) -> list[str]:
    """The names of a backend's sets."""
    found = {path.parent.name for folder in engine_folders(bundle, backend) for path in folder.glob(f"*/{INDEX}")}
    return sorted(name for name in found if not name.startswith("."))
