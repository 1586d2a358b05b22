"""The typer application of all commands, with the behaviour that they share."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..runtime.errors import InvalidRequest
from .option_names import options_named

_Function = TypeVar("_Function", bound=Callable[..., Any])


class App(typer.Typer):
    """An application whose commands have `-h` and name options in errors.

    They refuse an option that is given twice, unless it takes several values."""

    def __init__(self, **settings: Any) -> None:
        names = {"help_option_names": ["-h", "--help"]}  # subcommands inherit them
        super().__init__(
            cls=_Group, context_settings=names, invoke_without_command=True, rich_markup_mode=None, **settings
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        """Registers a function as a command, as `typer.Typer.command` does."""
        return super().command(name, cls=_Command, **settings)


class _Strict:
    """Refuses repeated options and names options in errors. Commands and groups add it to their class of typer."""

    params: list[Any]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_repeated(self, ctx, args)
        return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]

    def invoke(self, ctx: Any) -> Any:
        with options_named({name for parameter in self.params for name in parameter.opts}):
            return super().invoke(ctx)  # type: ignore[misc]


class _Command(_Strict, TyperCommand):
    pass


class _Group(_Strict, TyperGroup):
    pass


def _refuse_repeated(command: Any, context: Any, arguments: list[str]) -> None:
    """Refuses repeated options that take one value; the parser would keep the last value.

    Raises:
        InvalidRequest: names the first of them.
    """
    _, _, order = command.make_parser(context).parse_args(args=list(arguments))
    parameters: Any = Counter(order)
    for parameter, count in parameters.items():
        single = parameter.param_type_name == "option" and not parameter.multiple and not parameter.is_flag
        if single and count > 1:
            name = max(parameter.opts, key=len)
            raise InvalidRequest(name, f"was given {count} times", "give it once")
