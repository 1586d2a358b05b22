"""Servers that change waiting requests of a key at the same time do not wait for each other for ever."""

import threading
import time
import uuid
from typing import Any

import pytest
from sparsectrl_lcm.service.store import Change, SqlStore, request_queries
from sqlalchemy import text

from .conftest import APP
from .stored_requests import new
from .waiting import SECONDS


def test_requests_that_end_at_the_same_time(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction ends the first and third request of a key, another the second. Each moves the later ones up."""
    name = uuid.uuid4().hex
    store = SqlStore(database)
    for number, start_by in enumerate([5.0, None, 5.0, None]):
        request = new(f"{name}{number}", key_id=name, start_by=start_by)
        store.submit(request, limit=100, key_limit=100)
    close_gaps, ends = request_queries.close_gaps, []

    def slowly(connection: Any, rows: Any) -> None:
        if len(rows) == 2:  # both rows are locked now
            other.start()
            waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            with store.engine.connect() as watching:
                end = time.monotonic() + SECONDS
                while not watching.execute(waits).scalar_one() and time.monotonic() < end:
                    time.sleep(0.01)
        close_gaps(connection, rows)

    def cancel() -> None:
        ends.append(store.cancel(f"{name}1", 6.0))

    monkeypatch.setattr(request_queries, "close_gaps", slowly)
    other = threading.Thread(target=cancel, daemon=True)
    assert store.expire_waiting(6.0) == [Change(f"{name}{place}", APP, 504) for place in (0, 2)]
    other.join(SECONDS)
    assert ends == [Change(f"{name}1", APP, 499)]
    assert store.cancel(f"{name}3", 7.0) == Change(f"{name}3", APP, 499)
    store.close()
