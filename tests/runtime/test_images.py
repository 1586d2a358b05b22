"""Keyframe pictures of every kind, against Pillow's own result."""

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from sparsectrl_lcm.runtime import ClipRequest, InvalidRequest, Keyframe
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.images import MAX_PIXELS, load_picture, readable_formats, scribble_doubt
from sparsectrl_lcm.runtime.request_checks import check_request


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 6, y * 10, (x + y) * 3], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["image", "array", "bytes", "path", "text"])
def test_sources(source: str, tmp_path: Path) -> None:
    image = gradient()
    path = tmp_path / "picture.png"
    image.save(path)
    given = {
        "image": image,
        "array": np.asarray(image),
        "bytes": encoded(image, "PNG"),
        "path": path,
        "text": str(path),
    }[source]
    assert (np.asarray(load_picture(given, "keyframe 0")) == np.asarray(image)).all()


def test_alpha_is_flattened_on_black() -> None:
    rgba = gradient().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    expected = np.round(np.asarray(rgba)[:, :, :3] * (np.asarray(rgba)[:, :, 3:] / 255))
    for image in (rgba, Image.open(io.BytesIO(encoded(rgba, "PNG")))):
        assert np.abs(np.asarray(load_picture(image, "k")).astype(int) - expected).max() <= 1
    grey = Image.merge("LA", (Image.new("L", (4, 4), 200), Image.new("L", (4, 4), 0)))
    assert np.asarray(load_picture(grey, "k")).max() == 0
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    data = encoded(palette, "PNG", transparency=1)
    assert np.asarray(load_picture(data, "k")).max() == 0


def test_16_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    picture = Image.fromarray(ramp)
    for source in (picture, encoded(picture, "PNG"), ramp):
        pixels = np.asarray(load_picture(source, "k"))
        assert np.abs(pixels[:, :, 0].astype(int) - ramp / 257).max() <= 1
        assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_cmyk() -> None:
    cmyk = gradient().convert("CMYK")
    expected = np.asarray(cmyk.convert("RGB"))
    assert (np.asarray(load_picture(cmyk, "k")) == expected).all()
    assert np.abs(np.asarray(load_picture(encoded(cmyk, "JPEG", quality=100), "k")).astype(int) - expected).mean() < 6


@pytest.mark.parametrize(("mode", "tolerance"), [("L", 0), ("P", 30), ("YCbCr", 3), ("HSV", 6)])
def test_other_modes_keep_their_colours(mode: str, tolerance: int) -> None:
    reference = np.asarray(gradient().convert("L").convert("RGB") if mode == "L" else gradient()).astype(int)
    picture = gradient().quantize(256) if mode == "P" else gradient().convert(mode)
    assert np.abs(np.asarray(load_picture(picture, "k")) - reference).max() <= tolerance


def test_one_bit_pictures_are_black_and_white() -> None:
    pixels = np.asarray(load_picture(Image.fromarray(np.eye(8, dtype=bool)), "k"))
    assert (pixels[:, :, 0] == np.eye(8) * 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), "PNG", exif=exif)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    expected = turns[orientation](np.asarray(gradient()))
    assert (np.asarray(load_picture(data, "k")) == expected).all()


def test_float_and_bool_arrays() -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert (np.asarray(load_picture(values, "k"))[:, :, 1] == np.round(values * 255)).all()
    assert np.asarray(load_picture(values > 0.5, "k")).max() == 255
    assert np.asarray(load_picture(values[:, :, None], "k")).shape == (4, 4, 3)


def claimed(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims to have so many pixels, and ends after the first row."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(width + 1)))
        + chunk(b"IEND", b"")
    )


