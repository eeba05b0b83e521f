"""Generalizable reward model (arXiv 2406.10216): a text loss on the reward model's backbone."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training


def training() -> Training:
    from shiftrm.trainers.grm import GRMConfig, GRMTrainer

    return Training(GRMConfig, GRMTrainer)


METHODS.register("grm")(
    Method(
        "Retrained with a text loss (GRM, arXiv 2406.10216)",
        "GRM",
        "#999933",
        "8",
        needs=frozenset({"pairs"}),
        training=training,
    )
)
