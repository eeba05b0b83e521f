"""The last reward model's head, trained on its own best and worst of each group (arXiv 2601.22664).

A control: labels by the model itself hold nothing that it does not believe already.
"""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training


def training() -> Training:
    from shiftrm.trainers.self_labelled import SelfLabelledConfig, SelfLabelledTrainer

    return Training(SelfLabelledConfig, SelfLabelledTrainer, frozenset({"groups"}))


METHODS.register("self_labelled")(
    Method(
        "Head trained on the model's own labels (arXiv 2601.22664)",
        "Own labels",
        "#AA4499",
        ">",
        needs=frozenset({"groups"}),
        training=training,
        start="reward",
    )
)
