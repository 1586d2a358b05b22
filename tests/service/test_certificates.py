"""Certificates of https listeners: their names, and how they are renewed, as OpenSSL's clients see it."""

import asyncio
import contextlib
import datetime
import errno
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from sparsectrl_lcm.cli.serve import _listeners
from sparsectrl_lcm.runtime import InvalidRequest
from sparsectrl_lcm.service.http import local_authority, tls_certificates
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.http.local_authority import local_certificate
from sparsectrl_lcm.service.http.tls_certificates import Certificate
from sparsectrl_lcm.service.settings import Settings

from .conftest import ports
from .serving_here import serving_here
from .waiting import SECONDS

DAY = 86_400.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The server's time of day, which a test may set."""
    time = [datetime.datetime.now(datetime.UTC).timestamp()]
    monkeypatch.setattr(local_authority.clock, "now", lambda: time[0])
    yield time


def seen(context: ssl.SSLContext, ca: Path | str, name: str) -> x509.Certificate:
    """What a client that trusts only `ca` gets from a server with this context, after it has verified it."""
    here, there = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(ssl.SSLError):  # the client refuses the certificate
            context.wrap_socket(there, server_side=True).close()

    with here, there:
        thread = threading.Thread(target=serve)
        thread.start()
        trusting = ssl.create_default_context(cafile=ca if isinstance(ca, Path) else None)
        if isinstance(ca, str):
            trusting = ssl.create_default_context(cadata=ca)
        with trusting.wrap_socket(here, server_hostname=name) as connection:
            certificate = connection.getpeercert(binary_form=True)
        thread.join()
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate)


