"""The open connections of a listener: how many there may be, and which one goes when there are too many."""

from collections import Counter
from ipaddress import ip_address
from typing import Protocol

PREFIX_BYTES = 8
"""Bytes of an IPv6 address that tell its network: one customer gets a whole /64."""


class Connection(Protocol):
    """A connection, as far as the limits need it."""

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, or the client reads nothing of an answer."""

    def give_way(self) -> None:
        """Ends the connection at once."""


class Connections:
    """Counts connections by address. If there are too many, the one that has been idle longest ends.

    Args:
        most: most connections at once.
        most_of_address: most connections of one IPv4 address or IPv6 network (/64) at once.
    """

    def __init__(self, most: int, most_of_address: int) -> None:
        self._most = most
        self._most_of_address = most_of_address
        self._address_of: dict[Connection, str] = {}  # in the order of their last activity
        self._count: Counter[str] = Counter()

    def add(self, connection: Connection, host: str | None) -> bool:
        """Adds a connection, and ends another if that makes room. Returns False if there is no room."""
        address = _network(host)
        room = True
        if self._count[address] >= self._most_of_address:
            room = self._end_idle(address)
        elif len(self._address_of) >= self._most:
            room = self._end_idle(None)
        if room:
            self._address_of[connection] = address
            self._count[address] += 1
        return room

    def remove(self, connection: Connection) -> None:
        """Forgets a connection that has ended. Ignores unknown ones."""
        address = self._address_of.pop(connection, None)
        if address is not None:
            self._count[address] -= 1
            if not self._count[address]:
                del self._count[address]

    def touch(self, connection: Connection) -> None:
        """Notes that a connection is active: others end before it."""
        if connection in self._address_of:
            self._address_of[connection] = self._address_of.pop(connection)

    def _end_idle(self, address: str | None) -> bool:
        for connection, its in self._address_of.items():
            if address in (None, its) and connection.idle:
                self.remove(connection)
                connection.give_way()
                return True
        return False


def _network(host: str | None) -> str:
    try:
        address = ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or ""
    if address.version == 4:
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else address.packed[:PREFIX_BYTES].hex()
