"""Prints the tables of commands."""

from rich.console import Console
from rich.table import Table

_UNLIMITED = 10_000
"""Columns of the output; no table is as wide."""


def print_table(table: Table) -> None:
    """Prints a table whole: as wide as it is into a file or pipe, and with wrapped cells in a narrow terminal."""
    console = Console()
    for column in table.columns:
        column.overflow = "fold"  # not cut
    if not console.file.isatty():
        console = Console(width=_UNLIMITED)
    console.print(table)
