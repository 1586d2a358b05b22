"""Signatures of webhooks: Ed25519 over request, user, time and body."""

import base64
import hashlib
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


class Signer:
    """Signs webhooks.

    Args:
        seed: 32 bytes, the private key (RFC 8032).
    """

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def headers(self, request_id: str, user_id: str, body: bytes, now: float | None = None) -> dict[str, str]:
        """Returns the signed headers of one delivery. Receivers accept them for five minutes."""
        timestamp = str(int(time.time() if now is None else now))
        message = "\n".join((request_id, user_id, timestamp, hashlib.sha256(body).hexdigest()))
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": user_id,
            "X-Fal-Webhook-Timestamp": timestamp,
            "X-Fal-Webhook-Signature": self._key.sign(message.encode()).hex(),
        }

    def jwks(self) -> dict[str, Any]:
        """Returns a JWK set (RFC 8037) with the public key twice; the padded one is for fal's Python sample."""
        padded = base64.urlsafe_b64encode(self._public).decode()
        name = hashlib.sha256(self._public).hexdigest()[:16]
        return {
            "keys": [
                {"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x}
                for kid, x in ((name, padded.rstrip("=")), (f"{name}-padded", padded))
            ]
        }
