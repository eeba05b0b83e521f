"""The bilevel gradient of a reward model through D policy steps, without a graph across them.

Jia, "Generalizing Reward Modeling for Out-of-Distribution Preference Learning" (arXiv 2402.14760).
Inner loop, from the reference policy theta_0, on fine-tuning data:

    theta_{t+1} = theta_t - alpha * grad f_t(theta_t),   t = 0..D-1
    f_t(theta) = 1/B sum_i w_{t,i} l_i(theta),   l_i = -log pi_theta(y_i|x_i),   w = exp(r_phi/beta)

Outer loss, on preference pairs: `L = mean -log sigmoid(log pi_{theta_D}(y|x) - log pi(y'|x))`.
Wanted: the total derivative of L by phi, through all D steps.

phi enters the inner loop only through one scalar weight a sample, so reward model and policy never
share a graph (ours; the paper does not say how it is computed):

1. r_phi without gradient gives the weights; take the D steps, keeping theta_0..theta_D.
2. lam = grad L(theta_D), an ordinary backward pass.
3. For t = D-1..0: `dL/dw_{t,i} = -(alpha/B) <lam, grad l_i(theta_t)>`, then
   `lam <- lam - alpha H_t lam`, H_t the Hessian of f_t at theta_t.
4. One ordinary backward pass of the reward model on `sum dL/dr . r_phi`.

What the paper says: the two losses, plain SGD inside, differentiation through all D steps. Ours:
normalised weights, the mean over tokens, truncation, the cheaper curvatures, no dropout in either
model (the passes must see the same function), and LoRA. Knows no trainer; torch only, and `scoring`
for rewards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from shiftrm.core.inner_curvature import InnerLoss, add_into, say_once
from shiftrm.core.inner_loop import (
    InnerBatch,
    Rewarder,
    adapted_policy,
    copy_into,
    unrolled,
)
from shiftrm.core.likelihood import (
    Passes,
    Sequences,
    attention_kernel,
    autocast_to,
    join,
    micro_batches,
    require_plain_checkpointing,
    require_smooth,
    require_symmetric_hessian,
    without_dropout,
)
from shiftrm.core.losses import TokenReduction, effective_sample_size, preference_policy_loss

__all__ = [
    "Hypergradient",
    "InnerBatch",
    "OuterBatch",
    "Sequences",
    "adapted_policy",
    "gradient_cosine",
    "hypergradient",
    "preference_margins",
]

Curvature = Literal["exact", "finite_difference", "none"]
"""How H_t lam is computed; see `hypergradient`."""


class OuterBatch(NamedTuple):
    """Preference pairs as the policy reads them; row i of both sides answers the same prompt."""

    chosen: Sequences
    rejected: Sequences

    def check(self) -> None:
        """Raises ValueError: sides of different size, or as `Sequences.check`."""
        self.chosen.check("outer batch, chosen")
        self.rejected.check("outer batch, rejected")
        sizes = len(self.chosen.input_ids), len(self.rejected.input_ids)
        if sizes[0] != sizes[1]:
            raise ValueError(f"outer batch: {sizes[0]} chosen but {sizes[1]} rejected responses")


@dataclass(frozen=True)
class Hypergradient:
    """What `hypergradient` returns.

    Attributes:
        outer_loss: L, the mean of l_PL over the outer batch, at theta_D.
        gradients: dL/dphi by name, for every trainable parameter of the reward model; fp32 at
            least.
        margins: A = log pi(y|x) - log pi(y'|x) at theta_D, shape [B_outer].
        rewards: r_phi of the examples of each inner step, D tensors of shape [B].
        weights: their weights w, D tensors of shape [B].
        reward_gradients: dL/dr of each example, D tensors of shape [B]; zero at truncated steps.
        inner_losses: f_t(theta_t) before each of the D steps.
        adapted: theta_D by name, if asked for.
    """

    outer_loss: float
    gradients: dict[str, Tensor]
    margins: Tensor
    rewards: list[Tensor]
    weights: list[Tensor]
    reward_gradients: list[Tensor]
    inner_losses: list[float]
    adapted: dict[str, Tensor] | None = None

    @property
    def accuracy(self) -> float:
        """A_PL: the share of pairs with A > 0."""
        return float((self.margins > 0).float().mean())

    @property
    def effective_sample_size(self) -> list[float]:
        """`(sum w)^2 / sum w^2` of each step: B if all weights are equal, 1 if one has them all."""
        return [effective_sample_size(w) for w in self.weights]


def hypergradient(
    policy: nn.Module,
    reward_model: nn.Module,
    inner_batches: Sequence[InnerBatch],
    outer_batch: OuterBatch,
    *,
    inner_learning_rate: float,
    beta: float,
    normalize_weights: bool = False,
    reduction: TokenReduction = "sum",
    curvature: Curvature = "exact",
    last_steps: int | None = None,
    micro_batch_size: int | None = None,
    curvature_micro_batch_size: int | None = None,
    finite_difference_step: float | None = None,
    trajectory_device: torch.device | str | None = None,
    return_adapted: bool = False,
) -> Hypergradient:
    """dL/dphi through D inner steps, one step's graph at a time.

    Neither model is changed: the policy's parameters are moved and copied back, bit for bit, also
    after an exception; `.grad` is not touched. Call it inside `torch.autocast` for mixed precision.

    Args:
        policy: causal language model; its trainable parameters are theta_0 (all of them, or LoRA
            adapters), in fp32 or fp64.
        reward_model: sequence classifier with one label; its trainable parameters are phi.
        inner_batches: one batch for each of the D >= 1 steps.
        outer_batch: preference pairs.
        inner_learning_rate: alpha, of the plain SGD steps.
        beta: temperature of the weights, > 0, in units of reward.
        normalize_weights: see `losses.reward_weights`.
        reduction: see `losses.response_log_likelihood`; for both losses.
        curvature: "exact" by differentiating twice, for which the policy runs under math attention
            whatever its kernel is elsewhere.
            "finite_difference" from gradients at theta_t +- eps lam, outside autocast: any
            attention, first-order memory, and as close as the loss is smooth (not across the
            routing of a mixture of experts). "none" drops H_t: exact for D = 1, wrong beyond.
        last_steps: differentiate through this many last steps only; earlier steps are taken, but
            what they owe to phi is left out. Default: all.
        micro_batch_size: rows in one pass; changes memory, not the result. Default: all at once.
        curvature_micro_batch_size: rows in one pass that differentiates twice, which takes about
            four times the memory of an ordinary one. Default: a quarter of micro_batch_size, and
            1 at least.
        finite_difference_step: eps ||lam|| relative to ||theta_t||. Default: 1e-4 in fp32, 1e-5 in
            fp64.
        trajectory_device: where theta_0..theta_{D-1} are kept; default: with the parameters.
        return_adapted: also return theta_D.

    Raises:
        ValueError: a parameter out of its range, shapes that do not fit, left padding, an example
            without response, nothing trainable; a weight that is not finite (the message names the
            inner batch and the example).
        UserError: trainable half-precision parameters, reentrant checkpointing, or
            curvature="finite_difference" where torch's gradient is no function's gradient.
    """
    D = len(inner_batches)
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature is {curvature!r}; expected one of {get_args(Curvature)}")
    if last_steps is not None and not 1 <= last_steps <= D:
        raise ValueError(f"last_steps is {last_steps}; it must be between 1 and D = {D}")
    outer_batch.check()
    _check_models(policy, reward_model)
    require_plain_checkpointing(policy, "policy")
    require_plain_checkpointing(reward_model, "reward model")
    first = D - (last_steps or D)
    if curvature == "exact" and D - first > 1 and attention_kernel(policy) != "eager":
        say_once("math attention is used where the policy is differentiated twice")
    if curvature == "finite_difference" and D - first > 1:
        require_smooth(policy)
        require_symmetric_hessian(policy, (b.policy for b in inner_batches))
    inner = InnerLoss.of(
        policy,
        reduction=reduction,
        micro_batch_size=micro_batch_size,
        curvature_micro_batch_size=curvature_micro_batch_size,
        relative_step=finite_difference_step,
    )
    rewarder = Rewarder.of(reward_model, micro_batch_size=micro_batch_size)
    # Forward passes enter the caller's autocast again, one by one; see `autocast_to`.
    with (
        without_dropout(policy, reward_model),
        autocast_to(None, policy),
        autocast_to(None, reward_model),
    ):
        with unrolled(
            inner,
            rewarder,
            inner_batches,
            inner_learning_rate=inner_learning_rate,
            beta=beta,
            normalize_weights=normalize_weights,
            keep_last=D - first,
            trajectory_device=trajectory_device,
        ) as run:  # step 1
            adapted = _copies(policy) if return_adapted else None
            outer_loss, margins, lam = _outer_gradient(inner, outer_batch)  # step 2
            reward_gradients = [torch.zeros_like(w) for w in run.weights]
            for t in range(D - 1, first - 1, -1):  # step 3
                copy_into(inner.parameters, run.trajectory.pop())
                batch, weights = inner_batches[t].policy, run.weights[t]
                # The chain ends at its first step: nothing uses lam after it.
                rule = "none" if t == first else curvature
                products, curved = _products(inner, batch, weights, lam, curvature=rule)
                # dL/dlog w = w dL/dw is all that is needed, and is finite for any weight.
                reward_gradients[t] = _through_weights(
                    -inner_learning_rate * products, weights, beta=beta, normalize=normalize_weights
                )
                if curved is not None:
                    torch._foreach_add_(lam, curved, alpha=-inner_learning_rate)
                del curved
        gradients = rewarder.gradient(inner_batches[first:], reward_gradients[first:])  # step 4
    return Hypergradient(
        outer_loss=outer_loss,
        gradients=gradients,
        margins=margins,
        rewards=run.rewards,
        weights=run.weights,
        reward_gradients=reward_gradients,
        inner_losses=run.inner_losses,
        adapted=adapted,
    )


def preference_margins(
    policy: nn.Module,
    batch: OuterBatch,
    *,
    reduction: TokenReduction = "sum",
    micro_batch_size: int | None = None,
) -> Tensor:
    """A = log pi(y|x) - log pi(y'|x) of each pair, without gradient, shape [B].

    A_PL, the preference-learning accuracy, is the share above 0. Arguments as `hypergradient`.
    """
    batch.check()
    passes = Passes.of(policy, reduction=reduction)
    B = len(batch.chosen.input_ids)
    with torch.no_grad(), without_dropout(policy):
        parts = [(rows, _margins(passes, p)) for rows, p in _pairs(batch, micro_batch_size)]
    margins_B = parts[0][1].new_empty(B)
    for rows, margins in parts:
        margins_B[rows] = margins
    return margins_B


def gradient_cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Cosine between two gradients, all parameters together; NaN if one of them is zero."""

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name].double() * b[name].double()).sum()) for name in left)

    squares = dot(left, left) * dot(right, right)
    return dot(left, right) / squares**0.5 if squares > 0 else float("nan")


