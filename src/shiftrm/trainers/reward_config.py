"""Settings of reward-model training that TRL lacks or sets to other defaults."""

from dataclasses import dataclass, field

import trl

from shiftrm.errors import UserError
from shiftrm.trainers.machine import fit_machine

LEARNING_RATE = 1e-5
"""The default if all weights are trained. InstructGPT's 6B reward model used 9e-6, Llama 2's 1e-5
(5e-6 at 70B), TRL's example 1e-5. TRL's default of 1e-4 is what its example uses for LoRA."""

LEARNING_RATE_LORA = 1e-4


@dataclass
class RewardConfig(trl.RewardConfig):
    """`trl.RewardConfig` with fields for how pairs are computed.

    TRL's fields keep their meaning. Three defaults depend on the machine and the way of training.
    `bf16` is on if the accelerator supports it; without an accelerator `use_cpu` is on.
    `RewardTrainer` also takes a plain `trl.RewardConfig` unchanged; prefixes are then shared.

    Attributes:
        learning_rate_given, checkpointing_given: whether they were set; if not, the trainer decides
            once it knows the model.

    Raises:
        UserError: `max_steps` is 0.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Of AdamW. Default: {LEARNING_RATE:g} where all weights are trained, "
            f"{LEARNING_RATE_LORA:g} with LoRA."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass: less memory, more time. "
            "Default: only where they would not fit the memory that is free."
        },
    )
    shared_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Compute the tokens that a pair (or group) has in common once. If the first "
            "batch shows that the model cannot, it is said once and nothing is shared."
        },
    )

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise UserError(
                "max_steps is 0; give at least 1, or leave it out to train num_train_epochs"
            )
        self.learning_rate_given = self.learning_rate is not None
        self.checkpointing_given = (
            self.gradient_checkpointing is not None or self.activation_checkpointing is not None
        )
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        fit_machine(self)
        super().__post_init__()

    def fit_lora(self) -> None:
        """Use the learning rate for adapters, unless one was given."""
        if not self.learning_rate_given:
            self.learning_rate = LEARNING_RATE_LORA
