"""An authority of this machine alone, and the certificate that it signs for the server."""

import datetime
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .. import clock

AUTHORITY_LASTS = datetime.timedelta(days=3650)
CERTIFICATE_LASTS = datetime.timedelta(days=365)
RENEWED_BEFORE_END = datetime.timedelta(days=30)
FAL_HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "fal.media")
"""fal's own host names, for clients that reach this server under them."""
CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""Certificates begin earlier by this: a client's clock may be behind."""

log = logging.getLogger("sparsectrl_lcm.service")


@dataclass(frozen=True, slots=True)
class _Signed:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def read(cls, certificate: Path, key: Path) -> "_Signed | None":
        """Reads both from PEM files. None if a file is missing or damaged, or they do not belong together."""
        try:
            read = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError):
            return None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or read.public_key() != private.public_key():
            return None
        return cls(read, private)

    def write(self, certificate: Path, key: Path) -> None:
        private = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _replace(key, private, 0o600)
        _replace(certificate, self.certificate.public_bytes(Encoding.PEM), 0o644)

    def lasts_until(self, time: datetime.datetime) -> bool:
        now = _now()
        return self.certificate.not_valid_before_utc <= now and time < self.certificate.not_valid_after_utc


def local_certificate(folder: Path, names: tuple[str, ...] = ()) -> tuple[Path, Path, Path]:
    """Makes an authority and a certificate for this machine. Later calls renew what is near its end or lacks a name.

    The authority stays the same, so that clients trust renewed certificates, too.

    Args:
        folder: where their files are kept.
        names: further host names or addresses of this server.

    Returns:
        Paths of the authority (clients have to trust it), of the certificate, and of its key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key, server, server_key = (folder / name for name in ("ca.pem", "ca.key", "server.pem", "server.key"))
    wanted = {_general(name) for name in ("localhost", "127.0.0.1", "::1", *FAL_HOSTS, *names)}
    authority, signed = _Signed.read(ca, ca_key), _Signed.read(server, server_key)
    if authority is None or signed is None or not _serves(signed, authority, wanted):
        if authority is None or not authority.lasts_until(_now() + CERTIFICATE_LASTS):
            if authority is not None:
                log.warning("%s was renewed; give it to the clients before the earlier one ends", ca)
            authority = _make_authority(authority)
            authority.write(ca, ca_key)
        _sign(authority, wanted).write(server, server_key)
    return ca, server, server_key


def _serves(signed: _Signed, authority: _Signed, wanted: set[x509.GeneralName]) -> bool:
    """Whether a certificate has all names, lasts long enough and comes from the authority."""
    try:
        signed.certificate.verify_directly_issued_by(authority.certificate)
        extension = signed.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (InvalidSignature, ValueError, x509.ExtensionNotFound):
        return False
    return wanted <= set(extension.value) and signed.lasts_until(_now() + RENEWED_BEFORE_END)


def _make_authority(earlier: _Signed | None) -> _Signed:
    """Makes an authority; with the key of an earlier one, clients that trust only that accept new certificates."""
    key = ec.generate_private_key(ec.SECP256R1()) if earlier is None else earlier.key
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
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name.lower().encode("idna").decode())


def _now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(clock.now(), datetime.UTC)


def _replace(path: Path, content: bytes, mode: int) -> None:
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with open(new, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
    new.replace(path)
