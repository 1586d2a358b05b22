"""Prints the tables of commands."""

from rich.console import Console
from rich.table import Table

_UNLIMITED = 10_000
"""Columns of the output: more than any table has."""


def print_table(table: Table) -> None:
    """Prints a table: in full width to a file or pipe, with wrapped cells in a narrow terminal."""
    console = Console()
    for column in table.columns:
        column.overflow = "fold"  # not cut
    if not console.file.isatty():
        console = Console(width=_UNLIMITED)
    console.print(table)
