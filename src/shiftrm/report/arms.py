"""Names, order, colours and markers of the arms: one place, so that tables and pictures agree."""

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
    """How one arm is shown. `short` is for legends and terminals, `colour` is a hex code."""

    name: str
    short: str
    colour: str
    marker: str


# Colours: Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies;
# the markers differ too, so that nothing depends on colour alone.
_OTHERS = {
    DPO: ArmStyle("DPO", "DPO", "#CC79A7", "X"),
    SFT: ArmStyle("SFT", "SFT", "#56B4E9", "*"),
}


def _style(method: str) -> ArmStyle:
    """The style of an arm of the demo: what its method declares, or one of the baselines'."""
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
    """The distinct methods: known arms in the order of the demo, then the others by name."""
    distinct = set(methods)
    known = [method for method in ARM_ORDER if method in distinct]
    return known + sorted(distinct - set(ARM_ORDER))


def arm_name(method: str) -> str:
    """The name for people; an unknown arm is shown as it is."""
    return _KNOWN[method].name if method in _KNOWN else method


def arm_short(method: str) -> str:
    """A name short enough for a legend or a terminal column; an unknown arm is shown as it is."""
    return _KNOWN[method].short if method in _KNOWN else method


def arm_styles(methods: Iterable[str]) -> dict[str, ArmStyle]:
    """Styles of all arms of a run; unknown arms get the spare colours in their sorted order."""
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
    """True for the arms whose reward model is adapted by the meta step."""
    return method.startswith("metarm")


def is_policy_arm(method: str) -> bool:
    """True for the arms of the loop: PPO rounds under a reward model (so not SFT, not DPO)."""
    return method not in (SFT, DPO)
