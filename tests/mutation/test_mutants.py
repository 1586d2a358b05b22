"""The changes that a mutation run tries, on a small source."""

from mutants import find_mutants

SOURCE = '''"""A docstring."""
import logging

LIMIT = 3


@decorated(frozen=True)
def search(names: list[str], key="ä") -> int | None:
    for index, name in enumerate(names):
        if index < LIMIT and not name:
            continue
        if name == key:
            return index
    raise ValueError(f"no {key} in {len(names) + 1} names")


def notify(items):
    log.info("%d items", len(items))
    send([item for item in items if item], retry=False)
    total = 0.5
    total += 1
    return None
'''
EXPECTED = {
    "LIMIT = (4)",
    'key=(\'äX\')) -> int',
    "if (index <= LIMIT) and not name:",
    "if (index < LIMIT or not name):",
    "if (not (index < LIMIT and (not name))):",
    "if index < LIMIT and (name):",
    "break",
    "if (name != key):",
    "if (not name == key):",
    "return None",
    "pass",
    "if (True)], retry=False)",
    "retry=(True))",
    "(send([item for item in items if item]))",
    "total = (1.0)",
    "total += (2)",
}  # fmt: skip


def test_each_change_is_one_of_the_source() -> None:
    mutants = find_mutants("a.py", SOURCE)
    changed = [mutant.apply(SOURCE) for mutant in mutants]
    assert all(mutant.compiles(SOURCE) for mutant in mutants)
    assert len(set(changed)) == len(changed)
    for text in EXPECTED:
        assert any(text in source for source in changed), text
    assert sum("    pass\n" in source for source in changed) == 3, "the raise, the call and the sum"
    for source in changed:
        assert 'log.info("%d items", len(items))' in source
        assert 'raise ValueError(f"no {key} in {len(names) + 1} names")' in source or "    pass\n" in source
        assert "@decorated(frozen=True)" in source


def test_a_mutant_knows_its_statement() -> None:
    source = "def f(a):\n    if (\n        a > 1\n    ):\n        return 2\n"
    found = {mutant.before: (mutant.first, mutant.last, mutant.function) for mutant in find_mutants("a.py", source)}
    assert found == {"a > 1": (2, 4, True), "1": (2, 4, True), "return 2": (5, 5, True), "2": (5, 5, True)}
