"""The settings of reward-model training that TRL does not have, or has other defaults for."""

from dataclasses import dataclass, field

import trl

from shiftrm.errors import UserError
from shiftrm.trainers.machine import fit_machine

LEARNING_RATE = 1e-5
"""Where all weights are trained: InstructGPT's 6B reward model 9e-6, Llama 2's 1e-5 (5e-6 at 70B),
TRL's example 1e-5. TRL's default of 1e-4, which its example gives to LoRA, is ten times that."""

LEARNING_RATE_LORA = 1e-4


@dataclass
class RewardConfig(trl.RewardConfig):
    """`trl.RewardConfig`, every field with its meaning, and how pairs are computed.

    Three defaults differ: they fit the machine and the way of training. `bf16` is on where an
    accelerator has it; without an accelerator `use_cpu` is on. `RewardTrainer` takes a plain
    `trl.RewardConfig`, too, as it is; prefixes are then shared.

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
        """Only adapters are trained: their learning rate, unless one was given."""
        if not self.learning_rate_given:
            self.learning_rate = LEARNING_RATE_LORA
