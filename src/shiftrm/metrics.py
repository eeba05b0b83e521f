"""Every metric that can be recorded or shown, declared once: id, label, unit, digits, direction.

`records` and `report.measurements` refuse a name that is not declared, so that the writer and the
reader of a number always agree. `declare` adds a metric from outside the package.
"""

import enum
import re
from dataclasses import dataclass
from functools import cache

from shiftrm.errors import suggest

__all__ = ["METRICS", "Better", "Metric", "UndeclaredMetric", "declare", "is_declared", "metric"]


class Better(enum.Enum):
    """Which direction is better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes:
        id: the name in records; `*` stands for a part that a run chooses (an arm, a domain, a
            number).
        label: the name in tables and figures.
        unit: such as "share" or "nats"; "" for numbers without a unit (rewards).
        digits: decimals to show.
        better: the better direction, everything else equal.
    """

    id: str
    label: str
    unit: str = ""
    digits: int = 2
    better: Better = Better.NEITHER

    @property
    def heading(self) -> str:
        """The label for a table's column, with the unit where the label alone is ambiguous."""
        return f"{self.label} ({self.unit})" if self.unit in ("words", "characters") else self.label


class UndeclaredMetric(ValueError):
    """A metric name that is not declared."""


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
    Metric("rewards/accuracies", "Accuracy on training pairs", "share", 3, _HIGH),
    Metric("meta_objective", "J before the meta step"),
    Metric("meta_objective_before", "J before the meta step"),
    Metric("meta_objective_after", "J after the meta step"),
    Metric("meta_gradient_norm", "Norm of J's gradient", "", 4),
    Metric("meta_influence", "Influence of the meta step", "", 4),
    Metric("meta_rho", "Length of the meta step", "", 4),
    Metric("meta_growth", "Growth of reward differences by the meta step", "", 3),
    Metric("meta_loss_rise", "Rise of the loss by the meta step", "share", 3, _LOW),
    Metric("meta_trials", "Lengths tried for the meta step", "", 1, _LOW),
    Metric("meta_skipped", "Meta steps skipped", "share", 3),
    Metric("hypergradient_norm", "Norm of the hypergradient", "", 4),
    Metric("effective_sample_share", "Effective sample size", "share", 3, _HIGH),
    Metric("reward_mean", "Mean reward"),
    Metric("reward_std", "Standard deviation of rewards"),
    # Policies.
    Metric("kl", "KL to SFT", "nats", 2),
    Metric("kl_coefficient", "KL coefficient", "", 4),
    Metric("entropy", "Entropy", "nats", 2),
    Metric("sequence_kl", "KL to SFT", "nats", 2),
    Metric("score_mean", "Mean score in training"),
    Metric("reward", "Mean reward in training"),
    Metric("shaped_mean", "Mean shaped reward"),
    Metric("standardised_mean", "Proxy (standardised)", "SFT spreads", 2),
    Metric("proxy", "Mean reward of the reward model"),
    Metric("proxy_mean", "Mean reward of the reward model"),
    Metric("proxy_mean_standardised", "Proxy (standardised)", "SFT spreads", 2),
    Metric("gold_mean", "Gold", "", 2, _HIGH),
    Metric("gold_std", "Standard deviation of gold"),
    Metric("judged", "Mean reward of the judge", "", 2, _HIGH),
    Metric("length_mean", "Length", "words", 1),
    Metric("truncated_share", "Share cut off by the limit", "share", 3, _LOW),
    Metric("distinct_share", "Different responses", "share", 3, _HIGH),
    Metric("empty_responses", "Empty responses", "responses", 0, _LOW),
    Metric("ppo_kl", "KL to the reference", "nats", 2),
    Metric("ppo_score", "Standardised score in PPO"),
    Metric("rloo_kl", "KL to the reference", "nats", 2),
    Metric("rloo_score", "Mean score in RLOO"),
    # What a reward model sees.
    Metric("accuracy_heldout", "Accuracy, held-out pairs", "share", 3, _HIGH),
    Metric("accuracy_policy_before", "Accuracy, policy's pairs, before", "share", 3, _HIGH),
    Metric("accuracy_policy_after", "Accuracy, policy's pairs, after", "share", 3, _HIGH),
    Metric("rank_policy_before", "Rank correlation with gold, before", "", 3, _HIGH),
    Metric("rank_policy_after", "Rank correlation with gold, after", "", 3, _HIGH),
    Metric("sight_*_before", "Sight test, before", "share", 2, _HIGH),
    Metric("sight_*_after", "Sight test, after", "share", 2, _HIGH),
    Metric("half_width_sight_*", "Half of a sight test's interval", "share", 2),
    Metric("gold_sight_*", "Sight test of gold, after", "share", 2, _HIGH),
    Metric("difference_variance", "Variance of reward differences"),
    Metric("difference_variance_*", "Variance of reward differences"),
    Metric("difference_values_*", "Reward differences"),
    Metric("relative_difference_variance", "Relative variance"),
    Metric("relative_difference_variance_before", "Relative variance, before", "of SFT's"),
    Metric("relative_difference_variance_after", "Relative variance, after", "of SFT's"),
    Metric("relative_difference_variance_*", "Relative variance", "of SFT's"),
    Metric("overopt_peak_gold", "Peak gold", "", 2, _HIGH),
    Metric("overopt_peak_kl", "KL at the peak", "nats"),
    Metric("overopt_final_gold", "Final gold", "", 2, _HIGH),
    Metric("overopt_final_kl", "KL at the end", "nats"),
    Metric("overopt_drop", "Drop", "", 2, _LOW),
    Metric("overopt_gold_at_kl_*", "Gold at KL"),
    Metric("overopt_*", "Over-optimisation along the training"),
    Metric("bon_kl", "KL", "nats"),
    Metric("bon_proxy", "Proxy"),
    Metric("bon_gold", "Gold", "", 2, _HIGH),
    Metric("bon_*", "Best of n"),
    Metric("pays_explained", "Explained by the features", "share"),
    Metric("pays_*", "Pays for", "SFT spreads"),
    Metric("overpays_low_*", "Overpays, low end", "SFT spreads"),
    Metric("overpays_high_*", "Overpays, high end", "SFT spreads"),
    Metric("overpays_*", "Overpays", "SFT spreads"),
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
"""The package's own metrics. An exact name wins over a pattern, an earlier pattern over a later."""