def _products(
    inner: InnerLoss, batch: Sequences, weights: Tensor, lam: list[Tensor], *, curvature: Curvature
) -> tuple[Tensor, list[Tensor] | None]:
    """`<lam, grad (w_i l_i / B)>` at the present parameters, and H lam unless it is dropped."""
    if curvature == "exact":
        return inner.exact(batch, weights, lam)
    if curvature == "finite_difference":
        return inner.finite_difference(batch, weights, lam)
    return inner.products(batch, weights, lam), None


def _through_weights(
    log_weight_gradients: Tensor, weights: Tensor, *, beta: float, normalize: bool
) -> Tensor:
    """dL/dr from q = dL/dlog w, shape [B].

    `log w_i = r_i/beta`, and for normalised weights `- log mean_j exp(r_j/beta)`, whose derivative
    by r_j is `w_j / (B beta)`.
    """
    q = log_weight_gradients
    if normalize:
        q = q - weights * q.mean()
    return q / beta


def _outer_gradient(inner: InnerLoss, batch: OuterBatch) -> tuple[float, Tensor, list[Tensor]]:
    """L, the margins A and lam = grad L at the present parameters."""
    B = len(batch.chosen.input_ids)
    lam = [torch.zeros_like(p) for p in inner.parameters]
    margins_B = lam[0].new_empty(B)
    for rows, pairs in _pairs(batch, inner.micro_batch_size):
        margins = _margins(inner.passes, pairs)
        loss = _loss(margins).sum() / B
        add_into(lam, torch.autograd.grad(loss, inner.parameters, allow_unused=True))
        margins_B[rows] = margins.detach()
    return float(_loss(margins_B).mean()), margins_B, lam


def _loss(margins: Tensor) -> Tensor:
    return preference_policy_loss(margins, torch.zeros_like(margins))


def _pairs(batch: OuterBatch, micro_batch_size: int | None) -> Iterator[tuple[Tensor, OuterBatch]]:
    """Micro-batches of pairs with their indices; a pair is two rows."""
    size = None if micro_batch_size is None else max(1, micro_batch_size // 2)
    lengths = torch.maximum(batch.chosen.lengths, batch.rejected.lengths)
    for rows in micro_batches(lengths, size):
        yield rows, OuterBatch(batch.chosen.rows(rows), batch.rejected.rows(rows))


def _margins(passes: Passes, pairs: OuterBatch) -> Tensor:
    chosen, rejected = passes(join(*pairs)).chunk(2)
    return chosen - rejected


def _copies(policy: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}


def _check_models(policy: nn.Module, reward_model: nn.Module) -> None:
    phi = {id(p) for p in reward_model.parameters() if p.requires_grad}
    if not phi:
        raise ValueError("the reward model has no trainable parameter")
    if any(id(p) in phi for p in policy.parameters() if p.requires_grad):
        raise ValueError(
            "policy and reward model share trainable parameters; give each its own adapters"
        )
