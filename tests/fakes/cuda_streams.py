"""Emulated CUDA streams and events: work waits in the queue of its stream until the host waits for it."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Work = Callable[[], object]

TICK = 1000.0
"""Milliseconds that each event takes on the emulated device; far more than what the host takes."""


@dataclass(frozen=True)
class EventRecord:
    """Records an event when its stream gets there."""

    streams: "EmulatedStreams"
    event: int

    def __call__(self) -> None:
        self.streams.pass_event(self.event)


@dataclass
class EmulatedStreams:
    """Queues of work. Nothing orders the work of one stream after that of another, so none runs before it must.

    Attributes:
        queues: the work of each stream, and whether it comes from a graph; 0 is the default stream.
        events: milliseconds at which each event was passed; -1 if never.
        rearms: whether a launched graph makes the host wait for its events again. If not, they keep their state and
            time of the launch before until the host has waited for the whole stream.
        now: the host's time in milliseconds; only waiting takes time.
    """

    queues: dict[int, deque[tuple[Work, bool]]] = field(default_factory=lambda: {0: deque()})
    events: dict[int, float] = field(default_factory=dict)
    rearms: bool = True
    now: float = 0.0
    _clock: float = 0.0
    _launched: bool = False
    _stale: dict[int, float] = field(default_factory=dict)
    _pending: Counter[int] = field(default_factory=Counter)

    def enqueue(self, stream: int, works: Iterable[Work], launched: bool = False) -> None:
        """Enqueues work; `launched` if it is a graph's."""
        for work in works:
            self.queues[stream].append((work, launched))
            if isinstance(work, EventRecord) and (self.rearms or not launched):
                self._pending[work.event] += 1

    def wait_for_event(self, event: int) -> None:
        """Waits until an event was passed as often as it was recorded; work that comes later on its stream stays."""
        for stream in self.queues:
            while self._pending[event] and self._records(stream, event):
                self._run_next(stream)
        assert self.events[event] > 0, "the event was never recorded"
        self.now = max(self.now, self.events[event])

    def wait_for_stream(self, stream: int) -> None:
        """Waits for all work of a stream."""
        while self.queues[stream]:
            self._run_next(stream)
        self.now = max(self.now, self._clock)
        self.events |= self._stale
        self._stale.clear()

    def wait_for_device(self) -> None:
        """Waits for all work, without a change of the host's time."""
        for stream, queue in self.queues.items():
            while queue:
                self._run_next(stream)

    def pass_event(self, event: int) -> None:
        """Sets the time of an event."""
        self._clock = max(self._clock, self.now) + TICK
        if self._launched and not self.rearms:
            self._stale[event] = self._clock
            return
        self.events[event] = self._clock
        self._pending[event] -= 1

    def _records(self, stream: int, event: int) -> bool:
        return any(isinstance(work, EventRecord) and work.event == event for work, _ in self.queues[stream])

    def _run_next(self, stream: int) -> None:
        work, self._launched = self.queues[stream].popleft()
        work()
