"""The log: lines of JSON on stderr, of the service from a level on, and warnings of all libraries."""

import json
import logging
from collections.abc import Iterator

import pytest
from sparsectrl_lcm.service.json_logs import log_to_stderr


@pytest.fixture
def _restored() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("sparsectrl_lcm")
    before = root.handlers, root.level, own.level
    root.handlers = []
    yield
    root.handlers = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


@pytest.mark.parametrize(
    ("level", "shown"), [("debug", ["debug", "info", "error"]), ("info", ["info", "error"]), ("error", ["error"])]
)
@pytest.mark.usefixtures("_restored")
def test_lines_from_a_level_on(level: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(level)
    service = logging.getLogger("sparsectrl_lcm.service")
    service.debug("debug")
    service.info("info", extra={"seconds": 0.5})
    logging.getLogger("library").info("not shown")
    logging.getLogger("library").warning("warned")
    try:
        raise ValueError("x")
    except ValueError:
        service.exception("error")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == [*shown[:-1], "warned", "error"]
    assert lines[-1]["level"] == "error" and "ValueError: x" in lines[-1]["error"]
    assert [line["seconds"] for line in lines if line["message"] == "info"] == [0.5] * ("info" in shown)
