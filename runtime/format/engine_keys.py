"""The facts that an engine depends on, its key, and the index of a set of engines."""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .clip_layout import ClipSize
from .manifest import FileRecord, Manifest, Positive, Record, RelativePath

CONVERSION = 13
"""Version of the conversion from portable graphs to engines. Increase it with every change that makes other engines."""
ANY_DEVICE = "any"
"""The device in the key of engines that run on every device."""


class EngineSpec(Record):
    """Everything that an engine depends on; its SHA-256 is the engine's key."""

    graph: str
    graph_sha256: tuple[str, ...]
    """Checksums of the ONNX graph and its external data."""
    conversion: int = CONVERSION
    shapes: dict[str, tuple[int, ...]]
    """Static shapes of the inputs; empty if the engine takes any."""
    precision: str
    flags: dict[str, bool | int | str]
    """Options of the builder."""
    backend: str
    version: str
    """Version of the backend that built the engine; `+` means that later ones of the same major version run it too."""
    device: str
    """Where it runs: a device's name and compute capability, a class of devices, or any."""

    def key(self) -> str:
        """SHA-256 over all fields."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class EngineRecord(Record):
    """One engine of a set."""

    key: str
    spec: EngineSpec
    path: RelativePath
    files: dict[RelativePath, FileRecord]
    """The engine's file, and the files stored with it."""
    report: dict[str, Any]
    """Measurements of the build: errors against fp32, seconds, layers by type."""
    refit_at_load: bool = False
    """Whether the bundle has got other weights since the build, which the engine takes over when it is loaded."""
    made_from: str | None = None
    """`engine.unfinished_sets.fingerprint`: SHA-256 over the key and all else that the build depended on. None if it is
    not known; then a build does not take the engine over."""

    @model_validator(mode="after")
    def _has_a_checksum(self) -> Self:
        if self.path not in self.files:
            raise ValueError("the engine has no checksum")
        return self


class EngineIndex(Record):
    """The engines in the folder of a set."""

    format: Literal["sparsectrl-lcm-engines-1"] = "sparsectrl-lcm-engines-1"
    backend: str
    precision: str
    size: ClipSize | None = None
    """None if the engines take any size."""
    keyframe_slots: Positive | None = None
    """Keyframes that the engines take; None if they take any number, or as many as the manifest says."""
    engines: dict[str, EngineRecord]
    missing: tuple[str, ...] = Field(default=(), exclude=True)
    """The graphs whose engines have still to be built. Only complete sets are written."""


def graph_checksums(manifest: Manifest, graph: str) -> tuple[str, ...]:
    """Checksums of a graph and its external data."""
    record = manifest.graphs[graph]
    return tuple(manifest.files[name].sha256 for name in (record.path, *record.weights))
