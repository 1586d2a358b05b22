"""The command line, one short file per command. A command imports what it needs only when it runs."""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import typer

from . import batch, bench, build, doctor, example, export, generate, inspect, keys, serve, swaps, verify
from .app import App

WrongUse: Any = typer.BadParameter.__base__
"""Base class of usage errors. typer does not export it, and takes it from click or from its own copy."""

app = App(
    name="sparsectrl-lcm",
    help="Keyframes and a prompt in, a 16-frame clip out: AnimateDiff + SparseCtrl + LCM.",
    epilog="To begin: sparsectrl-lcm example",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(example.example)
app.command()(batch.batch)
export.app.command("motion-module")(swaps.motion_module)
export.app.command("lora")(swaps.lora)
export.app.command("controlnet")(swaps.controlnet)
app.add_typer(export.app, name="export")
app.command()(build.build)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(serve.serve)
app.add_typer(keys.app, name="keys")


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"sparsectrl-lcm {installed_version('sparsectrl-lcm')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits. An error is one line on stderr, with exit code 2."""
    from ..runtime.operating_system import print_any_character

    print_any_character()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    from ..runtime.errors import SparseCtrlLcmError, reason_of

    try:
        code = _command().main(args=arguments, prog_name="sparsectrl-lcm", standalone_mode=False)
    except WrongUse as error:
        command = error.ctx.command_path if error.ctx else "sparsectrl-lcm"
        return _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`")
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 130
    except SparseCtrlLcmError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error))
    if code == 130:  # typer caught Ctrl-C itself
        print("stopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


@cache
def _command() -> Any:
    """The command line as a tree of commands; typer makes it anew, from all functions, each time it is asked."""
    return typer.main.get_command(app)


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
