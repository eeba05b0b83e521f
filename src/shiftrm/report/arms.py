"""Names, order, colours and markers of the arms, for tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shiftrm.methods.method import METHODS

FIXED = "fixed"
RETRAINED = "retrained"
FRESH_LABELS = "fresh_labels"
DPO = "dpo"
SFT = "sft"


@dataclass(frozen=True)
class ArmStyle:
    """Style of an arm. `short` is its name in legends and terminals, `colour` a hex code."""

    name: str
    short: str
    colour: str
    marker: str


# Okabe and Ito's palette suits the common colour-vision deficiencies; the markers differ too.
_OTHERS = {
    DPO: ArmStyle("DPO", "DPO", "#CC79A7", "X"),
    SFT: ArmStyle("SFT", "SFT", "#56B4E9", "*"),
}


def _style(method: str) -> ArmStyle:
    """Return the style that the arm's method declares, or that of a baseline."""
    if method in _OTHERS:
        return _OTHERS[method]
    found = METHODS.get(method)
    return ArmStyle(found.label, found.short, found.colour, found.marker)


_KNOWN = {
    name: _style(name)
    for name in (
        FIXED, RETRAINED, "metarm_paper", "metarm_scale_free", FRESH_LABELS, DPO, SFT,
    )
}  # fmt: skip
ARM_ORDER = tuple(_KNOWN)
_SPARE_COLOURS = ("#882255", "#117733", "#999933", "#332288", "#AA4499", "#44AA99")
_SPARE_MARKERS = ("v", "<", ">", "p", "h", "d")


def in_order(methods: Iterable[str]) -> list[str]:
    """Return the distinct methods: known arms in the order of the demo, then others by name."""
    distinct = set(methods)
    known = [method for method in ARM_ORDER if method in distinct]
    return known + sorted(distinct - set(ARM_ORDER))


def arm_name(method: str) -> str:
    """Return the display name; for an unknown arm, `method` itself."""
    return _KNOWN[method].name if method in _KNOWN else method


def arm_short(method: str) -> str:
    """Return the name for legends and terminal columns; for an unknown arm, `method` itself."""
    return _KNOWN[method].short if method in _KNOWN else method


def arm_styles(methods: Iterable[str]) -> dict[str, ArmStyle]:
    """Return the styles of all arms; unknown arms get the spare colours in sorted order."""
    styles: dict[str, ArmStyle] = {}
    spare = 0
    for method in in_order(methods):
        if method in _KNOWN:
            styles[method] = _KNOWN[method]
            continue
        colour = _SPARE_COLOURS[spare % len(_SPARE_COLOURS)]
        marker = _SPARE_MARKERS[spare % len(_SPARE_MARKERS)]
        styles[method] = ArmStyle(method, method, colour, marker)
        spare += 1
    return styles


def is_metarm(method: str) -> bool:
    """Whether the meta step adapts the arm's reward model."""
    return method.startswith("metarm")


def is_policy_arm(method: str) -> bool:
    """Whether the arm has PPO rounds with a reward model (SFT and DPO have none)."""
    return method not in (SFT, DPO)
