"""Weights in prompts."""

import time
from math import inf

import pytest
from sparsectrl_lcm.runtime.loop.prompt_syntax import parse_weights

UP, DOWN = 1.1, 1 / 1.1
CASES: list[tuple[str, list[tuple[str, float]]]] = [
    ("", []),
    ("a red ball", [("a red ball", 1)]),
    ("a (red:1.3) ball", [("a ", 1), ("red", 1.3), (" ball", 1)]),
    ("a (red) [blue] ball", [("a ", 1), ("red", UP), (" ", 1), ("blue", DOWN), (" ball", 1)]),
    ("((red)) [[blue]]", [("red", UP**2), (" ", 1), ("blue", DOWN**2)]),
    ("(a (red:1.5) ball:.8)", [("a ", 0.8), ("red", 1.2), (" ball", 0.8)]),
    (r"a \(red\) \[blue\] (sea\)side: 0.5 )", [("a (red) [blue] ", 1), ("sea)side", 0.5)]),
    (r"a \\(red) \ball", [("a \\", 1), ("red", UP), (r" \ball", 1)]),
    ("a (red: ball)", [("a ", 1), ("red: ball", UP)]),
    ("time: 12:30)", [("time: 12:30)", 1)]),
    ("a (red ball", [("a ", 1), ("red ball", UP)]),
    ("a red] ball :1.2)", [("a red] ball :1.2)", 1)]),
    ("(a [b) c] d", [("a ", UP), ("b", 1), (" c", DOWN), (" d", 1)]),
    ("[(:2)(()])", []),
    ("(red)(ball) (off:0)", [("redball", UP), (" ", 1), ("off", 0)]),
]


@pytest.mark.parametrize(("prompt", "expected"), CASES)
def test_fragments_and_their_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_thousands_of_brackets_take_no_time() -> None:
    begun = time.process_time()
    (*_, last) = parse_weights("(a" * 20_000)
    assert last.weight == inf
    assert len(parse_weights("([a" * 10_000 + ")]" * 10_000)) < 30_000
    assert time.process_time() - begun < 5, "seconds; they grow with the length, not with its square"
