"""Reads values of options."""

import re
from collections.abc import Collection, Iterable
from typing import overload

from ..runtime.errors import InvalidRequest, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@overload
def parse_size(text: str, field: str = "size") -> tuple[int, int]: ...


@overload
def parse_size(text: None, field: str = "size") -> tuple[None, None]: ...


def parse_size(text: str | None, field: str = "size") -> tuple[int, int] | tuple[None, None]:
    """Returns the width and height in a text such as `512x512`; `field` is named in errors.

    Raises:
        InvalidRequest: `text` is not two whole numbers.
    """
    if text is None:
        return None, None
    width, separator, height = text.lower().partition("x")
    if not (separator and re.fullmatch(r"\d{1,9}", width) and re.fullmatch(r"\d{1,9}", height)):
        raise InvalidRequest(field, f"{text!r} is not allowed", "give WIDTHxHEIGHT in pixels, such as 512x512")
    return int(width), int(height)


def parse_weights(texts: Iterable[str]) -> dict[str, str]:
    """Returns the bundles of texts such as `anime=FOLDER` by name.

    Raises:
        InvalidRequest: one is not NAME=BUNDLE, its name is not plain, or another one has it.
    """
    bundles: dict[str, str] = {}
    for text in texts:
        name, _, bundle = text.partition("=")
        if not (bundle and _NAME.fullmatch(name)):
            raise InvalidRequest("weights", f"{shown(text)} is not allowed", "give NAME=BUNDLE, such as anime=FOLDER")
        if name in bundles:
            raise InvalidRequest("weights", f"{name} is given twice", "give each bundle a name of its own")
        bundles[name] = bundle
    return bundles


def endpoint_weights(texts: Iterable[str], endpoints: Collection[str]) -> dict[str, dict[str, str]]:
    """Returns the bundles of texts such as `anime=FOLDER` or `me/portraits:anime=FOLDER` by endpoint and name.

    Raises:
        InvalidRequest: as `parse_weights`, or an endpoint is unknown, or is missing although there are several.
    """
    of_endpoint: dict[str, list[str]] = {}
    for text in texts:
        endpoint, colon, _ = text.partition("=")[0].rpartition(":")
        if colon and endpoint not in endpoints:
            reason = f"{shown(endpoint)} is no endpoint of this server"
            raise InvalidRequest("weights", reason, f"there are {', '.join(endpoints)}")
        if not colon and len(endpoints) > 1:
            reason = f"{shown(text)} does not say of which endpoint"
            raise InvalidRequest("weights", reason, "give OWNER/NAME:NAME=BUNDLE")
        given = text.removeprefix(f"{endpoint}{colon}")
        of_endpoint.setdefault(endpoint or next(iter(endpoints)), []).append(given)
    return {endpoint: parse_weights(given) for endpoint, given in of_endpoint.items()}


def parse_endpoints(texts: Iterable[str], bundle: str | None) -> dict[str, str | None]:
    """Returns the bundle of each endpoint, by name.

    Args:
        texts: such as `me/portraits=FOLDER`. One may be a name alone, which stands for `bundle`. Without any, `bundle`
            is served under the default name.
        bundle: the value of `--bundle`; None means the demo bundle, which only a server of one endpoint may have.

    Raises:
        InvalidRequest: a name is given twice, has no bundle, or `bundle` has no name.
    """
    from ..service.settings import DEFAULT_ENDPOINT

    endpoints: dict[str, str | None] = {}
    given = list(texts) or [DEFAULT_ENDPOINT]
    unnamed = bundle is not None or len(given) == 1
    for text in given:
        name, equals, own = text.partition("=")
        if name in endpoints:
            raise InvalidRequest("endpoint", f"{name} is given twice", "give each bundle a name of its own")
        if (equals and not own) or not (equals or unnamed):
            remedy = "give OWNER/NAME=BUNDLE, such as me/portraits=FOLDER"
            raise InvalidRequest("endpoint", f"{name} has no bundle", remedy)
        endpoints[name] = own or bundle
        unnamed = unnamed and bool(equals)
    if bundle is not None and unnamed:
        remedy = "add --endpoint OWNER/NAME for it, or leave it out"
        raise InvalidRequest("bundle", "every name of --endpoint has a bundle of its own", remedy)
    return endpoints
