"""Requests in SQL: submission, waiting, attempts and end. Every method is one transaction and may run in any thread."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, delete, func, insert, literal, or_, select, true, update

from . import tables
from .database import Database
from .key_quota import check_quota, lock_name
from .queue_limits import check_unstarted, check_waiting
from .queue_order import TURNS, close_gaps, count_ahead, in_order, next_turn
from .records import Change, FileRow, LogRow, NewRequest, Outcome, RequestRow, Submitted
from .request_rows import (
    CANCELLED,
    REVOKED,
    SHOWN,
    add_logs,
    announce_clip,
    cancellation,
    end_clip,
    end_request,
    failure,
    in_time,
    is_current,
    lock_attempt,
    read_logs,
    running,
    to_request,
    wait_again,
    waiting,
)

requests, logs, webhooks = tables.requests, tables.logs, tables.webhooks


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
            row = {name: getattr(new, name) for name in NewRequest.__dataclass_fields__}
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
            row = connection.execute(select(*SHOWN).where(requests.c.id == request_id)).one_or_none()
        return None if row is None else to_request(row)

    def given(self, request_id: str) -> tuple[dict[str, Any], str] | None:
        """Returns input and base URL of a waiting request, or None if it does not wait."""
        query = select(requests.c.input, requests.c.base_url).where(requests.c.id == request_id, waiting)
        with self._read() as connection:
            row = connection.execute(query).one_or_none()
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

    def claim(
        self, request_id: str, owner: str, now: float, lease_seconds: float, clip: FileRow | None = None
    ) -> tuple[RequestRow, list[LogRow]] | None:
        """Claims a waiting request for `owner`. Returns it with its log. No other server gets it during the lease.

        `clip` is the record of its clip until it is stored: it has no size, and expires within a day.
        """
        lease = {"owner": owner, "lease_until": self._clock() + lease_seconds}
        taken = {"state": "running", **lease, "started_at": now, "attempts": requests.c.attempts + 1}
        statement = update(requests).where(requests.c.id == request_id, waiting, in_time(now)).values(taken)
        with self._write() as connection:
            row = connection.execute(statement.returning(*SHOWN)).one_or_none()
            if row is None:
                return None
            if clip is not None:
                announce_clip(connection, clip)
            return to_request(row), read_logs(connection, request_id) if row.attempts > 1 else []

    def renew(self, held: Sequence[tuple[RequestRow, Sequence[LogRow]]], lease_seconds: float) -> set[str]:
        """Extends the leases of attempts and adds lines to their logs.

        Returns:
            The ids of requests to stop, because they were cancelled or no longer belong to the owner.
        """
        stop = set()
        with self._write() as connection:
            for row, lines in held:
                renewed = update(requests).where(is_current(row)).values(lease_until=self._clock() + lease_seconds)
                cancelled = connection.execute(renewed.returning(requests.c.cancelled)).scalar_one_or_none()
                if cancelled is not None:
                    add_logs(connection, row.id, lines)
                if cancelled is not False:
                    stop.add(row.id)
        return stop

    def give_back(self, owner: str, keep: Collection[str], now: float, others: bool = True) -> list[Change]:
        """Puts requests that no server works on back into the queue, at their old position.

        In a store of one server these are all running requests except `keep`. In a shared store they are the running
        requests of `owner` except `keep`, and with `others` those of other servers whose lease has ended.

        Returns:
            What was done. A request that was cancelled ended with 499 instead, and one after `ATTEMPTS` with 500.
        """
        lost = requests.c.owner == owner if self.shared else true()
        if others:
            lost = or_(lost, requests.c.lease_until < self._clock())
        query = select(*SHOWN).where(running, lost, requests.c.id.not_in(keep)).with_for_update(skip_locked=True)
        with self._write() as connection:
            rows = connection.execute(query).all()
            return [Change(row.id, row.endpoint, wait_again(connection, row, now)) for row in rows]

    def put_back(
        self, row: RequestRow, lines: Sequence[LogRow], now: float, *, crashed: bool, clip: FileRow | None = None
    ) -> int | None:
        """Ends an attempt and lets the request wait again, at its old position.

        Returns:
            The status if the request ended instead: 499 if it was cancelled, 500 after `ATTEMPTS`; otherwise None.
        """
        with self._write() as connection:
            mine = lock_attempt(connection, row)
            if mine is None:
                return None
            add_logs(connection, row.id, lines)
            end_clip(connection, clip, None)
            return wait_again(connection, mine, now, mine.crashes + crashed)

    def finish(
        self, row: RequestRow, outcome: Outcome, now: float, lines: Sequence[LogRow] = (), clip: FileRow | None = None
    ) -> int | None:
        """Ends a request. If it was cancelled meanwhile, it ends as cancelled, as its caller was promised.

        `clip` is as `claim` took it, with the size of what was stored. Its lifetime begins now.

        Returns:
            The status, or None if the attempt is no longer the current one, for instance after a lost lease.
        """
        with self._write() as connection:
            current = is_current(row), ~requests.c.cancelled
            if not end_request(connection, row.id, row.webhook, outcome, now, *current):
                if lock_attempt(connection, row) is None:
                    return None
                outcome = outcome if outcome.status == CANCELLED else cancellation("client_cancelled")
                end_request(connection, row.id, row.webhook, outcome, now)
            add_logs(connection, row.id, lines)
            until = None if row.object_seconds is None else now + row.object_seconds
            end_clip(connection, clip, until, keep=outcome.status != CANCELLED)
            return outcome.status

    def cancel(self, request_id: str, now: float, reason: str = "client_cancelled") -> Change | None:
        """Ends a waiting request or marks a running one. Returns None if it has ended or was cancelled before."""
        with self._write() as connection:
            self._alone(connection, TURNS)
            query = select(*SHOWN).where(requests.c.id == request_id).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None or row.state == "done" or row.cancelled:
                return None
            connection.execute(update(requests).where(requests.c.id == request_id).values(cancelled=True))
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
