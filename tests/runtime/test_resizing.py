"""Keyframes of another size, and pale scribbles, against diffusers and the original AnimateDiff code."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sparsectrl_lcm.runtime import ClipRequest, InvalidRequest, Keyframe
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.images import fit, normalize_scribble
from sparsectrl_lcm.runtime.request_checks import check_request


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 6, y * 10, (x + y) * 3], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 16), (16, 64), (40, 24)])
def test_fit_covers_and_crops_the_centre(width: int, height: int) -> None:
    image = gradient()
    scale = max(width / image.width, height / image.height)
    box = (width / scale, height / scale)
    left, top = (image.width - box[0]) / 2, (image.height - box[1]) / 2
    expected = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + box[0], top + box[1]))
    pixels = fit(image, width, height)
    assert pixels.shape == (height, width, 3)
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize(("size", "clip"), [((300, 200), (96, 64)), ((60, 40), (96, 64)), ((96, 54), (64, 36))])
def test_pictures_with_the_clips_aspect_are_resized_as_in_diffusers(
    size: tuple[int, int], clip: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, do_normalize=False)  # as SparseCtrl's
    expected = processor.preprocess([image], height=clip[1], width=clip[0])[0].permute(1, 2, 0).numpy()
    assert (fit(image, *clip) == np.round(expected * 255)).all()


def triangle_filter(size: int, new: int) -> np.ndarray:
    """Weights [new, size] of bilinear resizing whose filter grows with the scale, so that nothing is skipped."""
    scale = size / new
    places = (np.arange(new)[:, None] + 0.5) * scale - (np.arange(size) + 0.5)
    weights = np.maximum(0, 1 - np.abs(places) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "clip", "box"),
    [
        ((40, 24), (16, 16), (8, 0, 32, 24)),  # too wide: the middle in the whole height
        ((24, 40), (16, 8), (0, 14, 24, 26)),  # too high
        ((100, 67), (48, 32), (0, 0, 100, 67)),  # the clip's ratio to within rounding: the whole picture
        ((41, 24), (16, 16), (8, 0, 32, 24)),  # half a pixel is rounded down
        ((30, 20), (48, 32), (0, 0, 30, 20)),
        ((1, 9), (64, 16), (0, 4, 1, 5)),
    ],
)
def test_bilinear_resizes_and_crops_as_the_original(
    size: tuple[int, int], clip: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    """scripts/animate.py of guoyww/AnimateDiff: torchvision's RandomResizedCrop, with scale 1 and the clip's ratio."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    left, top, right, bottom = box
    part = pixels[top:bottom, left:right].astype(float)
    rows, columns = triangle_filter(part.shape[0], clip[1]), triangle_filter(part.shape[1], clip[0])
    expected = np.einsum("yr,xc,rcd->yxd", rows, columns, part)
    assert np.abs(fit(Image.fromarray(pixels), *clip, "bilinear") - expected).max() <= 1.01


def test_pictures_in_the_clips_size_are_taken_as_they_are() -> None:
    image = gradient()
    for resample in ("lanczos", "bilinear"):
        assert (fit(image, *image.size, resample) == np.asarray(image)).all()


def image_norm(image: np.ndarray) -> np.ndarray:
    """`image_norm` of scripts/animate.py in guoyww/AnimateDiff, for an image [3, H, W] of 0 to 1."""
    image = image.mean(0, keepdims=True).repeat(3, 0)
    image = image - image.min()
    return image / image.max()


def test_scribbles_are_stretched_as_by_the_original() -> None:
    """The original keeps fractions of a level."""
    coloured = np.random.default_rng(0).integers(30, 90, (24, 40, 3), np.uint8)
    line = np.full((8, 8, 3), 40, np.uint8)
    line[3] = 60
    for pixels in (coloured, line, np.asarray(gradient())):
        expected = image_norm(pixels.transpose(2, 0, 1).astype(np.float32) / 255).transpose(1, 2, 0)
        assert np.abs(normalize_scribble(pixels) - expected * 255).max() <= 0.501
    blank = np.full((8, 8, 3), 90, np.uint8)  # there the original divides by zero
    assert (normalize_scribble(blank) == 0).all()


def test_a_request_may_stretch_pale_scribbles(caplog: pytest.LogCaptureFixture) -> None:
    manifest = Bundle.load().manifest
    pale = (np.eye(manifest.sizes.height, manifest.sizes.width) * 70).astype(np.uint8)
    request = ClipRequest("a red star", [Keyframe(0, pale)])
    with caplog.at_level(logging.WARNING, "sparsectrl_lcm"):
        (kept,) = check_request(request, manifest).keyframes
        (record,) = caplog.records
        (stretched,) = check_request(replace(request, normalize_scribbles=True), manifest).keyframes
        assert caplog.records == [record]
    assert (kept.pixels[:, :, 0] == pale).all()
    assert (stretched.pixels[:, :, 0] == np.eye(*pale.shape) * 255).all()
    assert "is pale, with at most 70 of 255 levels: turn on normalize_scribbles" in record.getMessage()
    pictures = replace(request, controlnet="rgb", normalize_scribbles=True)
    assert (check_request(pictures, manifest).keyframes[0].pixels == kept.pixels).all()


def test_a_request_names_how_pictures_are_resized() -> None:
    manifest = Bundle.load().manifest
    size = manifest.sizes.width, manifest.sizes.height
    image = gradient(300, 200)
    request = ClipRequest("a red star", [Keyframe(0, image)], controlnet="rgb")
    for resample, asked in (("lanczos", request), ("bilinear", replace(request, resample="bilinear"))):
        assert (check_request(asked, manifest).keyframes[0].pixels == fit(image, *size, resample)).all()
    for wrong in ({"resample": "nearest"}, {"resample": None}, {"normalize_scribbles": "yes"}):
        with pytest.raises(InvalidRequest, match=f"^{next(iter(wrong))}: ") as error:
            check_request(replace(request, **wrong), manifest)
        assert len(str(error.value)) < 200
