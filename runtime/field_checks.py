"""Checks of the values of a request: each returns the value, or raises InvalidRequest with its name."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .errors import InvalidRequest, shown


def text(name: str, value: Any) -> str:
    """The value, if it is text in valid Unicode."""
    if not isinstance(value, str):
        raise InvalidRequest(name, f"{shown(value)} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(name, f"{shown(value)} is not valid Unicode", "give text as UTF-8") from None
    return value


def integer(name: str, value: Any, low: int, high: int) -> int:
    """The value, if it is a whole number from `low` to `high`; numpy's are too."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise InvalidRequest(name, f"{shown(value)} is not allowed", f"give a whole number from {low} to {high}")
    return number


def switch(name: str, value: Any) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(name, f"{shown(value)} is not allowed", "give True or False")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str], if_none: str = "") -> str:
    """The value, if it is one of the allowed texts; `if_none` is the remedy if nothing is allowed."""
    if not isinstance(value, str) or value not in allowed:
        remedy = f"allowed are {', '.join(allowed)}" if allowed else if_none
        raise InvalidRequest(name, f"{shown(value)} is not allowed", remedy)
    return value


def number(name: str, value: Any, high: float) -> float:
    """The value, if it is a number from 0 to `high`."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    if not 0 <= number <= high:  # false for nan too
        raise InvalidRequest(name, f"{shown(value)} is not allowed", f"give a number from 0 to {high:g}")
    return float(number)
