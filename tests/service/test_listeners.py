"""The addresses that a server listens on."""

import socket

import pytest
from sparsectrl_lcm.service.http.listeners import Listener


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_clients_reach_an_address_of_either_family(host: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with Listener(host, 0).bind() as bound, socket.create_connection(bound.getsockname()[:2], timeout=30) as client:
        assert client.getpeername()[:2] == bound.getsockname()[:2]
