"""Several reward models as one (arXiv 2310.02743, 2401.12187), and one with its uncertainty.

Ensembles and WARM train four reward models, which costs four times as much as `retrained`; an
ensemble also scores four times. `laplace` costs one pass over the pairs more.
"""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training

MEMBERS = 4


def ensemble() -> Training:
    from shiftrm.trainers.members import EnsembleConfig
    from shiftrm.trainers.reward import RewardTrainer

    return Training(EnsembleConfig, RewardTrainer)


def laplace() -> Training:
    from shiftrm.trainers.members import LaplaceConfig
    from shiftrm.trainers.reward import RewardTrainer

    return Training(LaplaceConfig, RewardTrainer)


for name, label, short, look in (
    ("mean", "mean", "Ensemble mean", ("#0072B2", "d")),
    ("min", "minimum", "Ensemble min", ("#332288", "d")),
    ("variance", "mean - k variance", "Ensemble var", ("#44AA99", "d")),
):
    METHODS.register(f"ensemble_{name}")(
        Method(
            f"Ensemble of {MEMBERS}, {label} (trains {MEMBERS} times)",
            short,
            *look,
            needs=frozenset({"pairs"}),
            training=ensemble,
            members=MEMBERS,
            combine=name,
        )
    )

METHODS.register("warm")(
    Method(
        f"WARM: mean of {MEMBERS} models' weights (trains {MEMBERS} times)",
        "WARM",
        "#AA4499",
        "d",
        needs=frozenset({"pairs"}),
        training=ensemble,
        members=MEMBERS,
        combine="warm",
    )
)

METHODS.register("laplace")(
    Method(
        "Retrained, minus 3 posterior standard deviations",
        "Laplace",
        "#661100",
        "d",
        needs=frozenset({"pairs"}),
        training=laplace,
        combine="laplace",
    )
)
