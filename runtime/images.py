"""Keyframe pictures: files, bytes, arrays and Pillow images become RGB pixels in the clip's size."""

import io
import warnings
from contextlib import suppress
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest, reason_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP")
"""Formats of files, here and in the service, by Pillow's names. Others are refused unread: Pillow hands some, such as
EPS, to other programs."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten."""
_SCAN = b"\xff\xda"
"""Begins a scan of a JPEG; the data in it never holds these bytes."""
RESAMPLES = ("lanczos", "bilinear")
"""How pictures of another size are resized, by Pillow's and diffusers' names."""
MOSTLY_WHITE = 0.5
"""A scribble is white lines on black; if more of it is white than this share, it was probably drawn in black."""
COLOURED = 64
"""Levels between the channels of a pixel that is coloured; JPEG leaves fewer in a grey picture."""
MOSTLY_GREY = 0.01
"""A scribble with a larger share of coloured pixels is probably a picture."""
PALE = 128
"""A scribble whose brightest pixel is below this level has lines that the model was not trained on."""
_SHOWN = 100
"""Characters of a path that errors show, from its end."""
_TRANSPARENT = "sparsectrl_lcm transparent"
"""Key in the `info` of a loaded picture that had transparent parts."""
_ANIMATED = "sparsectrl_lcm animated"
"""Key in the `info` of a loaded picture that is the first frame of an animation."""


def load_picture(source: Any, field: str) -> "Image.Image":
    """Reads a picture as RGB: applies its EXIF rotation, flattens it on black, and reduces it to 8 bits.

    Args:
        source: a Pillow image, an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (uint8, uint16, or floats in 0..1),
            the bytes of an image file, its path, or a binary file, which is read from its beginning and stays open.
        field: the name of the picture in errors.

    Raises:
        InvalidRequest: the source is not a picture, or is damaged, empty, or larger than `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file can cause one warning for each of its EXIF tags
            if isinstance(source, bytes | bytearray | memoryview):
                with Image.open(io.BytesIO(source), formats=readable_formats()) as image:
                    return _decode(image, field)
            if isinstance(source, str | PathLike):
                with Image.open(Path(source), formats=readable_formats()) as image:
                    return _decode(image, field)
            if hasattr(source, "read"):
                return _decode(Image.open(source, formats=readable_formats()), field)
            return _decode(_from_memory(source, field), field)
    except InvalidRequest:
        raise
    except Image.DecompressionBombError:
        raise InvalidRequest(
            field, "the image has too many pixels", f"allowed are {MAX_PIXELS // 1_000_000} million"
        ) from None
    except UnidentifiedImageError:
        reason = f"{_describe(source)} is not an image, or damaged"
        raise InvalidRequest(field, reason, f"give {', '.join(FORMATS)}") from None
    except FileNotFoundError:
        url = str(source).lower().startswith(("http:", "https:"))
        remedy = "download it first" if url else "give an image file"
        raise InvalidRequest(field, f"{_describe(source)} does not exist", remedy) from None
    except Exception as error:  # damaged files make decoders raise many classes
        reason = reason_of(error)
        raise InvalidRequest(
            field, f"{_describe(source)} cannot be read ({reason})", "give a readable, whole image"
        ) from None


def readable_formats() -> list[str]:
    """Returns those of `FORMATS` that this Pillow can read; it is built without some on some systems."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def had_transparency(image: "Image.Image") -> bool:
    """Whether a picture from `load_picture` had transparent parts, which are black now."""
    return bool(image.info.get(_TRANSPARENT))


def is_animated(image: "Image.Image") -> bool:
    """Whether a picture from `load_picture` is the first frame of an animation, whose other frames are left out."""
    return bool(image.info.get(_ANIMATED))


