"""How many requests may wait, and how many may end without a start."""

from sqlalchemy import Connection, func, select

from . import tables
from .records import NewRequest
from .request_rows import requests, waiting

UNSTARTED_SECONDS = 3600.0


class QueueFull(Exception):
    """The queue, or the caller's part of it, is full."""


def check_unstarted(connection: Connection, new: NewRequest, limit: int) -> None:
    """Raises QueueFull if `limit` requests of the new one's key ended within an hour without a start."""
    recent = tables.unstarted & (requests.c.created_at > new.created_at - UNSTARTED_SECONDS)
    query = select(func.count()).select_from(requests).where(recent, requests.c.key_id == new.key_id)
    if connection.execute(query).scalar_one() >= limit:
        raise QueueFull(f"{limit} requests of this key ended within an hour without a start")


def check_waiting(
    connection: Connection, new: NewRequest, limit: int, key_limit: int, endpoint_limit: int | None
) -> None:
    """Raises QueueFull if `limit` wait, or `key_limit` of the new one's key, or `endpoint_limit` of its endpoint.

    `endpoint_limit` is None if there is none.
    """
    count = select(func.count()).select_from(requests).where(waiting)
    of_key, of_endpoint = requests.c.key_id == new.key_id, requests.c.endpoint == new.endpoint
    if connection.execute(count).scalar_one() >= limit:
        raise QueueFull(f"{limit} requests are waiting already")
    if connection.execute(count.where(of_key)).scalar_one() >= key_limit:
        raise QueueFull(f"{key_limit} requests of this key are waiting already")
    if endpoint_limit is not None and connection.execute(count.where(of_endpoint)).scalar_one() >= endpoint_limit:
        raise QueueFull(f"{endpoint_limit} requests of this endpoint are waiting already")
