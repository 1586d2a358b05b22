"""Requests in SQL: submission, waiting, and end. Every method is one transaction and may run in any thread."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, delete, func, insert, literal, or_, select, true, update

from . import tables
from .database import Database
from .key_quota import check_quota, lock_name
from .queue_limits import check_unstarted, check_waiting
from .queue_order import TURNS, close_gaps, count_ahead, in_order, next_turn
from .records import Change, LogRow, NewRequest, Outcome, RequestRow, Submitted, values_of
from .request_rows import (
    CANCELLED,
    REVOKED,
    SHOWN,
    cancellation,
    end_request,
    failure,
    given_request,
    in_time,
    read_logs,
    to_request,
    waiting,
)

requests, logs, webhooks = tables.requests, tables.logs, tables.webhooks
_GET = select(*SHOWN).where(given_request)
_MARK_CANCELLED = update(requests).where(given_request).values(cancelled=True)
_GIVEN = select(requests.c.input, requests.c.base_url).where(given_request, waiting)


class OtherInput(Exception):
    """A submission repeats the idempotency key of another, with another input."""


class Requests(Database):
    """The part of the store that holds requests and their logs."""

    def submit(
        self,
        new: NewRequest,
        *,
        limit: int,
        key_limit: int,
        endpoint_limit: int | None = None,
        unstarted_limit: int = 2000,
        key_bytes: int | None = None,
        outcome: Outcome | None = None,
    ) -> Submitted:
        """Adds a request. With `outcome` the request has ended already.

        Raises:
            OtherInput: the key has a request of the endpoint with the same idempotency key and another input.
            QueueFull: `limit` requests wait already, or `key_limit` of this key or `endpoint_limit` of this endpoint
                do, or `unstarted_limit` of this key ended within an hour without a start.
            QuotaExceeded: more than `key_bytes` bytes would be stored for this key.
        """
        given = tables.to_text(new.input)
        with self._write() as connection:
            if new.idempotency_key is not None:
                self._alone(connection, f"{new.key_id} {new.idempotency_key}")
                if (first := _first(connection, new)) is not None:
                    return first
            if outcome is None and key_bytes is not None:
                self._alone(connection, lock_name(new.key_id))
                check_quota(connection, new.key_id, len(given), key_bytes)
            check_unstarted(connection, new, unstarted_limit)
            if outcome is None:
                check_waiting(connection, new, limit, key_limit, endpoint_limit)
            row = values_of(new, NewRequest)
            turn = next_turn(connection, new.endpoint, new.key_id, new.priority)
            ahead = count_ahead(connection, new.endpoint, new.priority, turn) if outcome is None else 0
            row |= {"state": "queued", "attempts": 0, "crashes": 0, "cancelled": False, "turn": turn}
            row |= {"input": literal(given, Text), "input_bytes": len(given)}
            connection.execute(insert(requests).values(row))
            if outcome is not None:
                end_request(connection, new.id, new.webhook, outcome, new.created_at)
        return Submitted(new.id, new.key_id, ahead)

    def get(self, request_id: str) -> RequestRow | None:
        """Returns a request."""
        with self._read() as connection:
            row = connection.execute(_GET, {"request_id": request_id}).one_or_none()
        return None if row is None else to_request(row)

    def given(self, request_id: str) -> tuple[dict[str, Any], str] | None:
        """Returns input and base URL of a waiting request, or None if it does not wait."""
        with self._read() as connection:
            row = connection.execute(_GIVEN, {"request_id": request_id}).one_or_none()
        return None if row is None else (row.input, row.base_url)

    def waiting(self, endpoint: str) -> list[str]:
        """Returns the ids of an endpoint's waiting requests, the next one first."""
        with self._read() as connection:
            return list(connection.execute(in_order(endpoint)).scalars())

    def ahead(
        self, endpoint: str, limit: int, now: float, known: Collection[str] = (), without_keys: Collection[str] = ()
    ) -> dict[str, str]:
        """Returns the next requests of an endpoint that may still be started, in order: request id -> API key.

        Args:
            endpoint: its name.
            limit: most requests to return.
            now: the current time.
            known: ids of requests that are included regardless of their key.
            without_keys: API keys of which only `known` requests are included.
        """
        included = or_(requests.c.key_id.not_in(without_keys), requests.c.id.in_(known))
        query = in_order(endpoint).add_columns(requests.c.key_id).where(in_time(now), included).limit(limit)
        with self._read() as connection:
            return dict(row._tuple() for row in connection.execute(query))

    def cancel(self, request_id: str, now: float, reason: str = "client_cancelled") -> Change | None:
        """Ends a waiting request or marks a running one. Returns None if it has ended or was cancelled before."""
        with self._write() as connection:
            self._alone(connection, TURNS)
            query = select(*SHOWN).where(requests.c.id == request_id).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None or row.state == "done" or row.cancelled:
                return None
            connection.execute(_MARK_CANCELLED, {"request_id": request_id})
            if row.state == "running":
                return Change(row.id, row.endpoint)
            end_request(connection, request_id, row.webhook, cancellation(reason), now)
            close_gaps(connection, [row])
            return Change(row.id, row.endpoint, CANCELLED)

    def end_runs(self, home: str, now: float) -> list[Change]:
        """Ends the waiting `run` requests of a restarted server, whose callers are gone."""
        own = (requests.c.home == home) if self.shared else true()
        return self._end_waiting(own & (requests.c.kind == "run"), cancellation("client_disconnected"), now)

    def expire_waiting(self, now: float) -> list[Change]:
        """Ends requests that were not started in time, with status 504."""
        late = failure(504, "Request was not started in the time that it gave", "startup_timeout")
        return self._end_waiting(requests.c.start_by <= now, late, now)

    def end_revoked(self, now: float) -> list[Change]:
        """Ends waiting requests whose API key was revoked, with status `REVOKED`."""
        revoked = select(tables.keys.c.id).where(tables.keys.c.revoked_at.is_not(None))
        outcome = failure(REVOKED, "The API key of this request was revoked", "bad_request")
        return self._end_waiting(requests.c.key_id.in_(revoked), outcome, now)

    def _end_waiting(self, which: ColumnElement[bool], outcome: Outcome, now: float) -> list[Change]:
        with self._write() as connection:
            self._alone(connection, TURNS)
            query = select(*SHOWN).where(waiting, which).with_for_update(skip_locked=True)
            rows = connection.execute(query).all()
            for row in rows:
                end_request(connection, row.id, row.webhook, outcome, now)
            close_gaps(connection, rows)
        return [Change(row.id, row.endpoint, outcome.status) for row in rows]

    def forget(self, before: float, private_before: float) -> list[str]:
        """Deletes requests that ended before `before`, or before `private_before` if they asked for no storage.

        Returns:
            The ids of the deleted requests, at most 500 of each kind.
        """
        kept = requests.c.keep_io & (requests.c.finished_at < before)  # null unless a request has ended
        private = ~requests.c.keep_io & (requests.c.finished_at < max(before, private_before))
        with self._write() as connection:
            ids: set[str] = set()
            for kind in (kept, private):  # each has its own index
                old = select(requests.c.id).where(kind).limit(500).with_for_update(skip_locked=True)
                ids.update(connection.execute(old).scalars())
            for column in (logs.c.request_id, webhooks.c.request_id, requests.c.id):
                connection.execute(delete(column.table).where(column.in_(ids)))
        return list(ids)

    def counts(self, endpoint: str) -> dict[str, int]:
        """Returns the number of an endpoint's `queued` and `running` requests."""
        counted = requests.c.state.in_(("queued", "running")) & (requests.c.endpoint == endpoint)
        query = select(requests.c.state, func.count()).where(counted).group_by(requests.c.state)
        with self._read() as connection:
            return {"queued": 0, "running": 0} | dict(row._tuple() for row in connection.execute(query))

    def waiting_elsewhere(self, endpoints: Collection[str]) -> dict[str, int]:
        """Returns how many requests wait for each endpoint that is none of these."""
        others = waiting & requests.c.endpoint.not_in(endpoints)
        query = select(requests.c.endpoint, func.count()).where(others).group_by(requests.c.endpoint)
        with self._read() as connection:
            return dict(row._tuple() for row in connection.execute(query))

    def logs(self, request_id: str) -> list[LogRow]:
        """Returns the log of a request."""
        with self._read() as connection:
            return read_logs(connection, request_id)


def _first(connection: Connection, new: NewRequest) -> Submitted | None:
    """Returns the request that was submitted to the endpoint with this idempotency key before."""
    caller = (requests.c.key_id == new.key_id) & (requests.c.endpoint == new.endpoint)
    named = caller & (requests.c.idempotency_key == new.idempotency_key)
    first = connection.execute(select(*SHOWN).where(named)).one_or_none()
    if first is None:
        return None
    if first.fingerprint != new.fingerprint:
        raise OtherInput
    ahead = count_ahead(connection, first.endpoint, first.priority, first.turn) - 1 if first.state == "queued" else 0
    return Submitted(first.id, first.key_id, max(ahead, 0), is_new=False)