_EXACT: dict[str, Metric] = {}
_PATTERNS: list[tuple[re.Pattern[str], Metric]] = []


def declare(new: Metric) -> Metric:
    """Make a metric known, for example one that a plug-in records.

    Raises:
        ValueError: another metric already has this id.
    """
    known = [*_EXACT.values(), *(one for _, one in _PATTERNS)]
    same = next((one for one in known if one.id == new.id), new)
    if same != new:
        raise ValueError(f"metric {new.id!r} is already declared as {same.label!r}")
    if "*" in new.id:
        pattern = re.escape(new.id).replace(r"\*", ".+")
        _PATTERNS.append((re.compile(pattern, re.DOTALL), new))
    else:
        _EXACT[new.id] = new
    metric.cache_clear()
    return new


@cache
def metric(name: str) -> Metric:
    """Return the declared metric for a name in a record.

    Raises:
        UndeclaredMetric: no declared metric has this name.
    """
    if name in _EXACT:
        return _EXACT[name]
    for pattern, one in _PATTERNS:
        if pattern.fullmatch(name):
            return one
    near = suggest(name, [*_EXACT, *(one.id for _, one in _PATTERNS)])
    raise UndeclaredMetric(f"metric {name!r} is not declared in shiftrm.metrics{near}")


def is_declared(name: str) -> bool:
    """Whether a declared metric has this name."""
    return name in _EXACT or any(pattern.fullmatch(name) for pattern, _ in _PATTERNS)


for _one in METRICS:
    declare(_one)
