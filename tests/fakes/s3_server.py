"""moto's S3 server in this process. What it stores outlives its end, as if the store had only been unreachable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
from fakes.missing_programs import missing
from free_ports import free_ports

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
}
BUCKET = "bucket"


class S3Server:
    """A server with one empty bucket. `client` is boto3's."""

    def __init__(self) -> None:
        import boto3

        self._start(*free_ports(1))
        self.url = f"http://127.0.0.1:{self._port}"
        os.environ["AWS_ENDPOINT_URL"] = self.url
        self.client: Any = boto3.client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def _start(self, port: int) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self._start(self._port)

    def keys(self, prefix: str = "") -> list[str]:
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for item in listed.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def s3_server() -> Iterator[S3Server]:
    """Starts a server to which the environment of this process leads, and of those that it starts."""
    for name in ("moto", "s3fs", "flask_cors"):
        if find_spec(name) is None:
            missing(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("AWS_ENDPOINT_URL", "")  # so that it is removed at the end
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = S3Server()
        yield server
        server.stop()
