"""Attempts at requests in SQL: how one begins, keeps its lease, and ends. Every method is one transaction."""

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from sqlalchemy import bindparam, or_, select, true, update
from sqlalchemy.sql.dml import ReturningUpdate

from . import tables
from .database import Database
from .records import Change, FileRow, LogRow, Outcome, RequestRow
from .request_rows import (
    CANCELLED,
    SHOWN,
    add_logs,
    announce_clip,
    attempt_of,
    cancellation,
    current_attempt,
    end_clip,
    end_request,
    given_request,
    in_time,
    lock_attempt,
    read_logs,
    running,
    to_request,
    wait_again,
    waiting,
)

requests = tables.requests


class Attempts(Database):
    """The part of the store that begins and ends attempts at requests."""

    def claim(
        self, request_id: str, owner: str, now: float, lease_seconds: float, clip: FileRow | None = None
    ) -> tuple[RequestRow, list[LogRow]] | None:
        """Claims a waiting request for `owner`. Returns it with its log. No other server gets it during the lease.

        `clip` is the record of its clip until it is stored: it has no size, and expires within a day.
        """
        given = {"request_id": request_id, "by": owner, "now": now, "lease_seconds": lease_seconds}
        with self._write() as connection:
            row = connection.execute(self._claim, given).one_or_none()
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
                given = attempt_of(row) | {"lease_seconds": lease_seconds}
                cancelled = connection.execute(self._renew, given).scalar_one_or_none()
                if cancelled is not None:
                    add_logs(connection, row.id, lines)
                if cancelled is not False:
                    stop.add(row.id)
        return stop

    @cached_property
    def _claim(self) -> ReturningUpdate[Any]:
        taken = {"state": "running", "owner": bindparam("by"), "started_at": bindparam("now"), **self._lease}
        taken["attempts"] = requests.c.attempts + 1
        return update(requests).where(given_request, waiting, in_time(bindparam("now"))).values(taken).returning(*SHOWN)

    @cached_property
    def _renew(self) -> ReturningUpdate[Any]:
        return update(requests).where(current_attempt).values(self._lease).returning(requests.c.cancelled)

    @property
    def _lease(self) -> dict[str, Any]:
        return {"lease_until": self._clock() + bindparam("lease_seconds")}

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
            if not end_request(connection, row.id, row.webhook, outcome, now, attempt=row):
                if lock_attempt(connection, row) is None:
                    return None
                outcome = outcome if outcome.status == CANCELLED else cancellation("client_cancelled")
                end_request(connection, row.id, row.webhook, outcome, now)
            add_logs(connection, row.id, lines)
            until = None if row.object_seconds is None else now + row.object_seconds
            end_clip(connection, clip, until, keep=outcome.status != CANCELLED)
            return outcome.status
