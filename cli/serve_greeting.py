"""What `serve` prints: the page's URL, the authority that https clients have to trust, and on the first start a key."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from .service_requirements import keys_command

if TYPE_CHECKING:
    from ..service.components import Service
    from ..service.http.listeners import Listener

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that mean every address of the machine, each with an address to show."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """Prints where the server is once its addresses are bound, and the first key once a model has loaded.

    A start that fails shows no key, so the next one still does.

    Attributes:
        first: the listener of the page.
        own_authority: whether clients have to trust the server's own authority.
    """

    first: "Listener"
    own_authority: bool

    def opened(self, service: "Service") -> None:
        """Prints what does not depend on the model."""
        from ..service.settings import DEFAULT_ENDPOINT

        settings = service.settings
        if self.own_authority:
            authority = (settings.data / "tls/ca.pem").absolute()
            typer.echo(f"https clients have to trust {authority} (SSL_CERT_FILE, NODE_EXTRA_CA_CERTS)")
        url = self._url(service)
        if settings.anonymous:
            typer.echo(f"{url}/")
        elif service.store.all_keys():
            typer.echo(f"{url}/ (another key: {keys_command('create', settings.data, settings.database)})")
        else:
            typer.echo(f"{url}/ loads the model; a first API key follows")
        if settings.docs:
            typer.echo(f"{url}/docs has Swagger UI")
        if list(settings.endpoints) != [DEFAULT_ENDPOINT]:
            typer.echo(f"clients call {', '.join(settings.endpoints)}")

    def loaded(self, service: "Service") -> None:
        """Makes the first key. Only a terminal shows it: anything else may be a journal that others read. Blocks."""
        from ..service.auth.api_keys import new_key
        from ..service.data_folder import write_first_key

        settings = service.settings
        if settings.anonymous or service.store.all_keys():
            return
        row, key = new_key("first")
        if sys.stdout.isatty():
            service.store.add_key(row)
            typer.echo(f"a first API key, shown only once:\n  FAL_KEY={key}\n{self._url(service)}/#key={key}")
        else:
            path = write_first_key(settings.data, key).absolute()
            service.store.add_key(row)
            typer.echo(f"a first API key is in {path}; delete the file when you have it")

    def _url(self, service: "Service") -> str:
        from ..service.http.listeners import url_host

        host = url_host(ANY.get(self.first.host, self.first.host))
        return (service.settings.public_url or f"http://{host}:{self.first.port}").rstrip("/")
