"""Training on the same pairs, from today's policy in place of the SFT policy."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

METHODS.register("policy_init")(
    Method(
        "Retrained from the current policy's backbone",
        "Policy backbone",
        "#0072B2",
        "D",
        needs=frozenset({"pairs"}),
        training=pairs_only,
        start="policy",
    )
)
