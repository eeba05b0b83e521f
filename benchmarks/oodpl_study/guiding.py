"""Ways in which a reward model guides a policy in unseen domains, and what is measured of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shiftrm.core.discrimination import rank_correlation
from shiftrm.files import Row
from shiftrm.models.sampling import Draws, SamplingConfig, as_samples, sample_rows
from shiftrm.models.scoring import mean_and_spread, score_rows
from shiftrm.oodpl.fine_tuning import FineTuningConfig, fine_tune, support_rewards
from shiftrm.oodpl.meta_test import support_prompts
from shiftrm.oodpl.preference import sampled_kl
from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic

from .data import Start, gold_rewards

Rewards = Callable[..., Sequence[float]]

BEST_OF = 16
RESPONSES = 8
SAMPLING = SamplingConfig(max_new_tokens=20)
WEIGHTED = FineTuningConfig(
    updates=60, batch_size=64, learning_rate=3e-4, beta=0.5, reduction="mean"
)
"""As the recipe `gold_domains`; rewards are standardised over the domain's rows first, so that beta
moves the policy as far under every reward model."""

KL_TARGET = 4.0
PPO = PPOConfig(
    steps=15,
    prompts_per_step=16,
    rollouts_per_prompt=8,
    minibatch_size=64,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    kl_coefficient=0.1,
    kl_target=KL_TARGET,
    value_clip=None,
    truncation_penalty=1.0,
    sampling=SAMPLING,
)
"""One policy for all target domains, whose prompts are mixed."""


@dataclass(frozen=True)
class Targets:
    """Unseen domains, and the reference's responses in them, which all arms share.

    Attributes:
        groups: BEST_OF responses to every evaluation prompt, with their gold rewards under "gold".
        scale: a response to every training prompt, to standardise rewards in PPO.
    """

    names: tuple[str, ...]
    groups: list[Row]
    scale: list[Row]


def make_targets(start: Start, names: Sequence[str]) -> Targets:
    prompts = [p for name in names for p in start.domains[name].prompts]
    trained = [p for name in names for p in support_prompts(start.domains[name])]
    groups, scale = (
        sample_rows(
            start.reference,
            start.tokenizer,
            given,
            Draws(SAMPLING, count, batch_size=64, seed=start.seed),
        )
        for given, count in ((prompts, BEST_OF), (trained, 2))
    )
    for row, gold in zip(groups, score_rows(gold_rewards(start), groups), strict=True):
        row["gold"] = gold
    return Targets(tuple(names), groups, scale)


def of_reward_model(targets: Targets, rewards: Rewards) -> dict[str, float]:
    """Return rank correlation with gold within prompts, and gold under best-of-16.

    A prompt whose rewards are all equal has a correlation of 0 and an average choice.
    """
    ranks, chosen = [], []
    for row, values in zip(targets.groups, score_rows(rewards, targets.groups), strict=True):
        ranks.append(rank_correlation(values, row["gold"]) or 0.0)
        best = np.asarray(values) == max(values)
        chosen.append(float(np.asarray(row["gold"])[best].mean()))
    return {"rank": float(np.mean(ranks)), "best_of": float(np.mean(chosen))}


def weighted(start: Start, targets: Targets, rewards: Rewards | None) -> dict[str, float]:
    """Return what reward-weighted fine-tuning gives, a policy for every target; None: plain."""
    found = []
    for name in targets.names:
        support, policy = start.domains[name].support, start.policy()
        weigh = None if rewards is None else standardised(rewards, support)
        config = replace(WEIGHTED, seed=start.seed)
        fine_tune(policy, start.tokenizer, support, config, reward_fn=weigh)
        found.append(measured(start, policy, [name]))
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def standardised(rewards: Rewards, rows: Sequence[Row]) -> Rewards:
    """Return the rewards with mean 0 and variance 1 over the rows."""
    mean, spread = mean_and_spread([support_rewards(rewards, rows)])

    def scaled(prompts: Any, responses: Any, *, finished: Any) -> list[float]:
        return [(r - mean) / spread for r in rewards(prompts, responses, finished=finished)]

    return scaled


def ppo(start: Start, targets: Targets, rewards: Rewards) -> dict[str, float]:
    """Return what PPO with the KL held at its target gives, one policy for all targets."""
    mean, spread = mean_and_spread(score_rows(rewards, targets.scale))
    policy = start.policy()
    prompts = [p for name in targets.names for p in support_prompts(start.domains[name])]
    config = replace(PPO, seed=start.seed, reward_mean=mean, reward_std=spread)
    problem = Problem(policy, start.reference, start.tokenizer, prompts, rewards)
    PPOTrainer(problem, make_critic(policy, seed=start.seed), config).train()
    return measured(start, policy.eval(), targets.names)


def measured(start: Start, policy: Any, names: Sequence[str]) -> dict[str, float]:
    """Return gold and KL of a policy's responses to the evaluation prompts."""
    prompts = [p for name in names for p in start.domains[name].prompts]
    draws = Draws(SAMPLING, RESPONSES, batch_size=64, seed=start.seed + 1)
    rows = sample_rows(policy, start.tokenizer, prompts, draws)
    gold = [g for group in score_rows(gold_rewards(start), rows) for g in group]
    kl = sampled_kl(policy, start.reference, as_samples(start.tokenizer, rows))
    return {"gold": float(np.mean(gold)), "kl": kl}
