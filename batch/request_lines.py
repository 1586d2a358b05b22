"""Reads requests from lines of JSON: the input of the HTTP endpoint with more fields, and with local pictures."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import DataHandler, Request

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.errors import InvalidRequest, SparseCtrlLcmError, shown
from ..runtime.request import ClipRequest, Keyframe
from ..service.protocol.advanced_options import KEY, AdvancedOptions
from ..service.protocol.clip_input import MAX_SEED, Input, own_seed
from .line_errors import line_error

MAX_SEEDS = 1000
"""Most clips of one line."""


class PictureLine(BaseModel):
    """A keyframe of a line: the frame, -1 for the last, and a picture's path or data URI."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    image: str


class RequestLine(Input):
    """A line. Unknown keys are errors. Limits that depend on the bundle are checked when the clip is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance_scale: float = 1.0  # type: ignore[assignment]  # fal's are whole numbers up to 2
    id: str | None = Field(None, max_length=100, pattern=r"^\w([\w .+-]*[\w+-])?$")
    pictures: tuple[PictureLine, ...] = Field((), alias="keyframes")
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float = 8.0
    seeds: int | None = Field(None, ge=1, le=MAX_SEEDS)
    decoder: str = "full"
    context_length: int | None = None
    context_overlap: int | None = None

    def requests(self, folder: Path) -> list[tuple[int | None, ClipRequest]]:
        """The line's requests, one or one for each seed, with their seeds as the line counts them.

        Args:
            folder: where relative paths of pictures begin.

        Raises:
            InvalidRequest: a picture is not a local file, or a seed that follows is too large.
        """
        slots = [(index, url, f"keyframe_{slot}_image_url") for slot, index, url in self.keyframes()]
        listed = [(item.index, item.image, "keyframes") for item in self.pictures]
        request = ClipRequest(
            **self.options(),
            keyframes=[Keyframe(index, _picture(source, folder, field)) for index, source, field in (*slots, *listed)],
            width=self.width,
            height=self.height,
            num_frames=self.frames,
            decoder=self.decoder,
            context_length=self.context_length,
            context_overlap=self.context_overlap,
        )
        if self.seeds is None:
            return [(self.seed, request)]
        first = self.seed or 0
        last = first + self.seeds - 1
        if last > MAX_SEED:
            raise InvalidRequest("seeds", f"{self.seeds} from {first} on end at {last}", f"the last may be {MAX_SEED}")
        return [(seed, replace(request, seed=own_seed(seed))) for seed in range(first, last + 1)]


_FIELDS = {
    name: [field.alias or own for own, field in model.model_fields.items()]
    for name, model in (("", RequestLine), (KEY, AdvancedOptions), ("keyframes", PictureLine))
}


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A clip to make.

    Attributes:
        line: number of its line, from 1.
        id: names the clip in the results, and its file.
        seed: as its line gives or counts it, so it may be negative; None for a random one.
        request: what to make.
        output: the file to write.
        fps: frames per second.
        metadata: whether the file says what the clip was made from.
    """

    line: int
    id: str
    seed: int | None
    request: ClipRequest
    output: Path
    fps: float
    metadata: bool

    def digest(self, models: Mapping[str, str]) -> str:
        """A checksum over all that the file depends on: the request, the contents of its pictures, and the model.

        Args:
            models: as `ClipPool.models`.
        """
        fields = asdict(replace(self.request, keyframes=()))
        model = models.get(fields.pop("weights") or "")
        pictures = [(item.index, _digest(item.image)) for item in self.request.keyframes]
        content = [fields, pictures, self.fps, self.output.suffix, model, *([] if self.metadata else ["no metadata"])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class WrongLine:
    """A line that is no request.

    Attributes:
        line: its number, from 1.
        id: its own, if that could be read and is not taken, or the one that its number gives.
        error: what is wrong with it.
    """

    line: int
    id: str
    error: SparseCtrlLcmError


def read_jobs(
    lines: Iterable[bytes], pictures: Path, outputs: Path, ending: str, *, metadata: bool
) -> Iterator[Job | WrongLine]:
    """Yields the jobs of lines; empty lines have none.

    Args:
        lines: UTF-8.
        pictures: the folder where relative paths of pictures begin.
        outputs: the folder of the clips.
        ending: of the clips' files, such as `.mp4`.
        metadata: whether the files say what the clips were made from.
    """
    taken: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        name = f"{number:06d}"
        try:
            line = _parse(text.removeprefix(b"\xef\xbb\xbf"))
            name = line.id or name
            requests = line.requests(pictures)
        except InvalidRequest as error:
            yield WrongLine(number, name, error)
            continue
        for seed, request in requests:
            job_id = name if line.seeds is None else f"{name}-seed{seed}"
            first = taken.setdefault(job_id.casefold(), number)  # some file systems do not tell a from A
            if first != number:
                fault = InvalidRequest("id", f"{job_id!r} is that of line {first} too", "give each line its own")
                yield WrongLine(number, f"{number:06d}", fault)
            else:
                yield Job(number, job_id, seed, request, outputs / f"{job_id}{ending}", line.fps, metadata)


def _parse(text: bytes) -> RequestLine:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest("line", f"it is not JSON ({reason})", "write one object on each line") from None
    if not isinstance(value, dict):
        raise InvalidRequest("line", f"{shown(value)} is not a JSON object", "write one on each line")
    try:
        return RequestLine.model_validate(value)
    except ValidationError as error:
        raise line_error(error.errors(include_url=False)[0], _FIELDS) from None


def _picture(source: str, folder: Path, field: str) -> Path | bytes:
    """The path, or the bytes of a data URI."""
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InvalidRequest(field, f"{shown(source)} is not a local file", "download it first")
    if scheme != "data":
        return folder / source
    try:
        return DataHandler().data_open(Request(source)).read()
    except ValueError:
        raise InvalidRequest(field, "the data URI is damaged") from None


def _digest(image: Any) -> str:
    """A checksum of a picture's bytes. A file that cannot be read has none; the request then fails."""
    try:
        return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""
