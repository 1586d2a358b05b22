"""Requests, logs, keys, file records and webhooks in SQL: SQLite by default, PostgreSQL for several machines.

All access goes through `SqlStore`. Its methods block; the event loop calls them with `SqlStore.call`.
"""

from .records import FileRow, KeyRow, LogRow, NewRequest, Outcome, RequestRow, WebhookRow
from .request_queries import QueueFull
from .sql_store import SqlStore

__all__ = [
    "FileRow",
    "KeyRow",
    "LogRow",
    "NewRequest",
    "Outcome",
    "QueueFull",
    "RequestRow",
    "SqlStore",
    "WebhookRow",
]
