"""The options of the command line, for tests of documents and samples."""

from typing import Any

import typer

from sparsectrl_lcm import cli


def options_of(words: list[str]) -> set[str]:
    """The options of the command in these words."""
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    return {name for item in command.params for name in (*item.opts, *item.secondary_opts)} | {"--help"}


def check_options(words: list[str]) -> None:
    known = options_of(words)
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{' '.join(words)}: {word}"
