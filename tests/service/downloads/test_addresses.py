"""Which addresses are public, and which are let through."""

from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random

import pytest
from sparsectrl_lcm.service.network.public_addresses import Allowed, is_public

# RFC 6890, IANA's special-purpose registries, and addresses that embed other addresses
NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255
    198.51.100.1 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::2 ::7f00:1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
    64:ff9b:1::808:808 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:db8::1
    2002:7f00:1:: 2002:808:808::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1
    ff02::1
"""


@pytest.mark.parametrize(
    "text",
    NOT_PUBLIC.split(),
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


PUBLIC_ADDRESSES = """
    1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 223.255.255.255
    2606:4700::1111 2a00:1450:4001::5 ::ffff:8.8.8.8 64:ff9b::808:808
"""


@pytest.mark.parametrize(
    "text",
    PUBLIC_ADDRESSES.split(),
)
def test_addresses_that_are_public(text: str) -> None:
    assert is_public(ip_address(text))


def test_public_is_never_more_than_what_python_calls_global() -> None:
    random = Random(3)
    for _ in range(5_000):
        four = IPv4Address(random.getrandbits(32))
        six = IPv6Address((0x2000 + random.getrandbits(13)) << 112 | random.getrandbits(112))
        for address in (four, six):
            assert not is_public(address) or (address.is_global and not address.is_multicast)
        for shift in (IPv6Address("::ffff:0:0"), IPv6Address("64:ff9b::")):
            assert is_public(IPv6Address(int(shift) | int(four))) == is_public(four)


def test_what_is_let_through() -> None:
    allowed = Allowed.parse(["Keyframes.Internal.", "10.1.0.0/16", "192.168.7.7", "[fd00::1]", "fd01::/16"])
    for host, address, expected in [
        ("keyframes.internal", "127.0.0.1", True),
        ("KEYFRAMES.internal.", "fd77::1", True),
        ("other.internal", "127.0.0.1", False),
        ("keyframes.internal.evil.test", "127.0.0.1", False),
        ("x", "10.1.255.255", True),
        ("x", "10.2.0.0", False),
        ("x", "::ffff:10.1.0.1", True),
        ("x", "192.168.7.7", True),
        ("x", "192.168.7.8", False),
        ("x", "fd00::1", True),
        ("x", "fd00::2", False),
        ("x", "fd01::2", True),
        ("x", "8.8.8.8", True),
    ]:
        assert allowed.may_reach(host, ip_address(address)) is expected, (host, address)


@pytest.mark.parametrize(
    "entry", ["http://10.0.0.1", "host:80", "", "10.0.0.0/33", "a b", "*.internal", "10.0.0.0/8/8"]
)
def test_what_cannot_be_let_through(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_private"):
        Allowed.parse([entry])
