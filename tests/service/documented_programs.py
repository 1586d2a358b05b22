"""The programs of docs/service.md, with the addresses of a server of these tests."""

import re

from .conftest import HERE, Server

PAGE = (HERE.parents[1] / "docs/service.md").read_text()
(HOSTS,) = re.findall(r'^echo "(192.0.2.10 .*)" \| sudo', PAGE, re.M)
"""The line that leads fal's host names to the server."""


def example(language: str, server: Server) -> str:
    """The program in this language."""
    (code,) = blocks(language, server)
    return code


def blocks(language: str, server: Server) -> list[str]:
    """The code in this language."""
    page = PAGE.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(":8443", f":{server.tls_port}")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)
