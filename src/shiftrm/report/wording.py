"""Small helpers for sentences."""

from __future__ import annotations


def listing(words: list[str]) -> str:
    """`a`, `a and b`, `a; b and c` (semicolons: names of arms may hold commas)."""
    if len(words) < 2:
        return "".join(words)
    return f"{'; '.join(words[:-1])} and {words[-1]}"


def rounds_text(rounds: list[int]) -> str:
    """`round 2`, `rounds 1, 2 and 3`."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    return f"rounds {', '.join(map(str, rounds[:-1]))} and {rounds[-1]}"
