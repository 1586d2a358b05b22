"""Reading the values of options."""

from ..runtime.errors import InvalidRequest


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Width and height of `512x512`.

    Raises:
        InvalidRequest: not two whole numbers.
    """
    if text is None:
        return None, None
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise InvalidRequest(f"--size {text!r} is not allowed; give WIDTHxHEIGHT in pixels, as 512x512")
    return int(width), int(height)
