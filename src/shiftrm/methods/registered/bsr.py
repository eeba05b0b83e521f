"""Batch-wise sum-to-zero regularisation (arXiv 2505.07271)."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training


def training() -> Training:
    from shiftrm.trainers.bsr import BSRConfig, BSRTrainer

    return Training(BSRConfig, BSRTrainer)


METHODS.register("bsr")(
    Method(
        "Retrained, batch sum pulled to zero (BSR, arXiv 2505.07271)",
        "BSR",
        "#44AA99",
        "X",
        needs=frozenset({"pairs"}),
        training=training,
    )
)
