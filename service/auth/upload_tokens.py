"""Uploads, and their tokens: the holder of a token may write one file, which does not exist yet."""

from dataclasses import asdict, dataclass

from .. import clock
from ..protocol.errors import ServiceError
from ..protocol.urls import stored_file_url
from .signed_tokens import Kind, make_token, read_token


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that a caller may write.

    Attributes:
        key_id: owner of the file.
        file_id: the file's id.
        name: the file's name, as `safe_name` returns it.
        content_type: as `safe_content_type` returns it.
        seconds: lifetime of the file; None keeps it for ever.
    """

    key_id: str
    file_id: str
    name: str
    content_type: str
    seconds: float | None

    def token(self, secret: bytes, kind: Kind, seconds: float) -> str:
        """Returns a token that lets its holder write the file for `seconds`."""
        return make_token(secret, kind, asdict(self), clock.now() + seconds)

    @classmethod
    def from_token(cls, secret: bytes, kind: Kind, token: str, file_id: str) -> "Upload":
        """Returns the upload that a token allows.

        Raises:
            ServiceError: 403 if the token is forged, has expired, or is for another file.
        """
        upload = cls(**read_token(secret, kind, token, clock.now()))
        if upload.file_id != file_id:
            raise ServiceError(403, "The upload is another file's")
        return upload

    def file_url(self, base_url: str) -> str:
        """Returns the URL that the file will have."""
        return stored_file_url(base_url, self.file_id, self.name)
