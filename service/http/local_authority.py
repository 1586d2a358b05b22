"""An authority of this machine alone, and the certificate that it signs for the server."""

import datetime
import ipaddress
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...runtime.errors import InvalidRequest, reason_of, shown
from .. import clock
from ..synced_files import replace_file

AUTHORITY_LASTS = datetime.timedelta(days=3650)
CERTIFICATE_LASTS = datetime.timedelta(days=365)
RENEWED_BEFORE_END = datetime.timedelta(days=30)
FAL_HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "fal.media")
"""fal's own host names, for clients that reach this server under them."""
CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""Certificates begin earlier by this: a client's clock may be behind."""
REMEDY = "restore or repair it; without ca.pem and ca.key a new authority is made, which every client has to be given"

_Parsed = TypeVar("_Parsed")

log = logging.getLogger("sparsectrl_lcm.service")


@dataclass(frozen=True, slots=True)
class _Signed:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, certificate: Path, key: Path) -> None:
        private = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        replace_file(key, private)
        replace_file(certificate, self.certificate.public_bytes(Encoding.PEM), 0o644)

    def lasts_until(self, time: datetime.datetime) -> bool:
        now = _now()
        return self.certificate.not_valid_before_utc <= now and time < self.certificate.not_valid_after_utc


def local_certificate(folder: Path, names: tuple[str, ...] = ()) -> tuple[Path, Path, Path]:
    """Makes an authority and a certificate for this machine. Later calls renew what is near its end or lacks a name.

    The authority keeps its key, so that clients trust renewed certificates, too.

    Args:
        folder: where their files are kept.
        names: further host names or addresses of this server.

    Returns:
        Paths of the authority (clients have to trust it), of the certificate, and of its key.

    Raises:
        InvalidRequest: a file of the authority is missing, damaged or cannot be read, or a name is no host name.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key, server, server_key = (folder / name for name in ("ca.pem", "ca.key", "server.pem", "server.key"))
    wanted = {_general(name) for name in ("localhost", "127.0.0.1", "::1", *FAL_HOSTS, *names)}
    authority = _open_authority(ca, ca_key)
    signed = None
    with suppress(InvalidRequest):  # it is signed again, which clients do not notice
        signed = _read(server, server_key)[0]
    if signed is None or not _serves(signed, authority, wanted):
        _sign(authority, wanted).write(server, server_key)
    return ca, server, server_key


def _open_authority(certificate: Path, key: Path) -> _Signed:
    """The authority of these files: renewed near its end, and new if neither file is there."""
    authority, private = _read(certificate, key)
    if authority is not None and authority.lasts_until(_now() + CERTIFICATE_LASTS):
        return authority
    if authority is not None:
        log.warning("%s was renewed; give it to the clients before the earlier one ends", certificate)
    authority = _make_authority(private)
    authority.write(certificate, key)
    return authority


def _read(certificate: Path, key: Path) -> tuple[_Signed | None, ec.EllipticCurvePrivateKey | None]:
    """Reads a certificate and its key from PEM files. A key may be there alone: it is written first.

    Raises:
        InvalidRequest: a file is damaged or cannot be read, the key is missing, or they do not belong together.
    """
    public, private = _load(certificate, x509.load_pem_x509_certificate), _load(key, _private_key)
    if public is None:
        return None, private
    if private is None:
        raise InvalidRequest("data", f"{key} is missing", REMEDY)
    if public.public_key() != private.public_key():
        raise InvalidRequest("data", f"{key} is not the key of {certificate}", REMEDY)
    return _Signed(public, private), private


def _load(path: Path, parse: Callable[[bytes], _Parsed]) -> _Parsed | None:
    """What a file holds; None if there is no such file."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidRequest("data", f"{path} cannot be read ({reason_of(error)})", REMEDY) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError if it is encrypted
        raise InvalidRequest("data", f"{path} is damaged", REMEDY) from None


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key of another kind")
    return key


def _serves(signed: _Signed, authority: _Signed, wanted: set[x509.GeneralName]) -> bool:
    """Whether a certificate has all names, lasts long enough and comes from the authority."""
    try:
        signed.certificate.verify_directly_issued_by(authority.certificate)
        extension = signed.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (InvalidSignature, ValueError, x509.ExtensionNotFound):
        return False
    return wanted <= set(extension.value) and signed.lasts_until(_now() + RENEWED_BEFORE_END)


def _make_authority(key: ec.EllipticCurvePrivateKey | None) -> _Signed:
    """Makes an authority; with the key of an earlier one, clients that trust only that accept new certificates."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sparsectrl-lcm local authority")])
    builder = _begin(name, name, key, AUTHORITY_LASTS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    # may sign certificates and revocation lists, and nothing else
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return _Signed(builder.add_extension(signs, critical=True).sign(key, hashes.SHA256()), key)


def _sign(authority: _Signed, names: set[x509.GeneralName]) -> _Signed:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sparsectrl-lcm")])
    builder = _begin(subject, authority.certificate.subject, key, CERTIFICATE_LASTS)
    for extension in (
        x509.SubjectAlternativeName(sorted(names, key=repr)),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.BasicConstraints(ca=False, path_length=None),
    ):
        builder = builder.add_extension(extension, critical=False)
    return _Signed(builder.sign(authority.key, hashes.SHA256()), key)


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts: datetime.timedelta
) -> x509.CertificateBuilder:
    public, now = key.public_key(), _now()
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCKS_DIFFER).not_valid_after(now + lasts)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _general(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    try:
        return x509.DNSName(name.lower().encode("idna").decode())
    except UnicodeError:
        reason = f"{shown(name)} is no host name, so no certificate can hold it"
        raise InvalidRequest("tls_port", reason, "correct --public-url and --host") from None


def _now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(clock.now(), datetime.UTC)
