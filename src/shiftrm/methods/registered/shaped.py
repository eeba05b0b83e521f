"""Retraining on the same pairs, and PPO on a bounded transformation of the reward."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import pairs_only

for name, label, short, look in (
    ("log_sigmoid", "Retrained, log-sigmoid reward (arXiv 2402.00742)", "Log-sigmoid", "#56B4E9"),
    ("par", "Retrained, preference as reward (arXiv 2502.18770)", "PAR", "#882255"),
    ("clip", "Retrained, reward clipped to the SFT policy's range", "Clipped", "#D55E00"),
):
    METHODS.register(name)(
        Method(
            label,
            short,
            look,
            "h",
            needs=frozenset({"pairs"}),
            training=pairs_only,
            policy_settings={"reward_shaping": name},
        )
    )