def fit(image: "Image.Image", width: int, height: int, resample: str = "lanczos") -> NDArray[np.uint8]:
    """Resizes to cover width x height and crops the centre; uint8 [height, width, 3].

    A picture of this size is taken as it is.

    Args:
        image: an RGB picture.
        width, height: the clip's size in pixels.
        resample: `lanczos` resizes as diffusers does, and crops to fractions of a pixel. `bilinear` resizes as the
            original AnimateDiff code does (guoyww/AnimateDiff, scripts/animate.py), and crops whole pixels.
    """
    from PIL import Image, ImageOps

    if image.size == (width, height):
        return np.asarray(image)
    if resample == "bilinear":
        cropped = image.crop(_whole_pixels(image.width, image.height, width / height))
        return np.asarray(cropped.resize((width, height), Image.Resampling.BILINEAR))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def normalize_scribble(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Makes a scribble [H, W, 3] grey and stretches it from 0 to 255; one without lines becomes black.

    The original AnimateDiff code does this if its setting `normalize_condition_images` is on (scripts/animate.py). It
    keeps fractions of a level.
    """
    sums = pixels.sum(axis=2, dtype=np.int64)  # [H, W], of the three channels
    sums -= sums.min()
    grey = np.round(sums * (255 / max(int(sums.max()), 1))).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def scribble_doubt(pixels: NDArray[np.uint8], transparent: bool = False) -> str:
    """Says what is odd about a scribble, or nothing: the model takes white lines on black.

    Args:
        pixels: the scribble [H, W, 3].
        transparent: whether its picture had transparent parts.
    """
    brightness = pixels.max(axis=2)
    brightest = int(brightness.max())
    if transparent and brightest < PALE:
        return "is dark ink on a transparent ground, which counts as black: lay it on white and invert it"
    if brightest == brightness.min():
        return "is all black" if brightest == 0 else "has no lines: all its pixels are equal"
    channels = pixels.astype(np.int16)
    if (channels.max(axis=2) - channels.min(axis=2) > COLOURED).mean() > MOSTLY_GREY:
        return "is coloured: for a picture choose the controlnet rgb"
    if brightest < PALE:
        return f"is pale, with at most {brightest} of 255 levels: turn on normalize_scribbles"
    return "is mostly white" if (brightness > 127).mean() > MOSTLY_WHITE else ""


def _whole_pixels(width: int, height: int, ratio: float) -> tuple[int, int, int, int]:
    """The part of a picture that the original code takes for clips of a ratio of width to height, in Pillow's order.

    Source: `get_params` of torchvision's `RandomResizedCrop` with a scale of 1. If the picture has the clip's ratio to
    within rounding, it draws the place of the part, of which there are few; here it is the middle one.
    """
    part = round(sqrt(width * height * ratio)), round(sqrt(width * height / ratio))
    if part[0] > width or part[1] > height:
        part = (width, round(width / ratio)) if width / height < ratio else (round(height * ratio), height)
    wide, high = max(part[0], 1), max(part[1], 1)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _decode(image: "Image.Image", field: str) -> "Image.Image":
    from PIL import ImageOps

    width, height = image.size
    if width * height == 0:
        raise InvalidRequest(field, f"the image is {width}x{height}", "both sides must be at least 1 pixel")
    if width * height > MAX_PIXELS:
        raise InvalidRequest(
            field, f"the image has {width}x{height} pixels", f"allowed are {MAX_PIXELS // 1_000_000} million"
        )
    _check_scans(image, field)
    image.load()
    flat = _flatten(ImageOps.exif_transpose(image))
    flat.info[_ANIMATED] = _begins_animation(image)
    return flat


def _begins_animation(image: "Image.Image") -> bool:
    """Whether there are frames after this one. The further pictures of a camera's JPEG (MPO) are no frames."""
    with suppress(Exception):  # the next frame may be damaged
        return image.format != "MPO" and image.tell() == 0 and bool(getattr(image, "is_animated", False))
    return False


def _check_scans(image: "Image.Image", field: str) -> None:
    """Refuses JPEGs with too many scans: each takes 75 bytes of the file and passes over all pixels."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None or file.closed:
        return
    position = file.tell()
    file.seek(0)
    scans = file.read().count(_SCAN)
    file.seek(position)
    if scans > MAX_SCANS:
        raise InvalidRequest(field, f"the JPEG has {scans} scans", f"allowed are {MAX_SCANS}; save it again")


def _from_memory(source: Any, field: str) -> "Image.Image":
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, field)
    raise InvalidRequest(
        field, f"{type(source).__name__} is not an image", "give a path, a file, bytes, a Pillow image or a numpy array"
    )


def _from_array(array: NDArray[Any], field: str) -> "Image.Image":
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise InvalidRequest(
            field, f"an array of shape {array.shape} is not an image", "give [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    if array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.uint16:
        pixels = (array >> 8).astype(np.uint8)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() and 0 <= array.min() <= array.max() <= 1:
        pixels = np.round(array * 255).astype(np.uint8)
    else:
        raise InvalidRequest(
            field, f"an array of {array.dtype} is not an image", "give uint8, uint16 or floats in 0..1"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _flatten(image: "Image.Image") -> "Image.Image":
    """Converts any mode to RGB; transparent parts become black."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        peak = 1.0 if values.max(initial=0) <= 1 else 255.0
        return Image.fromarray((values.clip(0, peak) / peak * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        flat = Image.alpha_composite(black, image).convert("RGB")
        flat.info[_TRANSPARENT] = bool(np.asarray(image.getchannel("A")).min() < 255)
        return flat
    return image.convert("RGB")


def _describe(source: Any) -> str:
    if isinstance(source, str | PathLike):
        path = str(source)
        return repr(path if len(path) <= _SHOWN else f"...{path[-_SHOWN:]}")
    return "the data" if isinstance(source, bytes | bytearray | memoryview) else f"the {type(source).__name__}"
