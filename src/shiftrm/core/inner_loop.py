"""The inner loop of the bilevel method: from rewards to weights, and D plain SGD steps on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftrm.core.inner_curvature import InnerLoss, add_into
from shiftrm.core.likelihood import (
    Sequences,
    ambient_autocast,
    autocast_to,
    check_right_padding,
    micro_batches,
    without_dropout,
)
from shiftrm.core.losses import TokenReduction, reward_weights
from shiftrm.models.rewards import sequence_rewards


class InnerBatch(NamedTuple):
    """Fine-tuning examples of one inner step, in the tokens of the policy and of the reward model.

    Attributes:
        policy: the B examples as the policy reads them.
        reward_input_ids: the same examples as the reward model reads them, shape [B, T_r], padded
            on the right; its tokenizer may be another one.
        reward_attention_mask: shape [B, T_r]; the reward is read at the last real token.
    """

    policy: Sequences
    reward_input_ids: Tensor
    reward_attention_mask: Tensor

    def check(self, name: str) -> None:
        """Raises ValueError: shapes that do not fit, left padding, a row without a response."""
        self.policy.check(name)
        B = len(self.policy.input_ids)
        ids, mask = self.reward_input_ids, self.reward_attention_mask
        if ids.shape != mask.shape or ids.dim() != 2 or len(ids) != B:
            raise ValueError(
                f"{name}: reward_input_ids {tuple(ids.shape)} and reward_attention_mask "
                f"{tuple(mask.shape)} must have one shape [B, T_r] with B = {B} as for the policy"
            )
        check_right_padding(mask, f"{name} of the reward model")


@dataclass(frozen=True)
class Rewarder:
    """Passes of the reward model over inner batches.

    Attributes:
        model: a sequence classifier with one label.
        autocast: see `ambient_autocast`.
        micro_batch_size: rows in one pass; None: as many as a batch has.
    """

    model: nn.Module
    autocast: torch.dtype | None
    micro_batch_size: int | None

    @classmethod
    def of(cls, model: nn.Module, *, micro_batch_size: int | None) -> "Rewarder":
        return cls(model, ambient_autocast(model), micro_batch_size)

    def passes(self, batches: Sequence[InnerBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices among the rows of all batches, and their rewards, one micro-batch at a time.

        phi is the same at every step, so rows of like length go together whichever step they are
        of: hardly any padding is left, and it costs no memory.
        """
        device = next(self.model.parameters()).device
        ids = _one_above_the_other([b.reward_input_ids for b in batches])
        mask = _one_above_the_other([b.reward_attention_mask for b in batches])
        lengths = mask.sum(dim=1)
        size = self.micro_batch_size or max(len(b.reward_input_ids) for b in batches)
        for rows in micro_batches(lengths, size):
            T = int(lengths[rows].max())  # padding stands on the right
            with autocast_to(self.autocast, self.model):
                rewards = sequence_rewards(
                    self.model, ids[rows, :T].to(device), mask[rows, :T].to(device)
                )
            yield rows, rewards

    @torch.no_grad()
    def __call__(self, batches: Sequence[InnerBatch]) -> list[Tensor]:
        """Rewards without gradient, of each batch a tensor of shape [B]."""
        rows, rewards = zip(*self.passes(batches), strict=True)
        together = torch.cat(rewards)
        order = torch.cat(rows).to(together.device)
        found = torch.empty_like(together).index_copy_(0, order, together)
        return list(found.split([len(b.reward_input_ids) for b in batches]))

    def gradient(
        self, batches: Sequence[InnerBatch], reward_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Gradient of `sum dL/dr . r_phi` over all batches, by name of the parameter."""
        phi = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in phi.items()
        }
        wanted = torch.cat(list(reward_gradients))
        for rows, rewards in self.passes(batches):
            part = wanted[rows.to(wanted.device)].to(rewards)
            gradient = torch.autograd.grad(rewards, list(phi.values()), part, allow_unused=True)
            add_into(list(total.values()), gradient)
        return total


def _one_above_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts, padded on the right with 0 to the longest; shape [sum of B, T]."""
    T = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, T - part.shape[1])) for part in parts])


