"""How fast this processor multiplies int8 numbers, from its instruction sets."""

_PRODUCTS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
"""Instruction sets of x86; int8 is faster than fp32 with any of them."""


def multiplies_int8() -> bool:
    """Whether int8 is faster than fp32; also True where the instruction sets are not known."""
    known = _instruction_sets()
    return not known or bool(known & _PRODUCTS)


def multiplies_tiles() -> bool:
    """Whether whole tiles are multiplied at once (AMX)."""
    return "amx_int8" in _instruction_sets()


def _instruction_sets() -> frozenset[str]:
    from .. import machine

    return machine.instruction_sets()
