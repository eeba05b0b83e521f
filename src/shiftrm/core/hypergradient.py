"""The bilevel gradient of a reward model through D policy steps, without a graph across them.

Jia, "Generalizing Reward Modeling for Out-of-Distribution Preference Learning" (arXiv 2402.14760).
Inner loop, from the reference policy theta_0, on fine-tuning data:

    theta_{t+1} = theta_t - alpha * grad f_t(theta_t),   t = 0..D-1
    f_t(theta) = 1/B sum_i w_{t,i} l_i(theta),   l_i = -log pi_theta(y_i|x_i),   w = exp(r_phi/beta)

Outer loss, on preference pairs: `L = mean -log sigmoid(log pi_{theta_D}(y|x) - log pi(y'|x))`.
The result is the total derivative of L by phi, through all D steps.

phi enters the inner loop only through one scalar weight per sample, so reward model and policy
never share a graph (ours; the paper does not say how it computes the derivative):

1. Compute the weights from r_phi without gradient; take the D steps and keep theta_0..theta_D.
2. lam = grad L(theta_D), an ordinary backward pass.
3. For t = D-1..0: `dL/dw_{t,i} = -(alpha/B) <lam, grad l_i(theta_t)>`, then
   `lam <- lam - alpha H_t lam`, H_t the Hessian of f_t at theta_t.
4. One ordinary backward pass of the reward model on `sum dL/dr . r_phi`.

From the paper: the two losses, plain SGD inside, differentiation through all D steps. Ours:
normalised weights, the mean over tokens, truncation, the cheaper curvatures, no dropout in either
model (all passes must compute the same function), and LoRA. Imports torch only; the caller passes
the reward function.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from shiftrm.core.inner_curvature import InnerLoss, add_into, say_once
from shiftrm.core.inner_loop import (
    Curvature,
    InnerBatch,
    InnerProblem,
    InnerSettings,
    Rewarder,
    Unrolled,
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
    "InnerProblem",
    "InnerSettings",
    "OuterBatch",
    "Sequences",
    "adapted_policy",
    "gradient_cosine",
    "hypergradient",
    "preference_margins",
]


class OuterBatch(NamedTuple):
    """Preference pairs as token sequences; row i of both sides answers the same prompt."""

    chosen: Sequences
    rejected: Sequences

    def check(self) -> None:
        """Raise ValueError if the sides differ in size, or as `Sequences.check` does."""
        self.chosen.check("outer batch, chosen")
        self.rejected.check("outer batch, rejected")
        sizes = len(self.chosen.input_ids), len(self.rejected.input_ids)
        if sizes[0] != sizes[1]:
            raise ValueError(f"outer batch: {sizes[0]} chosen but {sizes[1]} rejected responses")


@dataclass(frozen=True)
class Hypergradient:
    """The result of `hypergradient`.

    Attributes:
        outer_loss: L, the mean of l_PL over the outer batch, at theta_D.
        gradients: dL/dphi by name, for every trainable parameter of the reward model; fp32 at
            least.
        margins: A = log pi(y|x) - log pi(y'|x) at theta_D, shape [B_outer].
        rewards: r_phi of the examples of each inner step, D tensors of shape [B].
        weights: their weights w, D tensors of shape [B].
        reward_gradients: dL/dr of each example, D tensors of shape [B]; zero at truncated steps.
        inner_losses: f_t(theta_t) before each of the D steps.
        adapted: theta_D by name, if requested.
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
        """A_PL, the share of pairs with A > 0."""
        return float((self.margins > 0).float().mean())

    @property
    def effective_sample_size(self) -> list[float]:
        """`(sum w)^2 / sum w^2` of each step: B if all weights are equal, 1 if one has them all."""
        return [effective_sample_size(w) for w in self.weights]


def hypergradient(
    problem: InnerProblem,
    outer_batch: OuterBatch,
    settings: InnerSettings,
    *,
    return_adapted: bool = False,
) -> Hypergradient:
    """Compute dL/dphi through D inner steps, one step's graph at a time.

    Neither model is changed: the policy's parameters are moved and restored bit for bit, also after
    an exception; `.grad` is not touched. Call it inside `torch.autocast` for mixed precision.

    Args:
        problem: both models and the D inner batches.
        outer_batch: preference pairs.
        settings: settings of the inner loop and its differentiation.
        return_adapted: also return theta_D.

    Raises:
        ValueError: a parameter out of range, mismatched shapes, left padding, an example without
            response, nothing trainable, or a weight that is not finite (the message names the inner
            batch and the example).
        UserError: trainable half-precision parameters, reentrant checkpointing, or a policy that
            curvature="finite_difference" cannot handle.
    """
    policy, batches, D = problem.policy, problem.batches, len(problem.batches)
    first = D - (_steps_to_differentiate(problem, settings) or D)
    outer_batch.check()
    _check_models(policy, problem.reward_model)
    if D - first > 1:
        _check_curvature(problem, settings.curvature)
    inner = settings.loss(policy)
    rewarder = Rewarder.of(problem, micro_batch_size=settings.micro_batch_size)
    # Forward passes enter the caller's autocast again, one by one; see `autocast_to`.
    with (
        without_dropout(policy, problem.reward_model),
        autocast_to(None, policy),
        autocast_to(None, problem.reward_model),
    ):
        with unrolled(inner, rewarder, batches, settings, keep_last=D - first) as run:  # step 1
            adapted = _copies(policy) if return_adapted else None
            outer_loss, margins, lam = _outer_gradient(inner, outer_batch)  # step 2
            reward_gradients = _back_through_steps(inner, batches, run, lam, settings, first=first)
        gradients = rewarder.gradient(batches[first:], reward_gradients[first:])  # step 4
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
    """Return A = log pi(y|x) - log pi(y'|x) of each pair, without gradient, shape [B].

    A_PL, the preference-learning accuracy, is the share above 0. Arguments as in `hypergradient`.
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
    """Return the cosine of two gradients over all parameters; NaN if one of them is zero."""

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name].double() * b[name].double()).sum()) for name in left)

    squares = dot(left, left) * dot(right, right)
    return dot(left, right) / squares**0.5 if squares > 0 else float("nan")


def _back_through_steps(
    inner: InnerLoss,
    batches: Sequence[InnerBatch],
    run: Unrolled,
    lam: list[Tensor],
    settings: InnerSettings,
    *,
    first: int,
) -> list[Tensor]:
    """Return dL/dr of each step's examples (step 3); empties the trajectory and changes lam."""
    reward_gradients = [torch.zeros_like(w) for w in run.weights]
    for t in range(len(batches) - 1, first - 1, -1):
        copy_into(inner.parameters, run.trajectory.pop())
        weights = run.weights[t]
        # Nothing uses lam after the first step.
        rule = "none" if t == first else settings.curvature
        products, curved = _products(inner, batches[t].policy, weights, lam, curvature=rule)
        # dL/dlog w = w dL/dw is sufficient, and finite for any weight.
        q = -settings.inner_learning_rate * products
        reward_gradients[t] = _through_weights(q, weights, settings)
        if curved is not None:
            torch._foreach_add_(lam, curved, alpha=-settings.inner_learning_rate)
        del curved
    return reward_gradients


def _products(
    inner: InnerLoss, batch: Sequences, weights: Tensor, lam: list[Tensor], *, curvature: Curvature
) -> tuple[Tensor, list[Tensor] | None]:
    """Return `<lam, grad (w_i l_i / B)>` at the current parameters, and H lam unless dropped."""
    if curvature == "exact":
        return inner.exact(batch, weights, lam)
    if curvature == "finite_difference":
        return inner.finite_difference(batch, weights, lam)
    return inner.products(batch, weights, lam), None


def _through_weights(
    log_weight_gradients: Tensor, weights: Tensor, settings: InnerSettings
) -> Tensor:
    """Return dL/dr from q = dL/dlog w, shape [B].

    `log w_i = r_i/beta`, and for normalised weights `- log mean_j exp(r_j/beta)`, whose derivative
    by r_j is `w_j / (B beta)`.
    """
    q = log_weight_gradients
    if settings.normalize_weights:
        q = q - weights * q.mean()
    return q / settings.beta


def _outer_gradient(inner: InnerLoss, batch: OuterBatch) -> tuple[float, Tensor, list[Tensor]]:
    """Return L, the margins A and lam = grad L at the current parameters."""
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
    """Yield micro-batches of pairs with their indices; a pair is two rows."""
    size = None if micro_batch_size is None else max(1, micro_batch_size // 2)
    lengths = torch.maximum(batch.chosen.lengths, batch.rejected.lengths)
    for rows in micro_batches(lengths, size):
        yield rows, OuterBatch(batch.chosen.rows(rows), batch.rejected.rows(rows))


def _margins(passes: Passes, pairs: OuterBatch) -> Tensor:
    chosen, rejected = passes(join(*pairs)).chunk(2)
    return chosen - rejected


def _copies(policy: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}


def _steps_to_differentiate(problem: InnerProblem, settings: InnerSettings) -> int | None:
    """Return `last_steps`; raise ValueError if it or the curvature is out of range."""
    if settings.curvature not in get_args(Curvature):
        raise ValueError(
            f"curvature is {settings.curvature!r}; expected one of {get_args(Curvature)}"
        )
    last, D = settings.last_steps, len(problem.batches)
    if last is not None and not 1 <= last <= D:
        raise ValueError(f"last_steps is {last}; it must be between 1 and D = {D}")
    return last


def _check_curvature(problem: InnerProblem, curvature: Curvature) -> None:
    """Log that math attention is used, or refuse a policy that finite differences cannot handle."""
    if curvature == "exact" and attention_kernel(problem.policy) != "eager":
        say_once("math attention is used where the policy is differentiated twice")
    if curvature == "finite_difference":
        require_smooth(problem.policy)
        require_symmetric_hessian(problem.policy, (b.policy for b in problem.batches))


def _check_models(policy: nn.Module, reward_model: nn.Module) -> None:
    phi = {id(p) for p in reward_model.parameters() if p.requires_grad}
    if not phi:
        raise ValueError("the reward model has no trainable parameter")
    if any(id(p) in phi for p in policy.parameters() if p.requires_grad):
        raise ValueError(
            "policy and reward model share trainable parameters; give each its own adapters"
        )
    require_plain_checkpointing(policy, "policy")
    require_plain_checkpointing(reward_model, "reward model")
