"""Requests and results that are not as a batch wrote or expects them."""

import os
from pathlib import Path
from threading import Thread

import pytest

from .conftest import SMALL, Ran, batch, results, write


def test_an_id_that_is_taken_does_not_make_the_clip_again(ran: Ran) -> None:
    write(SMALL | {"seed": 1, "id": "a"}, SMALL | {"seed": 2, "id": "A"}, SMALL | {"seed": 3, "id": "a"})
    assert batch() == 1
    assert ran.seeds == [1]
    assert batch("--resume") == 1
    assert ran.seeds == []
    assert {item["line"]: item["id"] for item in results()} == {1: "a", 2: "000002", 3: "000003"}


def test_an_error_of_another_line_does_not_make_the_clip_again(ran: Ran) -> None:
    write(SMALL | {"seed": 1, "id": "000005"}, *(SMALL | {"seed": seed} for seed in (2, 3, 4)), "no JSON")
    assert batch() == 1
    assert ran.seeds == [1, 2, 3, 4]
    assert batch("--resume") == 1
    assert ran.seeds == []


def test_requests_from_a_pipe_are_read_once(ran: Ran) -> None:
    write(*(SMALL | {"seed": seed} for seed in range(3)))
    content = Path("requests.jsonl").read_bytes()
    os.mkfifo("pipe")
    Thread(target=lambda: Path("pipe").write_bytes(content), daemon=True).start()
    assert batch(requests="pipe") == 0
    assert ran.seeds == [0, 1, 2]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": ["a"]}',
        '{"id": "000001", "status": "done"}',
        '{"id": "000001", "status": "done", "digest": 1, "file": 5, "sha256": "0"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_no_batch_wrote_is_told(ran: Ran, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL | {"seed": 1})
    Path("out").mkdir()
    Path("out/results.jsonl").write_text(f"{line}\n")
    assert batch("--resume") == 2
    expected = "error: --output: line 1 of 'out/results.jsonl' is not a result; remove it, or name another folder\n"
    assert capsys.readouterr().err == expected
