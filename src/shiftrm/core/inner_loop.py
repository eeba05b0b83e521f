"""The inner loop of the bilevel method: D plain SGD steps on a loss weighted by rewards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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

Curvature = Literal["exact", "finite_difference", "none"]
"""How H_t lam is computed; see `InnerSettings`."""

ReadRewards = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`(model, input_ids, attention_mask) -> rewards [B]`, as `models.rewards.sequence_rewards`."""


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
class InnerProblem:
    """The models and the data of an inner loop.

    Attributes:
        policy: causal language model; its trainable parameters are theta_0 (all of them, or LoRA
            adapters), in fp32 or fp64.
        reward_model: sequence classifier with one label; its trainable parameters are phi.
        batches: one batch for each of the D >= 1 steps.
        read_rewards: reads the rewards of a batch from the reward model.
    """

    policy: nn.Module
    reward_model: nn.Module
    batches: Sequence[InnerBatch]
    read_rewards: ReadRewards


@dataclass(frozen=True)
class InnerSettings:
    """How the inner loop runs and how it is differentiated.

    Attributes:
        inner_learning_rate: alpha, the learning rate of the plain SGD steps.
        beta: temperature of the weights, > 0, in units of reward.
        normalize_weights: see `losses.reward_weights`.
        reduction: see `losses.response_log_likelihood`; used for both losses.
        curvature: "exact" differentiates twice; the policy then runs under math attention.
            "finite_difference" uses gradients at theta_t +- eps lam, outside autocast: it works
            with any attention and takes first-order memory, but needs a smooth loss (a mixture of
            experts is not smooth across its routing). "none" drops H_t: exact for D = 1 only.
        last_steps: differentiate through this many last steps only. Earlier steps are taken, but
            their share of the gradient is left out. Default: all.
        micro_batch_size: rows in one pass; changes memory, not the result. Default: all at once.
        curvature_micro_batch_size: rows in one pass that differentiates twice, which takes about
            four times the memory of an ordinary pass. Default: a quarter of micro_batch_size, and
            at least 1.
        finite_difference_step: eps ||lam|| relative to ||theta_t||. Default: 1e-4 in fp32, 1e-5 in
            fp64.
        trajectory_device: where theta_0..theta_{D-1} are kept; default: with the parameters.
    """

    inner_learning_rate: float
    beta: float
    normalize_weights: bool = False
    reduction: TokenReduction = "sum"
    curvature: Curvature = "exact"
    last_steps: int | None = None
    micro_batch_size: int | None = None
    curvature_micro_batch_size: int | None = None
    finite_difference_step: float | None = None
    trajectory_device: torch.device | str | None = None

    def loss(self, policy: nn.Module) -> InnerLoss:
        """The inner loss of `policy`; raises as `InnerLoss.of`."""
        return InnerLoss.of(
            policy,
            reduction=self.reduction,
            micro_batch_size=self.micro_batch_size,
            curvature_micro_batch_size=self.curvature_micro_batch_size,
            relative_step=self.finite_difference_step,
        )


@dataclass(frozen=True)
class Rewarder:
    """Passes of the reward model over inner batches.

    Attributes:
        model: a sequence classifier with one label.
        read_rewards: see `InnerProblem`.
        autocast: see `ambient_autocast`.
        micro_batch_size: rows in one pass; None: as many as a batch has.
    """

    model: nn.Module
    read_rewards: ReadRewards
    autocast: torch.dtype | None
    micro_batch_size: int | None

    @classmethod
    def of(cls, problem: InnerProblem, *, micro_batch_size: int | None) -> "Rewarder":
        model = problem.reward_model
        return cls(model, problem.read_rewards, ambient_autocast(model), micro_batch_size)

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
                rewards = self.read_rewards(
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
    settings: InnerSettings,
    *,
    keep_last: int = 0,
) -> Iterator[Unrolled]:
    """Hold the policy at theta_D inside the block, and restore theta_0, bit for bit, after it.

    Keeps theta_{D-keep_last}..theta_{D-1}. Changes made to the parameters inside are undone too.
    """
    inner_learning_rate, device = settings.inner_learning_rate, settings.trajectory_device
    if not 0 < inner_learning_rate < float("inf"):
        raise ValueError(f"inner_learning_rate is {inner_learning_rate}; it must be positive")
    if not batches:
        raise ValueError("there is no inner batch; the inner loop needs D >= 1 of them")
    for t, batch in enumerate(batches):
        batch.check(f"inner batch {t}")
    parameters: list[Tensor] = list(inner.parameters)
    rewards = [r.to(parameters[0].device) for r in rewarder(batches)]
    weights = [_weights(r, f"inner batch {t}", settings) for t, r in enumerate(rewards)]
    for t, (r, w) in enumerate(zip(rewards, weights, strict=True)):
        _refuse_zeros(r, w, f"inner batch {t}", settings.beta)
    run = Unrolled(rewards, weights)
    start = _copies(parameters, device)
    try:
        for t, batch in enumerate(batches):
            if t >= len(batches) - keep_last:
                run.trajectory.append(start if t == 0 else _copies(parameters, device))
            value, gradient = inner.gradient(batch.policy, weights[t])
            run.inner_losses.append(value)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradient, alpha=-inner_learning_rate)
            del gradient
        yield run
    finally:
        copy_into(parameters, start)


@contextmanager
def adapted_policy(problem: InnerProblem, settings: InnerSettings) -> Iterator[Unrolled]:
    """Hold the policy after the D inner steps inside the block, and restore it afterwards.

    For evaluation, such as A_PL on held-out pairs. Errors as for `hypergradient`.
    """
    inner = settings.loss(problem.policy)
    rewarder = Rewarder.of(problem, micro_batch_size=settings.micro_batch_size)
    with (
        without_dropout(problem.policy, problem.reward_model),
        unrolled(inner, rewarder, problem.batches, settings) as run,
    ):
        yield run


def _weights(rewards: Tensor, name: str, settings: InnerSettings) -> Tensor:
    try:
        return reward_weights(rewards, beta=settings.beta, normalize=settings.normalize_weights)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from None


def _refuse_zeros(rewards: Tensor, weights: Tensor, name: str, beta: float) -> None:
    """Raises ValueError if every weight underflows: such a step would not move the policy."""
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
