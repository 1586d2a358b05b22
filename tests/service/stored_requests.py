"""Requests in a store, for tests of the store."""

import time
from typing import Any

from sparsectrl_lcm.service.store import NewRequest, Outcome, RequestRow, SqlStore, tables
from sqlalchemy import select

from .conftest import APP

DONE = Outcome(200, {"seed": 1}, seconds=1.5)


def new(request_id: str, **values: Any) -> NewRequest:
    given = {
        "key_id": "k",
        "endpoint": APP,
        "input": {"prompt": "ä\u0000\ud800"},
        "created_at": 1.0,
        "base_url": "http://x",
    }
    return NewRequest(**({"id": request_id} | given | values))


def submit(store: SqlStore, request_id: str, **values: Any) -> None:
    store.submit(new(request_id, **values), limit=100, key_limit=100)


def ids() -> list[str]:
    return [f"{time.monotonic_ns()}-{place}" for place in range(3)]


def claim(store: SqlStore, owner: str = "me", now: float = 2.0, lease_seconds: float = 30.0) -> RequestRow | None:
    for request_id in store.ahead(APP, 1, now):
        taken = store.claim(request_id, owner, now, lease_seconds)
        return None if taken is None else taken[0]
    return None


def claimed(store: SqlStore, **how: Any) -> RequestRow:
    row = claim(store, **how)
    assert row is not None
    return row


def outcome_of(store: SqlStore, request_id: str) -> Outcome:
    row = store.get(request_id)
    assert row is not None and row.outcome is not None
    return row.outcome


def input_of(store: SqlStore, request_id: str) -> Any:
    with store.engine.connect() as connection:
        query = select(tables.requests.c.input).where(tables.requests.c.id == request_id)
        return connection.execute(query).scalar_one()