def large() -> bytes:
    return encoded(Image.new("1", (8001, MAX_PIXELS // 8000)), "PNG")


def bad_exif() -> bytes:
    """A PNG whose EXIF block ends after its first bytes."""
    return encoded(gradient(), "PNG", exif=b"Exif\0\0II*\0")


BAD = {
    "bad exif": (bad_exif(), "cannot be read"),
    "text": (b"not an image at all", "not an image"),
    "empty": (b"", "not an image"),
    "tiff": (encoded(gradient(), "TIFF"), "not an image, or damaged; give PNG, JPEG, WEBP, GIF, AVIF, BMP"),
    "truncated": (encoded(gradient(400, 300), "PNG")[:-900], "give a readable, whole image"),
    "truncated jpeg": (encoded(gradient(400, 300), "JPEG")[:-300], "give a readable, whole image"),
    "bomb": (claimed(40_000, 40_000), "64 million"),
    "large and truncated": (claimed(8001, MAX_PIXELS // 8000)[:-20], "64 million"),  # refused before it is decoded
    "large": (large(), "64 million"),
    "damaged header": (encoded(gradient(), "PNG").replace(b"IHDR", b"IHDX"), "not an image, or damaged"),
    "missing": (Path("/nowhere/at/all.png"), "does not exist; give an image file"),
    "url": ("https://example.org/a.png", "'https://example.org/a.png' does not exist; download it first"),
    "folder": (Path("/"), "cannot be read"),
    "number": (3, "is not an image"),
    "zero-size": (np.zeros((0, 5, 3), np.uint8), "is not an image"),
    "zero-size image": (Image.new("RGB", (0, 5)), "at least 1 pixel"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), "is not an image"),
    "int array": (np.zeros((4, 4), np.int64), "is not an image"),
    "nan": (np.full((4, 4), np.nan), "is not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_one_line(name: str) -> None:
    source, expected = BAD[name]
    with pytest.raises(InvalidRequest, match=expected) as error:
        load_picture(source, "keyframe 7")
    message = str(error.value)
    assert message.startswith("keyframe 7: ")
    assert "\n" not in message
    assert isinstance(error.value, ValueError)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands an EPS to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\necho 10.05.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.eps").write_bytes(data)
    for source in (data, tmp_path / "a.eps"):
        with pytest.raises(InvalidRequest, match="is not an image, or damaged; give PNG, JPEG, WEBP"):
            load_picture(source, "keyframe 0")
    assert not (tmp_path / "ran").exists()


def test_odd_scribbles_are_told() -> None:
    """Ink on a transparent ground is all black; ink on paper is mostly white; also dark pictures are coloured."""
    ink = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(ink).ellipse((10, 10, 50, 50), outline=(0, 0, 0, 255), width=3)
    paper = Image.new("RGBA", ink.size, "white")
    paper.alpha_composite(ink)
    pictures = {
        "is all black": ink,
        "is mostly white": paper,
        "has no lines: all its pixels are equal": Image.new("L", ink.size, 90),
        "": ImageOps.invert(paper.convert("RGB")),
    }
    for doubt, picture in pictures.items():
        assert scribble_doubt(np.asarray(load_picture(picture, "keyframe 0"))) == doubt
    for brightest in (255, 100):
        rainbow = np.stack(np.meshgrid(np.linspace(0, brightest, 64), np.linspace(brightest, 0, 64)), axis=2)
        pixels = np.dstack([rainbow, np.full((64, 64), 20)]).astype(np.uint8)
        assert scribble_doubt(pixels) == "is coloured: for a picture choose the controlnet rgb"
    grey = io.BytesIO()
    pictures[""].save(grey, "JPEG", quality=30)
    assert scribble_doubt(np.asarray(load_picture(grey.getvalue(), "keyframe 0"))) == ""


@pytest.mark.parametrize("colour", [(0, 0, 0), (90, 60, 20)])
def test_dark_ink_on_a_transparent_ground_is_told_with_what_to_do(
    colour: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """It is black on black, and dark colours are barely seen; white ink on a transparent ground is right."""
    manifest = Bundle.load().manifest

    def drawn(ink: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
        ImageDraw.Draw(image).ellipse((10, 10, 50, 50), outline=(*ink, 255), width=3)
        return image

    with caplog.at_level(logging.WARNING, "sparsectrl_lcm"):
        check_request(ClipRequest("a red star", [Keyframe(0, drawn((255, 255, 255)))]), manifest)
        assert not caplog.records
        check_request(ClipRequest("a red star", [Keyframe(3, drawn(colour))]), manifest)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("keyframe 3 is dark ink on a transparent ground, which counts as black: lay it on white")
    assert len(message) < 200


@pytest.mark.parametrize("kind", [kind for kind in ("GIF", "PNG", "WEBP", "AVIF") if kind in readable_formats()])
def test_an_animation_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its first frame is used. A frame that the caller has chosen, and a picture of a single frame, are as wanted."""
    manifest = Bundle.load().manifest
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "grey")]
    animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    chosen = Image.open(io.BytesIO(animation))
    chosen.seek(1)
    cameras = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])  # a JPEG with a picture for each eye
    still = [encoded(frames[0], kind), chosen, cameras]
    with caplog.at_level(logging.WARNING, "sparsectrl_lcm"):
        check_request(ClipRequest("a red star", list(map(Keyframe, range(3), still)), "rgb"), manifest)
        assert not caplog.records
        checked = check_request(ClipRequest("a red star", [Keyframe(5, animation)], "rgb"), manifest)
    assert caplog.messages == ["keyframe 5 is an animation, of which only the first frame is used"]
    assert checked.keyframes[0].pixels.min() > 250


def test_a_request_with_an_odd_scribble_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Pictures for rgb keyframes may be of one colour."""
    manifest = Bundle.load().manifest
    keyframes = [Keyframe(0, np.eye(64) > 0.5), Keyframe(5, np.zeros((64, 64), np.uint8))]
    with caplog.at_level(logging.WARNING, "sparsectrl_lcm"):
        check_request(ClipRequest("a red star", keyframes, controlnet="rgb"), manifest)
        assert not caplog.records
        check_request(ClipRequest("a red star", keyframes, controlnet="scribble"), manifest)
    (record,) = caplog.records
    assert record.getMessage().startswith("keyframe 5 is all black; a scribble is white lines on black")
