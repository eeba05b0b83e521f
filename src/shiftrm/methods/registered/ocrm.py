"""Off-policy corrected reward modelling (arXiv 2507.15507): pairs weighted by today's policy.

As in the paper, the KL of the round is to the policy that the round starts from.
"""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training


def training() -> Training:
    from shiftrm.trainers.ocrm import OCRMConfig, OCRMTrainer

    return Training(OCRMConfig, OCRMTrainer, frozenset({"policy"}))


METHODS.register("ocrm")(
    Method(
        "Pairs weighted by the current policy, KL to it (OCRM, arXiv 2507.15507)",
        "OCRM",
        "#CC79A7",
        "X",
        needs=frozenset({"pairs", "policy"}),
        training=training,
        reference_reset=True,
    )
)
