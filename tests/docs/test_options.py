"""docs/cli.md has every option of every command with its default, service.md every limit, deploy.md every metric."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import typer
from documents import ROOT, tables
from sparsectrl_lcm.cli import app
from sparsectrl_lcm.service.metrics import Metrics
from sparsectrl_lcm.service.settings import LIMITS, Settings

PAGE = (ROOT / "docs/cli.md").read_text()
REQUIRED_BY_HAND = {("export", "--base"), ("export", "--motion-adapter"), ("export", "--output")}
"""Options that the command itself requires, since its subcommand does not need them."""
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "million": 10**6}
WORDS = {"a year": 365 * 86_400, "a week": 7 * 86_400, "an hour": 3_600}


def all_commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command except groups of commands, by name."""
    command = command or typer.main.get_command(app)
    if name and (name == "export" or not hasattr(command, "commands")):
        yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from all_commands(child, f"{name} {part}".strip())


COMMANDS = dict(all_commands())


def section(name: str) -> str:
    match = re.search(rf"^## sparsectrl-lcm {name}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert match, f"docs/cli.md has no section for {name}"
    return match[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    options = [item for item in COMMANDS[name].params if item.param_type_name == "option" and item.name != "help"]
    rows = {cells[0]: cells[1] for table in tables(section(name)) for cells in table[1:]}
    documented = {", ".join(f"`{option}`" for option in (item.secondary_opts or item.opts)): item for item in options}
    assert rows.keys() == documented.keys()
    for option, item in documented.items():
        check_default(rows[option], item, (name, item.opts[0]) in REQUIRED_BY_HAND)


def check_default(text: str, item: Any, by_hand: bool) -> None:
    """Checks that the text has the option's default, or words for a default that the code computes."""
    if item.required or by_hand:
        assert text == "required", item.opts
    elif item.is_flag:
        assert text == "off", item.opts
    elif item.default is None:
        assert text not in ("required", "off") or item.opts == ["--seed"], item.opts
        assert not re.fullmatch(r"`[\d.]+`", text), item.opts
    else:
        default = getattr(item.default, "value", item.default)
        assert text == (f"`{default}`" if default != "" else '`""`'), item.opts


def test_limits_have_their_defaults() -> None:
    defaults = {field.name: field.default for field in fields(Settings)}
    documented: dict[str, float | None] = {}
    for table in tables((ROOT / "docs/service.md").read_text()):
        if table[0][0] == "limit":
            for names, values, _ in table[1:]:
                documented |= dict(zip(re.findall(r"`(\w+)`", names), map(number, values.split(", ")), strict=True))
    assert documented == {name: defaults[name] for name in LIMITS}


def number(text: str) -> float:
    """Parses numbers such as 10,000, 32 MiB, 50 million and a week."""
    if text in WORDS:
        return WORDS[text]
    value, _, unit = text.partition(" ")
    return float(value.replace(",", "")) * UNITS.get(unit, 1)


def test_every_metric_is_documented() -> None:
    known = set(re.findall(r"^# TYPE sparsectrl_lcm_(\w+) ", Metrics().text().decode(), re.M))
    page = (ROOT / "docs/deploy.md").read_text()
    (table,) = (table for table in tables(page) if table[0][0] == "metrics")
    assert {name for cells in table[1:] for name in re.findall(r"`(\w+)`", cells[0])} == known
