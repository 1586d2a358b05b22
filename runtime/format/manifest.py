"""The manifest of a bundle: the contents of `manifest.json`, validated when it is read."""

import hashlib
import os
from contextlib import suppress
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import BundleError, reason_of
from .decoders import DECODERS
from .replacement import finish_replacement

FORMAT = "sparsectrl-lcm-bundle"
VERSION = 3
MAX_SIDE = 2048
"""Largest height and width in pixels."""

Dimension = int | str
TemporalNorm = Literal["frame", "clip", "resnet-clip"]
"""What the group norms of UNet and SparseCtrl take their statistics over: each frame; a whole clip in the motion
modules; or a whole clip in the UNet's ResNet blocks and last norm, as AnimateDiff v1 was trained."""


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PureWindowsPath(path).drive or path.startswith("/") or "\\" in path or ".." in parts:
        raise ValueError("must be a path inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]
Positive = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(pattern=r"^[^\sA-Z]+$")]
"""A word in lower case."""


class Record(BaseModel):
    """A part of a JSON file; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class FileRecord(Record):
    """One file of the bundle."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class TensorRecord(Record):
    """An input or output. A symbolic dimension is a name, or names and numbers with `*` and one `/` (rounded up)."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class GraphRecord(Record):
    """One ONNX graph: its files, inputs, outputs, and largest difference from torch."""

    path: RelativePath
    weights: tuple[RelativePath, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    max_error: float
    """Largest difference from torch on random inputs: relative to the largest value; for uint8 frames in levels."""


class SchedulerRecord(Record):
    """The noise schedule, with diffusers' names (`LCMScheduler`)."""

    num_train_timesteps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    beta_schedule: Literal["linear", "scaled_linear"]
    original_inference_steps: Positive = 50
    timestep_scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    clip_sample_range: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.original_inference_steps > self.num_train_timesteps:
            raise ValueError("original_inference_steps must be at most num_train_timesteps")
        return self


class Sizes(Record):
    """The default and allowed sizes of a request; height and width in pixels."""

    height: Positive
    width: Positive
    frames: Positive
    max_frames: Positive
    multiple: Positive
    """Height and width must be multiples of this, the pixels of a latent."""
    vae_scale_factor: Positive
    latent_channels: Positive


class TrainingRecord(Record):
    """What a model was trained for; the clips of other requests may be poor. Height and width in pixels."""

    height: Positive
    width: Positive
    frames: Positive
    min_keyframes: Annotated[int, Field(ge=0)] = 0
    max_keyframes: Annotated[int, Field(ge=0)]
    words: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    """All words of its prompts, for a model that knows only some."""

    @model_validator(mode="after")
    def _keyframes_fit(self) -> Self:
        if self.min_keyframes > self.max_keyframes:
            raise ValueError("min_keyframes must be at most max_keyframes")
        return self

    @property
    def keyframes(self) -> str:
        """The allowed number of keyframes, in words."""
        least, most = self.min_keyframes, self.max_keyframes
        if least == most:
            return str(most)
        return f"{least} to {most}" if least else f"at most {most}"


class Manifest(Record):
    """Everything the runtime needs to know about a bundle besides its graphs."""

    format: Literal["sparsectrl-lcm-bundle"]
    version: int
    created_by: str
    sources: dict[str, str] = {}
    sizes: Sizes
    scheduler: SchedulerRecord
    temporal_norm: TemporalNorm
    max_tokens: Positive
    text_layers: Positive
    """Layers of the text encoder; `clip_skip` skips at most all but one."""
    keyframe_slots: Positive
    """Keyframes that GPU engines take if `build` was not told another number."""
    trained_for: TrainingRecord | None = None
    tokenizer: RelativePath
    graphs: dict[str, GraphRecord]
    files: dict[RelativePath, FileRecord]

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The kinds of keyframes that the bundle takes, such as `scribble` and `rgb`."""
        return tuple(name.removeprefix("controlnet_") for name in self.graphs if name.startswith("controlnet_"))

    @property
    def decoders(self) -> tuple[str, ...]:
        """The names in `DECODERS` whose graphs the bundle has."""
        return tuple(name for name, graph in DECODERS.items() if graph in self.graphs)

    @property
    def checksum(self) -> str:
        """A checksum of all that clips depend on: the manifest has those of all files."""
        return hashlib.sha256(self.model_dump_json(exclude={"trained_for"}).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` to `folder` atomically."""
        self.write_part(folder).replace(folder / "manifest.json")

    def write_part(self, folder: Path) -> Path:
        """Writes and syncs to disk the file that will replace `manifest.json`."""
        part = folder / "manifest.json.part"
        with part.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return part


def read_manifest(folder: Path) -> Manifest:
    """Reads and validates `folder/manifest.json`.

    Raises:
        BundleError: the folder or file is missing, or the file is not a manifest or has another version.
    """
    path = folder / "manifest.json"
    with suppress(OSError):  # what then differs from its checksum is told
        finish_replacement(folder)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():
            what, remedy = "has no manifest.json", "name a folder that `sparsectrl-lcm export` wrote"
        else:
            what, remedy = "is not a folder", "name one that `sparsectrl-lcm export` wrote"
        raise BundleError("bundle", f"{str(folder)!r} {what}", remedy) from None
    except UnicodeDecodeError as error:
        raise BundleError("bundle", f"cannot read {str(path)!r} ({error})", "export the bundle again") from None
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise BundleError("bundle", f"cannot read {str(path)!r}: {reason_of(error)}") from None
    try:
        header = _Header.model_validate_json(text)
        if header.version != VERSION:
            raise BundleError(
                "bundle",
                f"{str(folder)!r} has manifest version {header.version}, this release reads {VERSION}",
                "upgrade sparsectrl-lcm" if header.version > VERSION else "export the bundle again",
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        raise BundleError(
            "bundle", f"{str(path)!r} is not a valid manifest ({field}: {first['msg']})", "export the bundle again"
        ) from None
    needed = {"text_encoder", "unet", "lcm_update", "vae_decoder"} | (
        {"vae_encoder"} if "rgb" in manifest.controlnets else set()
    )
    if missing := sorted(needed - manifest.graphs.keys()):
        raise BundleError("bundle", f"{str(path)!r} has no graph {missing[0]!r}", "export the bundle again")
    listed = {manifest.tokenizer}.union(*({graph.path, *graph.weights} for graph in manifest.graphs.values()))
    if missing := sorted(listed - manifest.files.keys()):
        raise BundleError("bundle", f"{str(path)!r} has no checksum for {missing[0]!r}", "export the bundle again")
    return manifest


class _Header(BaseModel):
    format: Literal["sparsectrl-lcm-bundle"]
    version: int


def resolve_shape(shape: tuple[Dimension, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """The numbers of a symbolic shape such as `("batch*frames", 320, "latent_height/2")`.

    A quotient is rounded up, as a convolution of stride 2 does: `latent_height/2` of 9 is 5.

    Args:
        shape: numbers and symbolic dimensions.
        sizes: the number for each name.

    Raises:
        KeyError: a name has no size.
    """

    def resolve(dimension: Dimension) -> int:
        if isinstance(dimension, int):
            return dimension
        product, _, divisor = dimension.partition("/")
        factors = (int(name) if name.isdigit() else sizes[name] for name in product.split("*"))
        return ceil_div(prod(factors), int(divisor or 1))

    return tuple(resolve(dimension) for dimension in shape)


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
