"""The metadata in a clip's file: what was asked for, and what made it, as JSON.

The text stands where each format has its comment: the comment of MP4, WebM and GIF, `Comment` of PNG, and the image
description in the EXIF of WebP. It is ASCII, since GIF and EXIF allow nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, OutputError, reason_of

if TYPE_CHECKING:
    from ..backend_interface import Executor
    from ..checked_request import CheckedRequest
    from ..format.bundle import Bundle

PROGRAM = "sparsectrl-lcm"
KEY = "comment"
"""The key of videos and of GIF; PNG's begins with a capital."""
IMAGE_DESCRIPTION = 0x010E
"""The tag of EXIF."""
_IF_SET = (
    *("decoder", "conditioning_scale", "control_guidance_start", "control_guidance_end", "clip_skip"),
    *("prompt_weights", "long_prompts", "context_length", "context_overlap"),
)
"""Fields of a request that are written if they differ from their defaults."""


def describe(request: "CheckedRequest", bundle: "Bundle", executor: "Executor") -> dict[str, Any]:
    """The metadata of a request's clip, with the names that `VideoPipeline.generate` has for its arguments."""
    from ... import __version__
    from ..checked_request import CheckedRequest

    found = {
        "software": f"{PROGRAM} {__version__}",
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt if request.guidance else None,
        "seed": request.seed if request.noise is None else None,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "num_frames": request.frames,
        "controlnet": request.controlnet,
        "keyframes": [item.index for item in request.keyframes] or None,
    }
    for name in _IF_SET:
        value = getattr(request, name)
        found[name] = None if value == CheckedRequest.__dataclass_fields__[name].default else value
    found |= {
        "bundle": bundle.folder.name,
        "bundle_checksum": bundle.manifest.checksum,
        "backend": executor.backend,
        "precision": executor.precision,
    }
    return {name: value for name, value in found.items() if value is not None}


def as_text(metadata: Mapping[str, Any]) -> str | None:
    """The text that stands in a file; None if there is no metadata."""
    return json.dumps(metadata) if metadata else None


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Reads the metadata of a clip: a file, or a folder of frames. None if it holds none of this package's.

    Raises:
        InvalidRequest: the file is in no format of clips.
        OutputError: it cannot be read.
    """
    from . import video
    from .writers import ENDINGS

    if path.is_dir():
        path = next(iter(sorted(path.glob("frame_*.png"))), path)
    if path.suffix.lower() not in ENDINGS:
        raise InvalidRequest("clip", f"{str(path)!r} is no clip", f"name a bundle, or a file {', '.join(ENDINGS)}")
    try:
        text = video.comment(path) if path.suffix.lower() in video.CODECS else _picture_comment(path)
    except Exception as error:  # PyAV and Pillow have their own exception classes
        raise OutputError("clip", f"{str(path)!r} cannot be read: {reason_of(error)}") from error
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) and str(found.get("software")).startswith(PROGRAM) else None


def _picture_comment(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as image:
        found = image.info.get(KEY) or image.info.get(KEY.title()) or image.getexif().get(IMAGE_DESCRIPTION)
    return found.decode("ascii", "replace") if isinstance(found, bytes) else found
