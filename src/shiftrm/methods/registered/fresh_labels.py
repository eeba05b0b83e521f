"""Training on the pairs and new labels of the policy's responses, drawn at random or chosen.

The chosen ones are those that say most about the last round's reward model (arXiv 1112.5745).
"""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

METHODS.register("fresh_labels")(
    Method(
        "Retrained with {labels} fresh labels a round",
        "{labels} fresh labels",
        "#009E73",
        "P",
        needs=frozenset({"pairs", "labels"}),
        training=pairs_only,
    )
)

METHODS.register("active_labels")(
    Method(
        "Retrained with {labels} actively chosen labels a round",
        "{labels} active labels",
        "#999933",
        "P",
        needs=frozenset({"pairs", "labels"}),
        training=pairs_only,
        label_choice="active",
    )
)
