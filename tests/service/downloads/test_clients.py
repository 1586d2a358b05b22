"""The clients for downloads and webhooks: proxies, cookies, sockets, certificates."""

import asyncio
import datetime
import ssl
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sparsectrl_lcm.service.network.downloads import FetchError, guarded_client
from sparsectrl_lcm.service.network.public_addresses import AddressRefused, Allowed, GuardedBackend

from .conftest import LOOPBACK, NOT_REACHED, PUBLIC, Names, Writer, fetched, get, ok, redirect, serving


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving(ok(b"proxied")) as proxy, serving(ok(b"direct")) as server:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            assert await get(f"http://127.0.0.1:{server.port}/") == b"direct"
            assert proxy.heads == []

    asyncio.run(run())


def test_the_client_of_webhooks() -> None:
    """It does not follow the redirect of a POST, and raises refusals as errors of httpx."""

    async def run() -> None:
        async with serving(redirect("http://127.0.0.1:1/")) as server, guarded_client(("127.0.0.1",)) as client:
            response = await client.post(f"http://127.0.0.1:{server.port}/hook", json={"a": 1})
            assert response.status_code == 302
            assert server.bodies == [b'{"a":1}']
        async with guarded_client(()) as client:
            for url in (f"http://127.0.0.1:{server.port}/", "http://user:password@example.com/", "ftp://example.com/"):
                with pytest.raises(AddressRefused):
                    await client.post(url, json={})
            with pytest.raises(httpx.ConnectError):
                await client.post("http://localhost:1/", json={})
        assert len(server.heads) == 1

    asyncio.run(run())


def test_the_client_keeps_no_cookies_and_its_connections() -> None:
    async def talking(writer: Writer) -> None:
        writer.write(ok(b"", "Set-Cookie: a=b"))
        await writer.drain()

    async def run() -> None:
        async with serving(talking) as server, guarded_client(LOOPBACK) as client:
            for _ in range(2):
                await client.post(f"http://127.0.0.1:{server.port}/")
        assert len(server.heads) == 2
        assert "cookie" not in server.heads[1].lower()

    asyncio.run(run())


def test_no_socket_of_the_machine() -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(GuardedBackend(Allowed()).connect_unix_socket("/run/docker.sock"))


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server with a certificate for `name`, and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(encoding, form, serialization.NoEncryption()) + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


def test_certificates_are_checked_for_the_name(tmp_path: Path, connected: list[str]) -> None:
    """The connection is pinned to an address, but TLS still sends and checks the host name."""
    server_context, client_context = certificate(tmp_path, "keyframes.test")
    asked: list[str | None] = []
    server_context.sni_callback = lambda _, name, __: asked.append(name)

    async def run() -> None:
        client = guarded_client((), certificates=client_context, resolver=Names([PUBLIC]))
        async with serving(ok(b"picture"), ssl=server_context) as server, client:
            response = await client.get(f"https://keyframes.test:{server.port}/")
            assert response.content == b"picture"
            assert f"Host: keyframes.test:{server.port}" in server.heads[0]
            with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
                await client.get(f"https://other.test:{server.port}/")
            with pytest.raises(FetchError, match=NOT_REACHED):  # no trusted authority signed it
                await get(f"https://keyframes.test:{server.port}/", allow=(), resolver=Names([PUBLIC]))
            assert len(server.heads) == 1

    asyncio.run(run())
    assert asked == ["keyframes.test", "other.test", "keyframes.test"]
    assert set(connected) == {PUBLIC}


def test_a_host_that_never_ends_its_interim_responses_is_left() -> None:
    async def endless(writer: Writer) -> None:
        for _ in range(1000):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
            await writer.drain()
        writer.write(ok(b"late"))

    with pytest.raises(FetchError, match="does not speak HTTP"):
        fetched(endless)
    body = b"abc" * 300_000
    assert fetched(b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + ok(body), limit_bytes=10**6)[0] == body
