"""What systemd is told if it started the server: ready, alive, stopping (sd_notify)."""

import asyncio
import logging
import os
import socket

log = logging.getLogger("sparsectrl_lcm.service")


class Systemd:
    """Sends datagrams to the socket of `NOTIFY_SOCKET`. Without this variable it sends nothing.

    The variable is removed, so that no process which the server starts speaks in its name.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0

    def tell(self, *states: str) -> None:
        """Sends states, such as `READY=1`."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(states).encode(), self._address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", states[0], error)

    async def watch(self) -> None:
        """Tells that the event loop is alive, twice in each period of the watchdog, until it is cancelled."""
        while self._watchdog_seconds:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds / 2)
