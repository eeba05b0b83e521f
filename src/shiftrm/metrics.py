"""What can be measured: every metric's name, declared once.

A name that is not declared here can neither be recorded (`records`) nor read (`report`), so that
what one side writes and the other looks for cannot drift apart.
"""

import enum
import re
from dataclasses import dataclass
from functools import cache

from shiftrm.errors import suggest

__all__ = ["METRICS", "Better", "Metric", "UndeclaredMetric", "metric"]


class Better(enum.Enum):
    """Which direction is the better one."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True)
class Metric:
    """One declared name.

    Attributes:
        id: the name in records; a `*` stands for a name of the run's own (an arm, a domain, a
            reason, a number).
        label: what people read.
        unit: "share", "nats", ...; "" for numbers without one (rewards).
        digits: decimals to show.
        better: the direction that is better, everything else equal.
    """

    id: str
    label: str
    unit: str = ""
    digits: int = 2
    better: Better = Better.NEITHER


class UndeclaredMetric(ValueError):
    """A name that no metric has."""


_HIGH, _LOW = Better.HIGHER, Better.LOWER

METRICS: tuple[Metric, ...] = (
    # Training.
    Metric("loss", "Loss", "nats", 3, _LOW),
    Metric("accuracy", "Accuracy on training pairs", "share", 3, _HIGH),
    Metric("eval_accuracy", "Accuracy on evaluation pairs", "share", 3, _HIGH),
    Metric("eval_accuracy_final", "Accuracy on evaluation pairs, at the end", "share", 3, _HIGH),
    Metric("eval_loss", "Loss on evaluation pairs", "nats", 3, _LOW),
    Metric("eval_reference_accuracy", "Accuracy of the reference policy", "share", 3, _HIGH),
    Metric("eval_*_accuracy", "Accuracy on a domain's pairs", "share", 3, _HIGH),
    Metric("pair_accuracy_*", "Accuracy on a domain's pairs", "share", 3, _HIGH),
    Metric("accuracy_*", "Accuracy by one way of joining tokens", "share", 3, _HIGH),
    Metric("pl_loss_*", "Preference loss by one way of joining tokens", "nats", 3, _LOW),
    Metric("meta_objective_before", "J before the meta step"),
    Metric("meta_objective_after", "J after the meta step"),
    Metric("meta_gradient_norm", "Norm of J's gradient", "", 4),
    Metric("meta_influence", "Influence of the meta step", "", 4),
    Metric("meta_skipped", "Meta steps skipped", "share", 3),
    Metric("hypergradient_norm", "Norm of the hypergradient", "", 4),
    Metric("effective_sample_share", "Effective sample size", "share", 3, _HIGH),
    Metric("reward_mean", "Mean reward"),
    Metric("reward_std", "Standard deviation of rewards"),
    # Policies.
    Metric("kl", "KL to the reference", "nats", 2),
    Metric("kl_coefficient", "KL coefficient", "", 4),
    Metric("entropy", "Entropy", "nats", 2),
    Metric("score_mean", "Mean score in training"),
    Metric("proxy", "Mean reward of the reward model"),
    Metric("proxy_mean", "Mean reward of the reward model"),
    Metric("proxy_mean_standardised", "Proxy (standardised)", "SFT spreads", 2),
    Metric("gold_mean", "Gold", "", 2, _HIGH),
    Metric("gold_std", "Standard deviation of gold"),
    Metric("judged", "Mean reward of the judge", "", 2, _HIGH),
    Metric("length_mean", "Length", "words", 1),
    Metric("truncated_share", "Cut off by the limit", "share", 3, _LOW),
    Metric("distinct_share", "Different responses", "share", 3, _HIGH),
    Metric("empty_responses", "Empty responses", "responses", 0, _LOW),
    Metric("ppo_kl", "KL to the reference", "nats", 2),
    Metric("ppo_score", "Standardised score in PPO"),
    Metric("rloo_kl", "KL to the reference", "nats", 2),
    Metric("rloo_score", "Mean score in RLOO"),
    # What a reward model sees.
    Metric("accuracy_heldout", "Accuracy, held-out pairs", "share", 3, _HIGH),
    Metric("accuracy_policy_before", "Accuracy on the policy's pairs, before", "share", 3, _HIGH),
    Metric("accuracy_policy_after", "Accuracy on the policy's pairs, after", "share", 3, _HIGH),
    Metric("difference_variance", "Variance of reward differences"),
    Metric("difference_variance_*", "Variance of reward differences"),
    Metric("difference_values_*", "Reward differences"),
    Metric("relative_difference_variance", "Relative variance"),
    Metric("relative_difference_variance_*", "Relative variance", "of SFT's", 2),
    Metric("overopt_*", "Over-optimisation along the training"),
    Metric("bon_*", "Best of n"),
    # Diversity.
    Metric("self_bleu", "Self-BLEU, n = 2..5", "", 3, _LOW),
    Metric("self_bleu_*", "Self-BLEU", "", 3, _LOW),
    Metric("embedding_similarity", "Embedding similarity", "", 3, _LOW),
    Metric("similarity", "Sum, as in the paper", "", 3, _LOW),
    Metric("distinct_1", "Distinct 1-grams", "share", 3, _HIGH),
    Metric("distinct_2", "Distinct 2-grams", "share", 3, _HIGH),
    Metric("distinct_3", "Distinct 3-grams", "share", 3, _HIGH),
    Metric("compression_ratio", "Compression ratio", "", 3, _LOW),
    # One arm's responses against another's.
    *(
        metric
        for name, label, better in (
            ("win", "Wins", _HIGH),
            ("tie", "Ties", Better.NEITHER),
            ("lose", "Losses", _LOW),
            ("rate", "Wins and half the ties", _HIGH),
            ("length_controlled", "The same at equal lengths", _HIGH),
        )
        for metric in (
            Metric(f"{name}_vs_*", label, "share", 2, better),
            Metric(f"{name}_low_vs_*", f"{label}, low end", "share", 2, better),
            Metric(f"{name}_high_vs_*", f"{label}, high end", "share", 2, better),
        )
    ),
    Metric("length_ours_vs_*", "Length, ours", "characters", 0),
    Metric("length_theirs_vs_*", "Length, theirs", "characters", 0),
    Metric("judge_consistency_vs_*", "Both orders agree", "share", 2, _HIGH),
    Metric("judge_first_share_vs_*", "First place named", "share", 2),
    Metric("unjudged_vs_*", "Without a verdict", "prompts", 0, _LOW),
    # Data.
    Metric("pairs", "Pairs", "rows", 0),
    Metric("pairs_train", "Pairs to train on", "rows", 0),
    Metric("pairs_heldout", "Held-out pairs", "rows", 0),
    Metric("labels", "Fresh labels", "rows", 0),
    Metric("prompts", "Prompts", "rows", 0),
    Metric("demonstrations", "Demonstrations", "rows", 0),
    Metric("heldout", "Held-out pairs", "rows", 0),
    Metric("eval_prompts", "Test prompts", "rows", 0),
    *(
        Metric(f"{data}_dropped_*", f"Left out of {data}", "rows", 0)
        for data in ("pairs", "prompts", "demonstrations", "heldout", "eval_prompts")
    ),
    Metric("sft_gold_mean", "Gold of the demonstrations"),
)
"""All of them; an exact name goes before one with a `*`, and among those the first that fits."""

_EXACT = {one.id: one for one in METRICS if "*" not in one.id}
_PATTERNS = [
    (re.compile(re.escape(one.id).replace(r"\*", ".+"), re.DOTALL), one)
    for one in METRICS
    if "*" in one.id
]


@cache
def metric(name: str) -> Metric:
    """What a name in a record means.

    Raises:
        UndeclaredMetric: nothing declared has this name.
    """
    if name in _EXACT:
        return _EXACT[name]
    for pattern, one in _PATTERNS:
        if pattern.fullmatch(name):
            return one
    near = suggest(name, [one.id for one in METRICS])
    raise UndeclaredMetric(f"metric {name!r} is not declared in shiftrm.metrics{near}")
