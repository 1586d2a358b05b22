"""The warnings of a batch: the first of each kind at once, and at the end the other lines that have it."""

from collections.abc import Callable, Iterable, Iterator

from ..runtime.request_warnings import RequestWarning

SHOWN = 10
"""Most ranges of lines that are named for a kind."""


class LineWarnings:
    """Collects the warnings of lines.

    Args:
        tell: called with the sentence of a warning whose kind is new.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lines: dict[str, set[int]] = {}
        self._first: dict[str, int] = {}

    def add(self, line: int, warnings: Iterable[RequestWarning]) -> None:
        """Adds the warnings of a clip of a line."""
        for warning in warnings:
            if warning.kind not in self._first:
                self._first[warning.kind] = line
                self._tell(f"line {line}: {warning.text}")
            self._lines.setdefault(warning.kind, set()).add(line)

    def others(self) -> Iterator[str]:
        """A sentence for each kind that further lines have."""
        for kind, lines in self._lines.items():
            if rest := lines - {self._first[kind]}:
                yield f"{_named(sorted(rest))} too: {kind}"


def _named(lines: list[int]) -> str:
    """Line numbers in ascending order as text, such as `lines 2-5, 9`."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    parts = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges[:SHOWN]]
    left = sum(last - first + 1 for first, last in ranges[SHOWN:])
    more = f" and {left} more" if left else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(parts)}{more}"
