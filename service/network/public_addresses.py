"""The addresses that a caller's URL may lead to, and connections that go nowhere else."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpcore
import httpx

from ...runtime.errors import InvalidRequest
from .bounded_heads import BoundedHead

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""A function that returns the addresses of a host name and port, as text."""

MAX_ADDRESSES = 4
"""Most addresses of a host that are tried."""
ADDRESS_SECONDS = 3.0
"""Longest time to connect to one of several addresses."""

# IANA's registries of special-purpose addresses, and multicast
_NOT_PUBLIC_4 = [
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host, as its virtual machines see it
        "169.254.0.0/16",  # link-local, where clouds keep their metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation, as are 198.51.100.0/24 and 203.0.113.0/24
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
]
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = [
    IPv6Network(text)
    for text in (
        "2001::/23",  # Teredo, benchmarks, ORCHID and others
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
_NAT64 = IPv6Network("64:ff9b::/96")

_resolvers = ThreadPoolExecutor(8, thread_name_prefix="resolver")  # slow lookups must not occupy other threads


class AddressRefused(httpx.ConnectError):
    """A URL leads to an address that is not public."""


def is_public(address: Address) -> bool:
    """Returns whether an address belongs to the public internet."""
    address = _unmapped(address)
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


def _unmapped(address: Address) -> Address:
    """Returns the IPv4 address inside an IPv6 address, mapped or by NAT64; otherwise the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


@dataclass(frozen=True, slots=True)
class Allowed:
    """Host names and networks that may be reached even if they are not public."""

    names: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> "Allowed":
        """Reads host names, addresses and networks.

        Raises:
            InvalidRequest: an entry is none of the three.
        """
        names, networks = set(), []
        for entry in entries:
            try:
                networks.append(ip_network(entry.strip().strip("[]"), strict=False))
            except ValueError:
                name = _host(entry)
                if not name or set(name) & set("/:@*[] \t"):
                    reason = f"{entry!r} is not a host name, an address or a network such as 10.0.0.0/8"
                    raise InvalidRequest("allow_private", reason) from None
                names.add(name)
        return cls(frozenset(names), tuple(networks))

    def may_reach(self, host: str, address: Address) -> bool:
        """Returns whether connections to a host may go to this address."""
        if _host(host) in self.names or is_public(address):
            return True
        return any(one in network for network in self.networks for one in (address, _unmapped(address)))


def _host(name: str) -> str:
    return name.strip().lower().rstrip(".")


async def resolve(host: str, port: int) -> list[str]:
    """Asks the system for the addresses of a host."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_resolvers, _resolve, host, port)
    return list(dict.fromkeys(found))


def _resolve(host: str, port: int) -> list[str]:
    # normalises every spelling that the system accepts (0x7f.1, 2130706433)
    return [str(where[0]) for *_, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to exactly the address that was checked, so that a name cannot resolve to another one a moment later.

    Args:
        allowed: hosts and networks that may be reached even if they are not public.
        resolver: resolves host names; tests pass their own.
    """

    def __init__(self, allowed: Allowed, resolver: Resolve = resolve) -> None:
        self._allowed = allowed
        self._resolver = resolver
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolves, checks and connects.

        Raises:
            AddressRefused: one of the host's addresses is not public.
            httpcore.ConnectError, httpcore.ConnectTimeout: the host cannot be reached.
        """
        until = time.monotonic() + (60.0 if timeout is None else timeout)
        addresses = (await self._addresses(host, port, until))[:MAX_ADDRESSES]
        for address in addresses:
            left = until - time.monotonic()
            seconds = left if address == addresses[-1] else min(left, ADDRESS_SECONDS)
            try:
                stream = await self._network.connect_tcp(address, port, max(seconds, 0), local_address, socket_options)
                return BoundedHead(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if address == addresses[-1]:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refuses: no URL may lead to a socket of this machine."""
        raise AddressRefused(path)

    async def sleep(self, seconds: float) -> None:
        """Sleeps, as every backend does."""
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int, until: float) -> list[str]:
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                found = await self._resolver(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved") from error
        # one private address is enough to refuse the host: otherwise retries of a name with two would reach it
        for text in found:
            if not self._allowed.may_reach(host, ip_address(text)):
                raise AddressRefused(f"{host} leads to {text}, which is not public")
        return found
