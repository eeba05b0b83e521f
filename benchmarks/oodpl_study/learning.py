"""What learns from the pairs of the sources: reward models, OODPL, and policies.

Everything takes the same number of steps of as many pairs, and keeps the step with the lowest loss
of its own on the watched domains.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from plain_training import Schedule, Watched, train
from shiftrm.core.domain_losses import (
    direct_preference_loss,
    domain_means,
    group_dro_weights,
    likelihood_and_preference_loss,
)
from shiftrm.core.hypergradient import OuterBatch, hypergradient, preference_margins
from shiftrm.core.inner_loop import InnerProblem, InnerSettings, adapted_policy
from shiftrm.core.likelihood import Passes
from shiftrm.core.losses import bradley_terry_loss
from shiftrm.models.rewards import pad_right, sequence_rewards
from shiftrm.oodpl.batches import EncodedDomain, Example, outer_batch
from shiftrm.oodpl.tasks import TaskPlan

from .data import Start, fresh_reward_model

STEPS, PAIRS = 150, 64
"""Steps of everything that learns from pairs, and the pairs of a step."""

REWARD, DPO, CPL = (Schedule(STEPS, rate) for rate in (5e-4, 2e-4, 2e-4))
DRO_STEP, DPO_BETA = 0.1, 0.1
OWN_STEPS = 50
"""Steps of the reward model of one source."""


# -- pairs -----------------------------------------------------------------------------------------


def draw_pairs(
    domains: Sequence[EncodedDomain], seed: str, *, balanced: bool
) -> Callable[[int], list[tuple[int, int]]]:
    """Return what draws the pairs of a step as (domain, row).

    Args:
        balanced: every domain in turn; else all rows of the pool alike. The domains here have as
            many pairs each, so that the two differ by chance alone.
    """
    pool = [(k, i) for k, domain in enumerate(domains) for i in range(len(domain.query))]

    def draw(step: int) -> list[tuple[int, int]]:
        rng = random.Random(f"{seed}/{step}")
        if not balanced:
            return rng.sample(pool, PAIRS)
        order = rng.sample(range(len(domains)), len(domains))
        counts = [len(range(k, PAIRS, len(domains))) for k in range(len(domains))]
        return [
            (k, i)
            for k, n in zip(order, counts, strict=True)
            for i in rng.sample(range(len(domains[k].query)), n)
        ]

    return draw


def pair_rewards(model: nn.Module, pairs: OuterBatch) -> Tensor:
    """Return the rewards of both sides, shape [B, 2]; policy and reward model share tokens."""
    sides = [sequence_rewards(model, side.input_ids, side.attention_mask) for side in pairs]
    return torch.stack(sides, dim=1)


def reward_loss(model: nn.Module, pairs: OuterBatch) -> Tensor:
    return bradley_terry_loss(*pair_rewards(model, pairs).unbind(1))


def watched_pairs(start: Start) -> OuterBatch:
    """Return all evaluation pairs of the watched domains."""
    pairs = [pair for d in start.of(start.world.watched) for pair in d.eval_pairs]
    return outer_batch(pairs, policy_pad_id=start.pad)


# -- Bradley-Terry ---------------------------------------------------------------------------------


def bradley_terry(
    start: Start,
    *,
    balanced: bool = False,
    dro: bool = False,
    on: nn.Module | None = None,
    rate: float = REWARD.rate,
    stop: bool = True,
) -> nn.Module:
    """Return a reward model trained on the pool of the sources' pairs.

    Args:
        on: train on from this model, on other draws of the pairs; it is changed.
        dro: weigh the domains' losses by group DRO; the batches are then balanced.
        stop: keep the step with the lowest loss on the watched domains, not the last.
    """
    domains = start.of(start.world.sources)
    stream = f"pairs/{start.seed}" if on is None else f"pairs on/{start.seed}"
    draw = draw_pairs(domains, stream, balanced=balanced or dro)
    model, watched = on or fresh_reward_model(start), watched_pairs(start)
    G = len(domains)
    weights_G = torch.full((G,), 1 / G)

    def loss(step: int) -> Tensor:
        nonlocal weights_G
        drawn = draw(step)
        pairs = outer_batch([domains[k].query[i] for k, i in drawn], policy_pad_id=start.pad)
        losses_B = reward_loss(model, pairs)
        if not dro:
            return losses_B.mean()
        losses_G = domain_means(losses_B, torch.tensor([k for k, _ in drawn]), count=G)
        weights_G = group_dro_weights(weights_G, losses_G, step_size=DRO_STEP)
        return (weights_G * losses_G).sum()

    @torch.no_grad()
    def watch() -> float:
        return float(reward_loss(model, watched).mean())

    train(model, loss, replace(REWARD, rate=rate), watch=watch if stop else None)
    return model


def source_scores(start: Start, domain: EncodedDomain) -> Tensor:
    """Return what a reward model of one source says of its fine-tuning rows, standardised, [N]."""
    model = fresh_reward_model(start)
    draw = draw_pairs([domain], f"own/{start.seed}/{domain.name}", balanced=False)

    def loss(step: int) -> Tensor:
        rows = [domain.query[i] for _, i in draw(step)]
        return reward_loss(model, outer_batch(rows, policy_pad_id=start.pad)).mean()

    train(model, loss, replace(REWARD, steps=OWN_STEPS))
    with torch.no_grad():
        rewards_N = _row_rewards(start, model, domain.support)
    return (rewards_N - rewards_N.mean()) / rewards_N.std()


def regressed(start: Start) -> nn.Module:
    """Return one reward model regressed on every source's scores of its own fine-tuning rows.

    It reads what OODPL reads, pairs and fine-tuning rows of the sources, and differentiates through
    no policy step. It takes more steps than other methods: OWN_STEPS for each source, and STEPS.
    """
    sources = start.of(start.world.sources)
    rows = [row for domain in sources for row in domain.support]
    scores_N = torch.cat([source_scores(start, domain) for domain in sources])
    model = fresh_reward_model(start)

    def loss(step: int) -> Tensor:
        places = random.Random(f"regressed/{start.seed}/{step}").sample(range(len(rows)), 2 * PAIRS)
        rewards_B = _row_rewards(start, model, [rows[i] for i in places])
        return (rewards_B - scores_N[places]).square().mean()

    train(model, loss, REWARD)
    return model


def _row_rewards(start: Start, model: nn.Module, rows: Sequence[Example]) -> Tensor:
    ids, mask = pad_right([row.reward_ids for row in rows], pad_token_id=start.pad)
    return sequence_rewards(model, ids, mask)


# -- OODPL -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meta:
    """Settings of meta-training; those of the recipe `gold_domains` unless changed.

    Attributes:
        inner_steps, inner_rate: D and alpha.
        tasks: domains of an outer step; each has PAIRS / tasks pairs.
        curvature: as in `InnerSettings`.
        from_pooled: start phi from the pooled Bradley-Terry model (meta-fine-tuning; ours).
        bt: weight of the pooled Bradley-Terry loss of the same pairs in the outer loss (ours).
    """

    inner_steps: int = 1
    inner_rate: float = 0.3
    beta: float = 1.0
    support: int = 64
    normalize: bool = True
    tasks: int = 2
    curvature: str = "exact"
    rate: float = 1e-3
    steps: int = STEPS
    from_pooled: bool = False
    bt: float = 0.0

    def inner(self) -> InnerSettings:
        return InnerSettings(
            self.inner_rate,
            self.beta,
            normalize_weights=self.normalize,
            reduction="mean",
            curvature=self.curvature,  # type: ignore[arg-type]
        )


@dataclass
class Trace:
    """What meta-training logged: by step, and what early stopping saw."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    effective: list[float] = field(default_factory=list)
    watched: Watched | None = None


