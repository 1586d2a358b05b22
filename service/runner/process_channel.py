"""The messages of a runner's process: its end of the server's socket, and what each job gets of it."""

import json
import os
import socket
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Protocol
from weakref import WeakValueDictionary


class Reports(Protocol):
    """Where a job's messages go, and where its cancellation comes from."""

    cancelled: Event

    def say(self, what: str, **values: Any) -> None:
        """Sends a message. May be called from several threads."""


class Channel:
    """This process's end of the socket. A thread receives what the server sends."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self._sending = Lock()
        self._jobs: WeakValueDictionary[int, JobChannel] = WeakValueDictionary()
        self.orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        Thread(target=self._listen, name="listener", daemon=True).start()

    def say(self, what: str, **values: Any) -> None:
        """Sends a message."""
        line = json.dumps({"say": what, **values}).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            os._exit(1)  # the server is gone

    def _listen(self) -> None:
        with suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                order = json.loads(line)
                if order["do"] == "cancel":
                    if (job := self._jobs.get(order["job"])) is not None:
                        job.cancelled.set()
                    continue
                if order["do"] == "make":
                    order["reports"] = self._jobs[order["job"]] = JobChannel(self, order["job"])
                self.orders.put(order)
        os._exit(1)


class JobChannel:
    """The `Reports` of one job: its messages have its number."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.cancelled = Event()
        self._channel = channel
        self._number = number

    def say(self, what: str, **values: Any) -> None:
        """Sends a message."""
        self._channel.say(what, job=self._number, **values)
