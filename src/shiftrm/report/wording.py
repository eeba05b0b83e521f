"""Shared sentences and helpers for sentences."""

from __future__ import annotations

ONE_SEED = (
    "This is one seed, and one seed proves little: another seed can turn the order of the arms "
    "around. Run several seeds before believing a difference."
)


def listing(words: list[str]) -> str:
    """Join words as `a`, `a and b`, `a; b and c` (names of arms may contain commas)."""
    if len(words) < 2:
        return "".join(words)
    return f"{'; '.join(words[:-1])} and {words[-1]}"


def rounds_text(rounds: list[int]) -> str:
    """Format rounds as `round 2` or `rounds 1, 2 and 3`."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    return f"rounds {', '.join(map(str, rounds[:-1]))} and {rounds[-1]}"