def task_plan(start: Start, meta: Meta) -> TaskPlan:
    return TaskPlan(
        seed=start.seed,
        inner_steps=meta.inner_steps,
        support_batch=meta.support,
        query_batch=PAIRS // meta.tasks,
        mixture=1,
        policy_pad_id=start.pad,
        reward_pad_id=start.pad,
    )


def meta_train(
    start: Start, meta: Meta, *, pooled: nn.Module | None = None, stop: bool = True
) -> tuple[nn.Module, Trace]:
    """Meta-train a reward model on the sources by the hypergradient.

    Args:
        pooled: the pooled Bradley-Terry model, for `from_pooled`; it is copied.
        stop: keep the step with the lowest loss on the watched domains, not the last.
    """
    if meta.from_pooled and pooled is None:
        raise ValueError("from_pooled needs the pooled model")
    model = copy.deepcopy(pooled) if meta.from_pooled else fresh_reward_model(start)
    policy, settings, plan = start.policy(), meta.inner(), task_plan(start, meta)
    sources, trace = start.of(start.world.sources), Trace()
    parameters = dict(model.named_parameters())

    def loss(step: int) -> Tensor:
        total = 0.0
        for index in range(meta.tasks):
            task = plan.draw(sources, step=step, index=index)
            problem = InnerProblem(policy, model, task.inner_batches, sequence_rewards)
            found = hypergradient(problem, task.outer_batch, settings)
            for name, gradient in found.gradients.items():
                part = gradient / meta.tasks
                p = parameters[name]
                p.grad = part if p.grad is None else p.grad + part
            total += found.outer_loss / meta.tasks
            if meta.bt:
                (meta.bt / meta.tasks * reward_loss(model, task.outer_batch).mean()).backward()
        share = sum(found.effective_sample_size) / (meta.support * meta.inner_steps)
        trace.effective.append(share)
        trace.loss.append(total)
        return torch.tensor(total)

    watch = (lambda: adapted_loss(start, model, policy, meta)) if stop else None
    schedule = Schedule(meta.steps, meta.rate)
    trace.watched = train(model, loss, schedule, watch=watch, on_norm=trace.norm.append)
    return model, trace


