"""The store: adds keys, files, webhooks and secrets to the requests. Every method is one transaction, in any thread."""

import math
import secrets as random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from . import tables
from .key_quota import FILE_BYTES, check_quota, lock_name
from .records import FileRow, KeyRow, RequestRow, WebhookRow, values_of
from .request_attempts import Attempts
from .request_queries import Requests
from .request_rows import read_made

files, webhooks = tables.files, tables.webhooks


class SqlStore(Requests, Attempts):
    """Requests, logs, keys, files and webhooks."""

    def is_unused(self, owner: str) -> bool:
        """Returns whether there is no key, request or file; in a shared database, no request of this server."""
        used = [select(table) for table in (tables.keys, tables.requests, files)]
        if self.shared:
            columns = tables.requests.c
            used = [select(tables.requests).where((columns.owner == owner) | (columns.home == owner))]
        with self._read() as connection:
            return not any(connection.execute(select(query.exists())).scalar_one() for query in used)

    # Clips

    def clips(self, key_id: str, limit: int) -> list[RequestRow]:
        """Returns the last requests of a key whose clips were made, newest first."""
        with self._read() as connection:
            return read_made(connection, key_id, limit)

    # Keys

    def add_key(self, key: KeyRow) -> None:
        """Adds an API key."""
        with self._write() as connection:
            connection.execute(insert(tables.keys).values(values_of(key, KeyRow)))

    def get_key(self, key_id: str) -> KeyRow | None:
        """Returns an API key, revoked or not."""
        with self._read() as connection:
            row = connection.execute(select(tables.keys).where(tables.keys.c.id == key_id)).one_or_none()
        return None if row is None else KeyRow(**row._mapping)

    def all_keys(self) -> list[KeyRow]:
        """Returns all API keys, oldest first."""
        with self._read() as connection:
            return [KeyRow(**row._mapping) for row in connection.execute(select(tables.keys).order_by("created_at"))]

    def revoke_key(self, key_id: str, now: float) -> bool:
        """Revokes a key. Returns False if no valid key has this id."""
        valid = (tables.keys.c.id == key_id) & tables.keys.c.revoked_at.is_(None)
        with self._write() as connection:
            return connection.execute(update(tables.keys).where(valid).values(revoked_at=now)).rowcount == 1

    # Files

    def check_room(self, key_id: str, size: int, key_bytes: int) -> None:
        """Raises QuotaExceeded if a file of `size` bytes does not fit beside what is stored for a key now."""
        with self._read() as connection:
            check_quota(connection, key_id, size + FILE_BYTES, key_bytes)

    def add_file(self, row: FileRow, announced: str | None = None, key_bytes: int | None = None) -> FileRow | None:
        """Records a file. Replaces the record `announced`, and the record with the file's id, which is returned.

        Raises:
            QuotaExceeded: more than `key_bytes` bytes would be stored for its key.
        """
        with self._write() as connection:
            self._check_quota(connection, row, key_bytes)
            if announced is not None:
                connection.execute(delete(files).where(files.c.id == announced))
            return self._put_file(connection, row)

    def add_part(self, row: FileRow, part_ids: Sequence[str], limit: int, key_bytes: int | None = None) -> bool:
        """Records a part of an upload. Returns False if all parts together would have more than `limit` bytes.

        Raises:
            QuotaExceeded: as `add_file`. An earlier part of this number still counts.
        """
        others = [part_id for part_id in part_ids if part_id != row.id]
        total = select(func.coalesce(func.sum(files.c.size), 0)).where(files.c.id.in_(others))
        with self._write() as connection:
            self._check_quota(connection, row, key_bytes)
            self._alone(connection, part_ids[0])
            if connection.execute(total).scalar_one() + row.size > limit:
                return False
            self._put_file(connection, row)
            return True

    def _check_quota(self, connection: Connection, row: FileRow, key_bytes: int | None) -> None:
        if key_bytes is not None:
            self._alone(connection, lock_name(row.key_id))
            check_quota(connection, row.key_id, row.size + FILE_BYTES, key_bytes)

    def _put_file(self, connection: Connection, row: FileRow) -> FileRow | None:
        values = values_of(row, FileRow)
        self._alone(connection, row.id)
        old = connection.execute(select(files).where(files.c.id == row.id)).one_or_none()
        dialect: Any = postgresql if self.shared else sqlite
        upsert = dialect.insert(files).values(values)
        connection.execute(upsert.on_conflict_do_update(index_elements=[files.c.id], set_=values))
        return None if old is None else FileRow(**old._mapping)

    def get_file(self, file_id: str) -> FileRow | None:
        """Returns the record of a file."""
        with self._read() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id)).one_or_none()
        return None if row is None else FileRow(**row._mapping)

    def expired_files(self, now: float) -> list[FileRow]:
        """Returns files whose lifetime is over, at most 500."""
        with self._read() as connection:
            rows = connection.execute(select(files).where(files.c.expires_at <= now).limit(500))
            return [FileRow(**row._mapping) for row in rows]

    def delete_file(self, file_id: str) -> None:
        """Removes the record of a file. The caller deletes the object first."""
        with self._write() as connection:
            connection.execute(delete(files).where(files.c.id == file_id))

    # Webhooks

    def due_webhooks(
        self,
        now: float,
        hold_seconds: float,
        limit: int = 20,
        busy_hosts: Collection[str] = (),
        under_way: Sequence[WebhookRow] = (),
        key_limit: int = 1000,
        most_seconds: float = math.inf,
    ) -> list[WebhookRow]:
        """Takes webhooks that are due, which counts as an attempt. First come those of keys with the fewest under way.

        They become due again after `hold_seconds`, unless `webhook_tried` is called first.

        Args:
            now: the current time.
            hold_seconds: after this time they are due again.
            limit: most webhooks to take.
            busy_hosts: hosts that get none.
            under_way: webhooks that were taken before, and are not taken again.
            key_limit: most webhooks of one key that are under way.
            most_seconds: longest wait. One that is due later was written by a clock that was set back, and is due now.
        """
        with self._read() as connection:
            if (
                connection.execute(select(webhooks.c.next_at).where(webhooks.c.next_at.is_not(None)).limit(1)).first()
                is None
            ):
                return []
        in_time = or_(webhooks.c.next_at <= now, webhooks.c.next_at > now + most_seconds)
        due = in_time & webhooks.c.host.not_in(busy_hosts)
        due &= webhooks.c.request_id.not_in([row.request_id for row in under_way])
        counts = Counter(row.key_id for row in under_way)
        place = func.row_number().over(partition_by=webhooks.c.key_id, order_by=webhooks.c.next_at)
        turn = place + (case(counts, value=webhooks.c.key_id, else_=0) if counts else 0)
        placed = select(webhooks.c.request_id, webhooks.c.next_at, turn.label("turn")).where(due).subquery()
        first = select(placed.c.request_id).where(placed.c.turn <= key_limit)
        first = first.order_by(placed.c.turn, placed.c.next_at).limit(limit)
        query = select(webhooks).where(webhooks.c.request_id.in_(first), due).order_by(webhooks.c.next_at)
        with self._write() as connection:
            rows = connection.execute(query.with_for_update(skip_locked=True)).all()
            taken = [row.request_id for row in rows]
            hold = {"attempts": webhooks.c.attempts + 1, "next_at": now + hold_seconds}
            if taken:
                connection.execute(update(webhooks).where(webhooks.c.request_id.in_(taken)).values(hold))
        return [WebhookRow(row.request_id, row.key_id, row.url, row.host, row.attempts + 1) for row in rows]

    def webhook_tried(self, row: WebhookRow, error: str | None, next_at: float | None) -> None:
        """Records how an attempt ended, unless a later one has begun.

        `next_at` is None after a success and after the last attempt.
        """
        values = {"last_error": error, "next_at": next_at}
        with self._write() as connection:
            current = (webhooks.c.request_id == row.request_id) & (webhooks.c.attempts == row.attempt)
            connection.execute(update(webhooks).where(current).values(values))

    # Secrets

    def secret(self, name: str) -> bytes:
        """Returns 32 random bytes, always the same for a name."""
        query = select(tables.secrets.c.value).where(tables.secrets.c.name == name)
        with self._read() as connection:
            value = connection.execute(query).scalar_one_or_none()
        if value is not None:
            return bytes.fromhex(value)
        try:
            with self._write() as connection:
                connection.execute(insert(tables.secrets).values(name=name, value=random.token_hex(32)))
        except IntegrityError:  # another server was faster
            pass
        return self.secret(name)
