"""The known state of a request in memory, and the event that tells of its next change."""

import asyncio
from dataclasses import dataclass, field

from ..store import FileRow, LogRow, RequestRow


@dataclass(slots=True)
class View:
    """The known state of a request.

    Attributes:
        row: its record.
        logs: its log.
        loaded_at: when both were read, as `time.monotonic`.
        clip: the record of its clip while it runs here, without a size until the clip is stored. None while another
            machine may store it.
        preview: a JPEG of a frame, while the clip is made here.
        cancelled: whether its attempt here is to end without a clip.
        changed: set at the next change and then replaced by a new event.
    """

    row: RequestRow
    logs: list[LogRow]
    loaded_at: float
    clip: FileRow | None = None
    preview: bytes | None = None
    cancelled: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Wakes all who wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()