def adapted_loss(start: Start, model: nn.Module, policy: Any, meta: Meta) -> float:
    """Return the mean outer loss of the watched domains after D inner steps under the model."""
    plan = task_plan(start, meta)
    losses = []
    for domain in start.of(start.world.watched):
        batches, _ = plan.support_of(domain, role="watch")
        pairs = outer_batch(domain.eval_pairs, policy_pad_id=start.pad)
        problem = InnerProblem(policy, model, batches, sequence_rewards)
        with adapted_policy(problem, meta.inner()):
            margins = preference_margins(policy, pairs, reduction="mean")
        losses.append(float(nn.functional.softplus(-margins).mean()))
    return sum(losses) / len(losses)


# -- policies on pairs -----------------------------------------------------------------------------


def likelihoods(policy: Any, pairs: OuterBatch) -> Tensor:
    """Return log pi of both sides as sums over tokens, shape [B, 2]."""
    passes = Passes.of(policy, reduction="sum")
    return torch.stack([passes(side) for side in pairs], dim=1)


def policy_on_pairs(start: Start, kind: str) -> Any:
    """Return a policy trained on the pool of the sources' pairs: "dpo" or "cpl"."""
    domains = start.of(start.world.sources)
    draw = draw_pairs(domains, f"pairs/{start.seed}", balanced=False)
    policy, watched = start.policy(), watched_pairs(start)

    def losses(pairs: OuterBatch) -> Tensor:
        ours = likelihoods(policy, pairs)
        if kind == "cpl":
            tokens = pairs.chosen.response_mask.sum(dim=1)
            return likelihood_and_preference_loss(*ours.unbind(1), tokens)
        with torch.no_grad():
            theirs = likelihoods(start.reference, pairs)
        return direct_preference_loss(ours, theirs, beta=DPO_BETA)

    def loss(step: int) -> Tensor:
        rows = [domains[k].query[i] for k, i in draw(step)]
        return losses(outer_batch(rows, policy_pad_id=start.pad)).mean()

    @torch.no_grad()
    def watch() -> float:
        return float(losses(watched).mean())

    train(policy, loss, {"dpo": DPO, "cpl": CPL}[kind], watch=watch)
    return policy
