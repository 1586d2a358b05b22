"""`sparsectrl-lcm keys`: API keys of the service."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import App
from .service_requirements import database_errors, keys_command, need_service

if TYPE_CHECKING:
    from ..service.store import SqlStore

app = App(name="keys", help="API keys of the service: create, list, revoke.")
Data = Annotated[Path, typer.Option(help="The folder of `serve`.")]
Database = Annotated[str | None, typer.Option(help="The database of `serve`; SQLite in DATA by default.")]


@app.callback()
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def create(
    data: Data, name: Annotated[str, typer.Option(help="Whose key it is.")] = "", database: Database = None
) -> None:
    """Make a key and print it once."""
    need_service("keys")
    from ..service.auth.api_keys import create_key

    with _store(data, database) as store:
        typer.echo(create_key(store, name))


@app.command("list")
def list_keys(data: Data, database: Database = None) -> None:
    """List ids, names and states of all keys."""
    with _store(data, database) as store:
        for key in store.all_keys():
            typer.echo(f"{key.id}  {_minute(key.created_at)}  {'revoked' if key.revoked_at else 'valid  '}  {key.name}")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id that `keys list` shows.")], data: Data, database: Database = None
) -> None:
    """Revoke a key; the server refuses it within two seconds."""
    import time

    from ..runtime import InvalidRequest

    key_id = key_id.partition(":")[0]  # drops the secret if a whole key was given
    with _store(data, database) as store:
        done = store.revoke_key(key_id, time.time())
        known = store.get_key(key_id)
    if known is None:
        raise InvalidRequest(
            "", f"there is no key {key_id!r}", f"see them with: {keys_command('list', data, database)}"
        )
    typer.echo("revoked" if done else f"{key_id} was already revoked at {_minute(known.revoked_at or 0)}")


def _minute(time: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


@contextmanager
def _store(data: Path, database: str | None) -> Iterator["SqlStore"]:
    """Opens the store that `serve` created. It never creates one: no server would know its keys."""
    need_service("keys")
    from ..runtime import InvalidRequest
    from ..runtime.errors import reason_of
    from ..service.settings import SQLITE, Settings
    from ..service.store import SqlStore

    url = Settings(data, database=database).database_url
    with database_errors(url):
        try:
            if database is None and not (data / SQLITE).is_file():
                make = shlex.join(["sparsectrl-lcm", "serve", "--data", str(data)])
                remedy = f"give the folder of a server, or make one with: {make}"
                raise InvalidRequest("data", f"{data} has no {SQLITE}", remedy)
            store = SqlStore(url)
        except OSError as error:
            remedy = "give the folder of a server that you may read and write"
            raise InvalidRequest("data", f"{data} cannot be used ({reason_of(error)})", remedy) from None
        try:
            yield store
        finally:
            store.close()