@pytest.mark.parametrize(
    ("host", "public_url", "names"),
    [
        ("box.lan", None, ["box.lan", "localhost", "127.0.0.1"]),
        ("0.0.0.0", "https://Clips.example.com:8443", ["clips.example.com", "queue.fal.run", "rest.alpha.fal.ai"]),
        ("::", "https://[fd00::7]", ["fd00::7", "::1"]),
        ("bücher.lan", None, ["bücher.lan"]),
    ],
)
def test_clients_accept_every_name_of_the_server(
    tmp_path: Path, host: str, public_url: str | None, names: list[str]
) -> None:
    (listener,) = _listeners(tmp_path, host, {"--tls-port": 8443}, public_url, None, None)
    assert listener.tls is not None
    context = listener.tls.context()
    for name in names:
        seen(context, tmp_path / "tls/ca.pem", name)
    with pytest.raises(ssl.SSLCertVerificationError):
        seen(context, tmp_path / "tls/ca.pem", "elsewhere.lan")
    assert (tmp_path / "tls/ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "tls/server.key").stat().st_mode & 0o777 == 0o600


def test_another_name_is_added_without_a_new_authority(tmp_path: Path) -> None:
    context = Certificate(lambda: local_certificate(tmp_path)[1:]).context()
    ca = (tmp_path / "ca.pem").read_text()
    first = seen(context, ca, "localhost")
    assert seen(Certificate(lambda: local_certificate(tmp_path)[1:]).context(), ca, "localhost") == first
    seen(Certificate(lambda: local_certificate(tmp_path, ("box.lan",))[1:]).context(), ca, "box.lan")
    assert (tmp_path / "ca.pem").read_text() == ca


def test_a_certificate_near_its_end_is_renewed_while_the_server_runs(tmp_path: Path, now: list[float]) -> None:
    certificate = Certificate(lambda: local_certificate(tmp_path)[1:])
    context, start = certificate.context(), now[0]
    first = seen(context, tmp_path / "ca.pem", "localhost")
    ends = first.not_valid_after_utc.timestamp()
    now[0] = ends - 31 * DAY
    asyncio.run(certificate.follow())
    assert seen(context, tmp_path / "ca.pem", "localhost") == first
    now[0] = ends - 29 * DAY
    asyncio.run(certificate.follow())
    second = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    assert second.not_valid_after_utc.timestamp() - now[0] == pytest.approx(365 * DAY, abs=2)
    now[0] = start  # so that OpenSSL, whose clock is the system's, accepts it
    (tmp_path / "server.pem").unlink()
    asyncio.run(certificate.follow())
    third = seen(context, tmp_path / "ca.pem", "localhost")
    assert third.serial_number not in (first.serial_number, second.serial_number)


def test_clients_with_the_earlier_authority_trust_certificates_of_the_renewed_one(
    tmp_path: Path, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    real = now[0]
    now[0] -= 3640 * DAY  # the authority ends in ten days
    local_certificate(tmp_path)
    earlier = (tmp_path / "ca.pem").read_text()
    now[0] = real
    context = Certificate(lambda: local_certificate(tmp_path)[1:]).context()
    assert (tmp_path / "ca.pem").read_text() != earlier
    for ca in (earlier, (tmp_path / "ca.pem").read_text()):
        seen(context, ca, "localhost")
    assert "ca.pem was renewed; give it to the clients" in caplog.text


@pytest.mark.parametrize("name", ["server.pem", "server.key"])
def test_damaged_and_foreign_files_are_made_again(tmp_path: Path, name: str) -> None:
    local_certificate(tmp_path / "a")
    local_certificate(tmp_path / "b")
    for content in (b"", b"nonsense", (tmp_path / "b" / name).read_bytes()):
        (tmp_path / "a" / name).write_bytes(content)
        context = Certificate(lambda: local_certificate(tmp_path / "a")[1:]).context()
        seen(context, tmp_path / "a/ca.pem", "localhost")


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_an_authority_that_cannot_be_read_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("a", "b"):
        local_certificate(tmp_path / folder)
    file, other = tmp_path / "a" / name, tmp_path / "a" / ({"ca.pem", "ca.key"} - {name}).pop()
    kept = other.read_bytes()
    certificate = Certificate(lambda: local_certificate(tmp_path / "a")[1:])
    certificate.context()
    damaged = {b"": "is damaged", b"nonsense": "is damaged", (tmp_path / "b" / name).read_bytes(): "is not the key of"}
    for content, reason in damaged.items():
        file.write_bytes(content)
        with pytest.raises(InvalidRequest, match=rf"{'ca.key' if 'key' in reason else name} {reason}"):
            asyncio.run(certificate.follow())
        assert (file.read_bytes(), other.read_bytes()) == (content, kept)
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self == file:
            raise OSError(errno.EMFILE, "Too many open files")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InvalidRequest, match=rf"{name} cannot be read \(Too many open files\)"):
        asyncio.run(certificate.follow())
    assert other.read_bytes() == kept


def test_a_lost_key_is_told_and_a_key_alone_gets_its_certificate(tmp_path: Path) -> None:
    ca, pem, key = local_certificate(tmp_path)
    context = Certificate(lambda: (pem, key)).context()
    ca.unlink()  # as after a kill between the key and its certificate
    local_certificate(tmp_path)
    seen(context, ca, "localhost")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(InvalidRequest, match=r"ca\.key is missing; restore"):
        local_certificate(tmp_path)


def test_certificates_are_on_the_disk_before_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def sync(handle: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", sync)
    local_certificate(tmp_path)
    assert synced == ["file", "folder"] * 4


def test_a_name_that_no_certificate_can_hold_is_told(tmp_path: Path) -> None:
    (listener,) = _listeners(tmp_path, "localhost", {"--tls-port": 8443}, "https://a..b", None, None)
    assert listener.tls is not None
    with pytest.raises(InvalidRequest, match=r"'a\.\.b' is no host name, so no certificate can hold it; correct"):
        listener.tls.context()


def test_files_of_the_user_are_loaded_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ca, pem, key = local_certificate(tmp_path / "tls")
    certificate = Certificate(lambda: (pem, key))
    monkeypatch.setattr(tls_certificates, "CHECK_SECONDS", 0.01)
    port = ports()[0]

    def serial_number() -> int:
        plain = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        with ssl.create_default_context(cafile=ca).wrap_socket(plain, server_hostname="localhost") as connection:
            return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"").serial_number

    async def until(told: str) -> None:
        while told not in caplog.text:
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        async with serving_here(Settings(tmp_path / "data"), Listener("127.0.0.1", port, certificate)):
            first = await asyncio.to_thread(serial_number)
            key.write_text("half a file")
            await until(f"the certificate stays as it is: tls_key: {key} holds no key")
            assert await asyncio.to_thread(serial_number) == first
            pem.unlink()
            await until(f"{pem}: No such file")
            local_certificate(tmp_path / "tls")
            await until("has changed; new connections get it")
            assert await asyncio.to_thread(serial_number) != first

    with caplog.at_level("INFO"):
        asyncio.run(scenario())
