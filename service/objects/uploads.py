"""An upload: a file that does not exist yet, which the holder of a signed token may write."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..auth.signed_tokens import Kind, make_token, read_token
from ..protocol.errors import ServiceError
from ..protocol.urls import stored_file_url
from ..store import FileRow
from .stored_files import keep_file

if TYPE_CHECKING:
    from ..components import Service


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
        return make_token(secret, kind, asdict(self), time.time() + seconds)

    @classmethod
    def from_token(cls, secret: bytes, kind: Kind, token: str, file_id: str) -> "Upload":
        """Returns the upload that a token allows.

        Raises:
            ServiceError: 403 if the token is forged, has expired, or is for another file.
        """
        upload = cls(**read_token(secret, kind, token, time.time()))
        if upload.file_id != file_id:
            raise ServiceError(403, "The upload is another file's")
        return upload

    def file_url(self, base_url: str) -> str:
        """Returns the URL that the file will have."""
        return stored_file_url(base_url, self.file_id, self.name)

    def keep(self, service: "Service", source: BinaryIO | Path | bytes) -> FileRow:
        """Writes the file; blocks, and raises as `keep_file` does."""
        return keep_file(
            service,
            source,
            key_id=self.key_id,
            name=self.name,
            content_type=self.content_type,
            seconds=self.seconds,
            file_id=self.file_id,
        )
