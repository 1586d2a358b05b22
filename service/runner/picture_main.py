"""The program that reads keyframes in a process of its own, so that a hostile file can take neither server nor runner.

`python -m sparsectrl_lcm.service.runner.picture_main` takes a line of JSON on its standard input: `files`,
`max_pixels`, `width`, `height` and `resample`. It replaces each file by a PNG in the clip's size, or in its own if
`width` is null. Before each file it prints its place, and at the end `done` or, after the first file that is no image,
the reason; `full` if the disk is.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from ...runtime import InvalidRequest
from ...runtime.disk_errors import is_disk_full
from ...runtime.images import FORMATS, fit, load_picture, readable_formats

BASE_BYTES, PIXEL_BYTES, THREAD_BYTES = 256 * 2**20, 40, 16 * 2**20
"""Memory that reading a picture may take: in any case, for each pixel that is allowed, and for each thread."""


def open_image(file: Any, max_pixels: int) -> Image.Image:
    """Opens an image file and reads its header. The pixels stay compressed.

    Raises:
        InvalidRequest: the file is not an image, has a format not in `runtime.images.FORMATS`, or has too many pixels.
    """
    try:
        image = Image.open(file, formats=readable_formats())
    except Image.DecompressionBombError:
        raise InvalidRequest("image", "too many pixels", f"allowed are {max_pixels:,}") from None
    except Exception:  # damaged files make parsers raise errors of many classes
        raise InvalidRequest("image", "cannot be read", f"give a whole image as {', '.join(FORMATS)}") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise InvalidRequest("image", f"{size} has too many pixels", f"allowed are {max_pixels:,}")
    return image


def replace(path: Path, max_pixels: int, width: int | None, height: int | None, resample: str) -> None:
    """Replaces a file by a PNG of its picture.

    Raises:
        InvalidRequest: the file is not an image that is allowed.
    """
    with path.open("rb") as file:
        picture = load_picture(open_image(file, max_pixels), "image")
    if width is not None and height is not None:
        picture = Image.fromarray(fit(picture, width, height, resample))
    made = path.with_name(path.name + ".png")
    picture.save(made, "PNG", compress_level=1, exif=b"", icc_profile=None)
    made.replace(path)


def limit_memory(max_pixels: int) -> None:
    """Bounds the memory of this process. A file that makes a library take more cannot be read, and nothing else."""
    if sys.platform != "linux":  # others do not count what is mapped
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[5])
    threads = (os.cpu_count() or 1) * THREAD_BYTES
    limit = pages * resource.getpagesize() + BASE_BYTES + threads + max_pixels * PIXEL_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    """Reads the files of the order."""
    if sys.platform != "win32":
        os.nice(10)
    line = sys.stdin.readline()
    if not line:  # the server has ended
        return
    order: dict[str, Any] = json.loads(line)
    limit_memory(order["max_pixels"])
    for place, path in enumerate(order.pop("files")):
        print(json.dumps({"place": place}), flush=True)
        try:
            replace(Path(path), **order)
        except InvalidRequest as error:
            return print(json.dumps({"place": place, "wrong": str(error)}))
        except OSError as error:
            if not is_disk_full(error):
                raise
            return print(json.dumps({"full": True}))
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
