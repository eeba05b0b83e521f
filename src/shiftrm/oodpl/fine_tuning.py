"""Fine-tune a policy on a domain's data, with examples weighted by a frozen reward model.

The first method of the meta-test: the inner loop of meta-training with more than D steps. With
equal weights it is plain fine-tuning, the baseline.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
from torch import nn

from shiftrm.core.likelihood import Passes, without_dropout
from shiftrm.core.losses import TokenReduction, effective_sample_size, reward_weights
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row
from shiftrm.models.finite import broken_weight
from shiftrm.models.rope import context_limit
from shiftrm.oodpl.batches import Encoder, sequences
from shiftrm.policies.ppo import RewardFunction

__all__ = ["FineTuningConfig", "FineTuningLog", "fine_tune"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings of `fine_tune`."""

    updates: int = _option(100, "optimizer updates")
    batch_size: int = _option(32, "examples of one update")
    learning_rate: float = _option(1e-4, "falls linearly to 0")
    optimizer: str = _option("adamw", "adamw, or sgd as in the inner loop")
    beta: float = _option(1.0, "temperature of the weights exp(r/beta)")
    normalize_weights: bool = _option(True, "divide the weights by their batch mean (ours)")
    reduction: str = _option("sum", "log pi(y|x) is the sum over tokens, or their mean (ours)")
    max_grad_norm: float = _option(1.0, "gradient clipping; 0: none")
    seed: int = _option(0, "decides the order of the examples")

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_grad_norm < 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}; it must not be negative")
        for name, known in (
            ("optimizer", ["adamw", "sgd"]),
            ("reduction", list(get_args(TokenReduction))),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}{suggest(getattr(self, name), known)}"
                )
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option.name} is {value}; it must be finite")


@dataclass(frozen=True)
class FineTuningLog:
    """One update: the loss before it, and how evenly the batch was weighted (1: all equal)."""

    step: int
    loss: float
    effective_sample_share: float


def fine_tune(
    policy: nn.Module,
    tokenizer: Any,
    support: Sequence[Row],
    config: FineTuningConfig,
    *,
    reward_fn: RewardFunction | None = None,
    on_step: Callable[[FineTuningLog], None] | None = None,
) -> list[FineTuningLog]:
    """Minimise `-mean(w log pi(y|x))` over a domain's rows, in place; dropout is off.

    `w = exp(r/beta)` as in the paper (Jia, arXiv 2402.14760); AdamW, more than D steps and weights
    divided by their batch mean are ours. There is no KL penalty: beta and the number of updates
    limit how far the policy moves.

    Args:
        support: `{"prompt", "response", "finished"?}`.
        reward_fn: the frozen reward model, as a `Scorer`; None weighs all rows alike.

    Raises:
        UserError: fewer rows than a batch, a row longer than the policy's context, a weight or
            loss that is not finite (the row is named), or a policy that is not finite at the end.
    """
    if len(support) < config.batch_size:
        raise UserError(
            f"{len(support)} fine-tuning rows, but a batch takes {config.batch_size}; lower "
            "batch_size"
        )
    encoder = Encoder(tokenizer, max_length=context_limit(policy.config))
    tokens = [e.policy for e in encoder.every(encoder.example, support, "fine-tuning row")]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(policy.parameters()).device
    rewards = torch.tensor(support_rewards(reward_fn, support), device=device)
    optimizer = _optimizer(policy, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.updates)
    passes = Passes.of(policy, reduction=config.reduction)  # type: ignore[arg-type]
    logs = []
    order = _endless(len(support), config.seed)
    with without_dropout(policy):
        for step in range(1, config.updates + 1):
            rows = [next(order) for _ in range(config.batch_size)]
            weights = _weights(rewards[rows], rows, config)
            batch = sequences([tokens[i] for i in rows], pad_token_id=pad).to(device)
            loss = -(weights * passes(batch)).mean()
            if not bool(torch.isfinite(loss)):
                raise UserError(
                    f"update {step}: the loss is not finite; lower learning_rate (rows "
                    f"{', '.join(str(i + 1) for i in rows[:4])}, ...)"
                )
            policy.zero_grad()
            loss.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            _step(optimizer, step, config)
            schedule.step()
            share = effective_sample_size(weights) / len(rows)
            logs.append(FineTuningLog(step, float(loss.detach()), share))
            if on_step is not None:
                on_step(logs[-1])
    policy.zero_grad()
    if (weight := broken_weight(policy)) is not None:
        raise UserError(
            f"update {step}, the last: it made the policy's weight {weight} NaN or infinite; lower "
            "learning_rate"
        )
    return logs


def support_rewards(reward_fn: RewardFunction | None, support: Sequence[Row]) -> list[float]:
    """Return the rewards; without a reward model zeros, so that every weight is 1."""
    if reward_fn is None:
        return [0.0] * len(support)
    return [
        float(r)
        for r in reward_fn(
            [row["prompt"] for row in support],
            [row["response"] for row in support],
            finished=[row.get("finished", True) for row in support],
        )
    ]


def _weights(
    rewards_B: torch.Tensor, rows: Sequence[int], config: FineTuningConfig
) -> torch.Tensor:
    try:
        weights = reward_weights(rewards_B, beta=config.beta, normalize=config.normalize_weights)
    except ValueError as error:
        bad = ~torch.isfinite(rewards_B / config.beta)
        if not config.normalize_weights:
            bad = ~torch.isfinite(torch.exp(rewards_B / config.beta))
        row = rows[int(bad.nonzero()[0])] + 1 if bool(bad.any()) else rows[0] + 1
        raise UserError(f"fine-tuning row {row}: {str(error).partition(': ')[2]}") from None
    if not bool(weights.any()):  # nothing would be learned
        raise UserError(
            f"fine-tuning row {rows[0] + 1}: its weight exp(r/beta) and those of its whole batch "
            f"are 0 in float32 (reward {float(rewards_B[0]):g}, beta {config.beta:g}); use "
            "normalised weights or a larger beta"
        )
    return weights


def _optimizer(policy: nn.Module, config: FineTuningConfig) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=config.learning_rate)
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)


def _step(optimizer: torch.optim.Optimizer, step: int, config: FineTuningConfig) -> None:
    try:
        optimizer.step()
    except RuntimeError as error:  # Adam's step is larger than the learning rate at first
        if "overflow" not in str(error):
            raise
        raise UserError(
            f"update {step}: learning_rate is {config.learning_rate:g}, too large for float32; "
            "lower it"
        ) from None


def _endless(count: int, seed: int) -> Any:
    """Yield indices in shuffled order, endlessly."""
    rng = random.Random(f"fine-tuning/{seed}")
    while True:
        yield from rng.sample(range(count), count)