@dataclass(frozen=True)
class Unrolled:
    """What the inner loop computed on its way to theta_D.

    Attributes:
        rewards, weights: of the examples of each step, D tensors of shape [B].
        inner_losses: f_t(theta_t) before each step.
        trajectory: the kept theta_t, oldest first, each a list in the order of the parameters.
    """

    rewards: list[Tensor]
    weights: list[Tensor]
    inner_losses: list[float] = field(default_factory=list)
    trajectory: list[list[Tensor]] = field(default_factory=list)


@contextmanager
def unrolled(
    inner: InnerLoss,
    rewarder: Rewarder,
    batches: Sequence[InnerBatch],
    *,
    inner_learning_rate: float,
    beta: float,
    normalize_weights: bool,
    keep_last: int = 0,
    trajectory_device: torch.device | str | None = None,
) -> Iterator[Unrolled]:
    """The policy at theta_D inside the block, and back at theta_0, bit for bit, after it.

    Keeps theta_{D-keep_last}..theta_{D-1}. What is done to the parameters inside is undone too.
    """
    if not 0 < inner_learning_rate < float("inf"):
        raise ValueError(f"inner_learning_rate is {inner_learning_rate}; it must be positive")
    if not batches:
        raise ValueError("there is no inner batch; the inner loop needs D >= 1 of them")
    for t, batch in enumerate(batches):
        batch.check(f"inner batch {t}")
    parameters: list[Tensor] = list(inner.parameters)
    device = parameters[0].device
    rewards = [r.to(device) for r in rewarder(batches)]
    weights = [
        _weights(r, f"inner batch {t}", beta=beta, normalize=normalize_weights)
        for t, r in enumerate(rewards)
    ]
    for t, (r, w) in enumerate(zip(rewards, weights, strict=True)):
        _refuse_zeros(r, w, f"inner batch {t}", beta)
    run = Unrolled(rewards, weights)
    start = _copies(parameters, trajectory_device)
    try:
        for t, batch in enumerate(batches):
            if t >= len(batches) - keep_last:
                run.trajectory.append(start if t == 0 else _copies(parameters, trajectory_device))
            value, gradient = inner.gradient(batch.policy, weights[t])
            run.inner_losses.append(value)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradient, alpha=-inner_learning_rate)
            del gradient
        yield run
    finally:
        copy_into(parameters, start)


@contextmanager
def adapted_policy(
    policy: nn.Module,
    reward_model: nn.Module,
    inner_batches: Sequence[InnerBatch],
    *,
    inner_learning_rate: float,
    beta: float,
    normalize_weights: bool = False,
    reduction: TokenReduction = "sum",
    micro_batch_size: int | None = None,
) -> Iterator[Unrolled]:
    """The policy after the D inner steps inside the block, and as it was after it.

    For evaluation, as of A_PL on held-out pairs. Arguments and errors as for `hypergradient`.
    """
    inner = InnerLoss.of(policy, reduction=reduction, micro_batch_size=micro_batch_size)
    rewarder = Rewarder.of(reward_model, micro_batch_size=micro_batch_size)
    with (
        without_dropout(policy, reward_model),
        unrolled(
            inner,
            rewarder,
            inner_batches,
            inner_learning_rate=inner_learning_rate,
            beta=beta,
            normalize_weights=normalize_weights,
        ) as run,
    ):
        yield run


def _weights(rewards: Tensor, name: str, *, beta: float, normalize: bool) -> Tensor:
    try:
        return reward_weights(rewards, beta=beta, normalize=normalize)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from None


def _refuse_zeros(rewards: Tensor, weights: Tensor, name: str, beta: float) -> None:
    """Raises ValueError where every weight underflows: the step would be none and teach nothing."""
    if not bool(weights.any()):
        raise ValueError(
            f"{name}, example 0: its weight exp(r/beta) and those of the whole batch are 0 in "
            f"{str(weights.dtype).removeprefix('torch.')} (reward {float(rewards[0]):g}, beta "
            f"{beta:g}); use normalised weights or a larger beta"
        )


def _copies(parameters: Sequence[Tensor], device: torch.device | str | None) -> list[Tensor]:
    return [p.detach().to(device or p.device, copy=True) for p in parameters]


@torch.no_grad()
def copy_into(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
