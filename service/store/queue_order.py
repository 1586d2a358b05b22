"""The order of the queue: by priority, then in turns between API keys, then by arrival.

Each waiting request has a turn. A key's requests have one after the other, so that in each turn every key begins one
request. A key whose first request arrives takes part from the turn that runs now. Each endpoint has a queue of its own.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Select, func, or_, select, update

from .request_rows import requests, running, waiting

TURNS = "turns"
"""The lock of who ends waiting requests, which moves others up."""


def in_order(endpoint: str) -> Select[Any]:
    """Returns a query for the ids of an endpoint's waiting requests, the next one first."""
    order = (requests.c.priority, requests.c.turn, requests.c.sequence)
    return select(requests.c.id).where(waiting, requests.c.endpoint == endpoint).order_by(*order)


def next_turn(connection: Connection, endpoint: str, key_id: str, priority: int) -> int:
    """Returns the turn of a new request: the one after the key's last, and not before the one that runs now.

    The latest turn of those that run is the one that runs now: requests of earlier turns may take long to prepare or to
    make. If none runs, it is the first that waits.
    """
    of_key, lane = requests.c.key_id == key_id, (requests.c.endpoint == endpoint) & (requests.c.priority == priority)
    first, last = func.min(requests.c.turn), func.max(requests.c.turn)
    parts = [  # one state each: so each is one step in an index
        select(value).where(lane, state, *only).scalar_subquery()
        for value, state, *only in ((last, running), (first, waiting), (last, waiting, of_key), (last, running, of_key))
    ]
    *now, queued, started = connection.execute(select(*parts)).one()
    after = max((turn + 1 for turn in (queued, started) if turn is not None), default=0)
    return max(next((turn for turn in now if turn is not None), 0), after)


def count_ahead(connection: Connection, endpoint: str, priority: int, turn: int) -> int:
    """Returns how many requests wait ahead of a new one."""
    earlier = or_(requests.c.priority < priority, (requests.c.priority == priority) & (requests.c.turn <= turn))
    of_endpoint = requests.c.endpoint == endpoint
    query = select(func.count()).select_from(requests).where(waiting, of_endpoint, earlier)
    return connection.execute(query).scalar_one()


def close_gaps(connection: Connection, ended: Iterable[Any]) -> None:
    """Moves the later requests of a key up after some ended without a start: the key loses no turn."""
    first: dict[tuple[str, str, int], int] = {}
    for row in ended:
        lane = row.endpoint, row.key_id, row.priority
        first[lane] = min(row.turn, first.get(lane, row.turn))
    for (endpoint, key_id, priority), turn in first.items():
        place = func.row_number().over(order_by=(requests.c.turn, requests.c.sequence))
        of_key = (requests.c.key_id == key_id) & (requests.c.endpoint == endpoint)
        lane_rows = (waiting, of_key, requests.c.priority == priority, requests.c.turn > turn)
        later = select(requests.c.sequence, (place + (turn - 1)).label("turn")).where(*lane_rows).subquery()
        moved = (requests.c.sequence == later.c.sequence) & (requests.c.turn > later.c.turn)
        connection.execute(update(requests).where(moved).values(turn=later.c.turn))
