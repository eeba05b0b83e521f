"""Prompt contrast: pairs, and pairs of responses to one prompt and to another (RRM's negatives)."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training


def training() -> Training:
    from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer

    return Training(ContrastConfig, ContrastTrainer, frozenset({"groups"}))


METHODS.register("contrast")(
    Method(
        "Prompt contrast on the policy's responses",
        "Contrast",
        "#F0E442",
        "*",
        needs=frozenset({"pairs", "groups"}),
        training=training,
    )
)
