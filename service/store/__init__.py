"""Requests, logs, keys, file records and webhooks in SQL: SQLite by default, PostgreSQL for several machines.

All access goes through `SqlStore`. Its methods block; the event loop calls them with `SqlStore.read` and
`SqlStore.write`.
"""

from .key_quota import QuotaExceeded
from .outage import STORE_FAILURES
from .owner_lock import OwnerLock
from .queue_limits import QueueFull
from .records import Change, FileRow, KeyRow, LogRow, NewRequest, Outcome, RequestRow, Submitted, WebhookRow
from .request_queries import OtherInput
from .sql_store import SqlStore

__all__ = [
    "STORE_FAILURES",
    "Change",
    "FileRow",
    "KeyRow",
    "LogRow",
    "NewRequest",
    "OtherInput",
    "Outcome",
    "OwnerLock",
    "QueueFull",
    "QuotaExceeded",
    "RequestRow",
    "SqlStore",
    "Submitted",
    "WebhookRow",
]
