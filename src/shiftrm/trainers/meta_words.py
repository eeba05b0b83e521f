"""Say whether the influence of a meta step is far too small or too large, and what to do."""

from shiftrm.measure.diagnosis.thresholds import INFLUENCE_CEILING, INFLUENCE_FLOOR

BY_EFFECT = "set preset=by_effect, which chooses the length of the step, or"


def too_small(influence: float, *, by_effect: bool) -> str:
    """Return a sentence if the mean influence of a run is below the floor, else ""."""
    if influence >= INFLUENCE_FLOOR:
        return ""
    longer = "raise meta_effect or meta_loss_rise"
    if not by_effect:
        longer = f"{BY_EFFECT} raise meta_learning_rate"
    return f"That is too small to matter: {longer}."


def too_large(influence: float, *, by_effect: bool) -> str:
    """Return sentences if the influence of a step is above the ceiling, else ""."""
    if influence <= INFLUENCE_CEILING:
        return ""
    shorter = "lower meta_effect or meta_loss_rise"
    if not by_effect:
        shorter = f"{BY_EFFECT} lower meta_learning_rate"
    return (
        f"Above {INFLUENCE_CEILING:g} the meta step, which uses no labels, outweighs the pairs: "
        f"rewards become louder but rarely sharper; {shorter}."
    )
