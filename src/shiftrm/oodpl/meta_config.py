"""Settings of OODPL meta-training, with help texts and checks."""

import math
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from shiftrm.core.hypergradient import Curvature
from shiftrm.core.losses import TokenReduction
from shiftrm.errors import UserError, suggest

__all__ = ["IDLE", "OODPLConfig"]

IDLE = {
    "num_train_epochs": "training takes max_steps steps; set max_steps",
    "label_names": "tasks have no label columns; leave it out",
    "parallelism_config": "OODPL trains under DDP or on one process; leave it out",
}
"""Settings of transformers that training would not use, or could not, and what to do instead."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class OODPLConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the bilevel method's settings.

    The paper (Jia, arXiv 2402.14760): K outer steps of SGD (`max_steps`, `optim="sgd"`,
    `learning_rate`), D inner steps of plain SGD from the reference policy, weights exp(r/beta).
    Ours: AdamW outside, normalised weights, several tasks per step, mixtures, the mean over tokens,
    the cheaper curvatures and truncation. The paper's values were not available; the defaults are
    ours.

    Raises:
        UserError: an invalid value; names the field.
    """

    max_steps: int = _option(1000, "K: outer steps, that is updates of the reward model.")
    learning_rate: float = _option(1e-4, "Of the outer steps.")
    per_device_train_batch_size: int = _option(1, "Not used: see support_batch_size, query_...")
    remove_unused_columns: bool = _option(False, "Not used: tasks are drawn, not loaded.")
    inner_learning_rate: float = _option(1e-2, "alpha: of the inner SGD steps.")
    inner_steps: int = _option(1, "D: inner steps from the reference policy.")
    beta: float = _option(1.0, "Temperature of the weights exp(r/beta), in units of reward, > 0.")
    normalize_weights: bool = _option(
        False, "Divide the weights by their batch mean (ours): a constant in the reward drops out."
    )
    curvature: str = _option("exact", "Hessian-vector products: exact, finite_difference or none.")
    last_steps: int | None = _option(None, "Differentiate through this many last steps only.")
    support_batch_size: int = _option(16, "Fine-tuning rows of one inner step.")
    query_batch_size: int = _option(16, "Preference pairs of one task.")
    domains_per_step: int = _option(1, "Tasks of an outer step, over all processes.")
    mixture: int = _option(1, "Domains whose rows make up one task (1: the paper's).")
    micro_batch_size: int | None = _option(
        None, "Rows in one pass; changes memory, not the result. Default: all."
    )
    reduction: str = _option("sum", "log pi(y|x) is the sum over tokens, or their mean (ours).")
    max_length: int | None = _option(1024, "Longer rows (prompt and response) are dropped.")
    eval_pairs: int | None = _option(
        256, "Pairs of every watched domain that an evaluation reads. Default: the first 256."
    )
    log_cosine: bool = _option(
        False, "Log the cosine of a cheap against the exact hypergradient, at logging steps."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "inner_learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; it must be above 0")
        counts = ("max_steps", "inner_steps", "support_batch_size", "query_batch_size")
        for name in (*counts, "domains_per_step", "mixture"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("last_steps", "micro_batch_size", "max_length", "eval_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1, or None")
        for name, choices in (("curvature", Curvature), ("reduction", TokenReduction)):
            known, value = list(get_args(choices)), getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}{suggest(str(value), known)}")
        for name in ("support_batch_size", "query_batch_size"):
            if getattr(self, name) < self.mixture:
                raise UserError(
                    f"mixture is {self.mixture}, but {name} is {getattr(self, name)}; a batch "
                    "needs a row of each domain"
                )
        if self.last_steps is not None and self.last_steps > self.inner_steps:
            raise UserError(
                f"last_steps is {self.last_steps}; it must be at most inner_steps, "
                f"{self.inner_steps}"
            )
        self._refuse()

    def _refuse(self) -> None:
        """Refuse settings that would be recorded but not used, or would not work."""
        if self.per_device_train_batch_size != 1:
            raise UserError(
                "per_device_train_batch_size: a step is made of tasks here; set "
                "support_batch_size, query_batch_size and domains_per_step instead"
            )
        if self.gradient_accumulation_steps != 1:
            raise UserError("gradient_accumulation_steps: set domains_per_step instead")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns: there are no columns here; leave it out")
        if self.torch_compile:
            raise UserError(
                "torch_compile=True: gradients are taken through hooks, which torch.compile does "
                "not run; leave it out"
            )
        for name, instead in IDLE.items():
            if getattr(self, name) != getattr(TrainingArguments, name, None):
                raise UserError(f"{name}: {instead}")
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name, None):
                raise UserError(f"{name}: the bilevel losses have none; leave it out")
        if self.fp16:
            raise UserError("fp16=True: the hypergradient has no loss scaling; use bf16=True")
        if self.deepspeed:
            raise UserError("deepspeed: OODPL trains under DDP or on one process; leave it out")
        if self.fsdp:
            raise UserError("fsdp: OODPL trains under DDP or on one process; leave it out")
