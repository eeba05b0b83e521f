"""Training on the pairs and new labels of the policy's responses: the ceiling."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

METHODS.register("fresh_labels")(
    Method(
        "Retrained with 300 fresh labels a round (ceiling)",
        "300 fresh labels",
        "#009E73",
        "P",
        needs=frozenset({"pairs", "labels"}),
        training=pairs_only,
    )
)
