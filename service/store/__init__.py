"""The seam to the state of requests, keys and files: SQLite by default, PostgreSQL for several machines."""

from .requests import QueueFull
from .rows import FileRow, KeyRow, LogRow, NewRequest, Outcome, RequestRow, WebhookRow
from .sql import SqlStore

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
