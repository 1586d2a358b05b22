"""The certificate of an https listener: loaded, and loaded again when its files change."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ...runtime.errors import InvalidRequest, reason_of

CHECK_SECONDS = 3600.0
"""How often a certificate is renewed, or looked at for a change."""

log = logging.getLogger("sparsectrl_lcm.service")


class Certificate:
    """A certificate and its key in PEM files, and the context that serves them.

    Args:
        files: renews the files if that is its job, and returns the paths of the certificate and of its key.
    """

    def __init__(self, files: Callable[[], tuple[Path, Path]]) -> None:
        self._files = files
        self._loaded: list[bytes] = []
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Loads the files and returns the context, which stays the same.

        Raises:
            InvalidRequest: a file cannot be used; the field is `tls_certificate` or `tls_key`.
        """
        if self._context is None:
            files = self._files()
            self._context = server_context(*files)
            self._loaded = [path.read_bytes() for path in files]
        return self._context

    async def follow(self) -> None:
        """Renews the files, and loads them into the context if they have changed. Open connections go on.

        Raises:
            InvalidRequest: a file cannot be used. The context keeps what it had.
            OSError: a file cannot be renewed.
        """
        files = await asyncio.to_thread(self._files)
        server_context(*files)
        found = [path.read_bytes() for path in files]
        if found != self._loaded:
            self.context().load_cert_chain(*files)
            self._loaded = found
            log.info("%s has changed; new connections get it", files[0])


async def follow_certificates(certificates: Iterable[Certificate]) -> None:
    """Follows the files of certificates until it is cancelled."""
    certificates = list(certificates)
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        for certificate in certificates:
            try:
                await certificate.follow()
            except (InvalidRequest, OSError) as error:
                log.warning("the certificate stays as it is: %s", error)


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
