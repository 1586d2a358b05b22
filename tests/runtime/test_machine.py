"""The description of the machine in reports."""

import pytest
from sparsectrl_lcm.runtime.cpu import integer_products
from sparsectrl_lcm.runtime.machine import machine, memory_bytes, peak_bytes, physical_cores


def test_facts_of_the_machine() -> None:
    import psutil

    facts = machine()
    assert facts["processor"]
    assert 1 <= facts["physical_cores"] == physical_cores() <= psutil.cpu_count()
    assert 0 < (memory_bytes() or 0) <= psutil.virtual_memory().total
    assert psutil.Process().memory_info().rss <= 1.01 * (peak_bytes() or 0)


def test_facts_of_the_machine_tell_what_it_multiplies_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some processors have the same name with and without AMX."""
    monkeypatch.setattr(
        "sparsectrl_lcm.runtime.machine.instruction_sets", lambda: frozenset({"sse2", "amx_int8", "avx2", "fma"})
    )
    assert machine()["instruction_sets"] == ["avx2", "amx_int8"]
    monkeypatch.setattr("sparsectrl_lcm.runtime.machine.instruction_sets", frozenset)
    assert machine()["instruction_sets"] == []


@pytest.mark.parametrize(
    ("sets", "int8", "tiles"),
    [({"avx2"}, False, False), ({"avx2", "avx_vnni"}, True, False), ({"amx_int8"}, True, True), (set(), True, False)],
)
def test_what_a_processor_multiplies_fast(
    sets: set[str], int8: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the instruction sets are not known, int8 gets no warning."""
    monkeypatch.setattr("sparsectrl_lcm.runtime.machine.instruction_sets", lambda: frozenset(sets))
    assert (integer_products.multiplies_int8(), integer_products.multiplies_tiles()) == (int8, tiles)
