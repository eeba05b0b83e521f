"""The settings of reward-model training that TRL does not have."""

from dataclasses import dataclass, field

import trl


@dataclass
class RewardConfig(trl.RewardConfig):
    """`trl.RewardConfig`, every field with its meaning, and how pairs are computed.

    `RewardTrainer` takes a plain `trl.RewardConfig`, too; prefixes are then shared.
    """

    shared_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Compute the tokens that a pair (or group) has in common once. If the first "
            "batch shows that the model cannot, it is said once and nothing is shared."
        },
    )
