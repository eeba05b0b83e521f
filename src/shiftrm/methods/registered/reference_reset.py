"""Retraining on the same pairs, and the KL of a round to the policy that the round starts from."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

METHODS.register("reference_reset")(
    Method(
        "Retrained, KL to the round's first policy (arXiv 2602.18037)",
        "Reference reset",
        "#332288",
        "s",
        needs=frozenset({"pairs"}),
        training=pairs_only,
        reference_reset=True,
    )
)
