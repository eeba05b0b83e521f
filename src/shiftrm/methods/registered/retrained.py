"""Training on the same pairs again."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

METHODS.register("retrained")(
    Method(
        "Retrained on the same pairs",
        "Retrained",
        "#0072B2",
        "s",
        needs=frozenset({"pairs"}),
        training=pairs_only,
    )
)
