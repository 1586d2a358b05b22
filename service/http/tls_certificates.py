"""Certificates for https, which fal's Python client requires: from a local authority, or the user's own files."""

import datetime
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...runtime.errors import InvalidRequest, reason_of

YEARS = datetime.timedelta(days=3650)
FAL_HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "v3.fal.media")
"""fal's own host names, for clients that reach this server under them."""


def local_certificate(folder: Path, names: tuple[str, ...] = ()) -> tuple[Path, Path, Path]:
    """Creates an authority and a certificate for this machine, once.

    Args:
        folder: where their files are kept.
        names: further host names or addresses of this server.

    Returns:
        Paths of the authority (clients have to trust it), of the certificate, and of its key.
    """
    authority, certificate, key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    wanted = sorted({"localhost", "127.0.0.1", "::1", *FAL_HOSTS, *names})
    listed = folder / "names"
    if not (certificate.exists() and listed.exists() and listed.read_text().split() == wanted):
        folder.mkdir(parents=True, exist_ok=True)
        _write(authority, certificate, key, wanted)
        listed.write_text("\n".join(wanted))
    return authority, certificate, key


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Returns a context with a certificate and its key, both in PEM files.

    Raises:
        InvalidRequest: a file cannot be used; the field is `tls_certificate` or `tls_key`.
    """
    _check_pem("tls_certificate", certificate, x509.load_pem_x509_certificates, "certificate")
    _check_pem("tls_key", key, lambda pem: load_pem_private_key(pem, None), "key without a password")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        reason = f"{key} cannot be used with the certificate {certificate} ({error.reason or error})"
        raise InvalidRequest("tls_key", reason, "give the key of this certificate") from None
    return context


def _check_pem(field: str, path: Path, read: Callable[[bytes], object], content: str) -> None:
    try:
        read(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(field, f"{path}: {reason_of(error)}", "give a PEM file") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError if it is encrypted
        raise InvalidRequest(field, f"{path} holds no {content}", "give a PEM file with one") from None


def _write(authority: Path, certificate: Path, key: Path, names: list[str]) -> None:
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sparsectrl-lcm local authority")])
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)

    def begin(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + YEARS)
        identifier = x509.SubjectKeyIdentifier.from_public_key(public)
        return builder.add_extension(identifier, critical=False)

    # may sign certificates and revocation lists, and nothing else
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = begin(ca_name, ca_key.public_key())
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca_certificate = ca.add_extension(signs, critical=True).sign(ca_key, hashes.SHA256())
    server = begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sparsectrl-lcm")]), server_key.public_key())
    for extension in (
        x509.SubjectAlternativeName([_general(name) for name in names]),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.BasicConstraints(ca=False, path_length=None),
    ):
        server = server.add_extension(extension, critical=False)
    authority.write_bytes(ca_certificate.public_bytes(Encoding.PEM))
    certificate.write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    key.touch(mode=0o600)
    key.write_bytes(server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
