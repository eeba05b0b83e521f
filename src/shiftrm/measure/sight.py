"""Sight tests: does a reward model prefer a policy's response to a version that is worse for sure?

No labels are needed: a response put under another prompt, with a sentence repeated, cut in the
middle, shuffled or in another language is worse than the original (`data.negatives`). A high share
does not prove that a reward model orders two good responses well; a low one shows what it does not
look at, and what a policy can therefore get away with.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import rank_correlation
from shiftrm.core.intervals import Measured, measured, measured_mean
from shiftrm.data.negatives import NEGATIVES, OTHER_PROMPT, negative_pairs, two_way_pairs
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.score_once import score_fitting
from shiftrm.models.responses import Response
from shiftrm.models.scoring import Scorer, function_rewards, row_responses
from shiftrm.progress import Advance
from shiftrm.records import Record

PAIRS = 500
"""Pairs of each test by default: the share is then known to +-0.04."""


@dataclass(frozen=True)
class SightTest:
    """One sight test of a reward model on a policy's responses.

    Attributes:
        kind: how the worse version was made, a name in `data.negatives.NEGATIVES`.
        label: what the worse version is, such as "a response to another prompt".
        share: share of pairs whose original has the higher reward, equal rewards counting one
            half; None if the test does not apply.
        pairs, prompts: numbers behind it.
        left_out: pairs left out because a side is longer than the model's context.
        meaning: what a low share says.
        reason: why the test does not apply; "" if it does.
    """

    kind: str
    label: str
    share: Measured | None
    pairs: int
    prompts: int
    left_out: int
    meaning: str
    reason: str = ""


def sight_tests(
    reward_fn: Callable[..., Sequence[float]],
    groups: Sequence[Row],
    *,
    kinds: Sequence[str] | None = None,
    count: int = PAIRS,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Advance | None = None,
) -> list[SightTest]:
    """Run sight tests of a reward model on a policy's responses.

    The other prompt's response has about the length of the original, and each of the two is the
    original once, so that length is no cue: it is right in one half of the pairs.
    Equal texts are scored once. Intervals resample prompts with all their pairs; that a response to
    another prompt may occur in several pairs is ignored.

    Args:
        reward_fn: a `Scorer`, or a function with its signature.
        groups: `{"prompt", "responses", "finished"?}`.
        kinds: names in `data.negatives.NEGATIVES`; by default all.
        count: at most so many pairs of each kind, but of other prompts at least two; equal pairs
            count once.
        seed: seed of the pairs and of the bootstrap.
        batch_size: rows per forward pass of a `Scorer`; by default its own.
        progress: counts the sequences that a `Scorer` reads.

    Returns:
        One result a kind, in their order. A kind that cannot be made from these responses is not
        applicable and has a reason.

    Raises:
        UserError: an unknown kind, or rewards that cannot be computed or are not finite.
    """
    made = {
        kind: _pairs(groups, kind, count, seed)
        for kind in (NEGATIVES.names() if kinds is None else kinds)
    }
    sides = {
        _key(side): side
        for found in made.values()
        if not isinstance(found, str)
        for pairs in found
        for pair in pairs
        for side in row_responses(pair, "sight test")
    }
    rewards = _rewards(reward_fn, sides, batch_size=batch_size, progress=progress)
    return [_test(kind, found, rewards, seed) for kind, found in made.items()]


def _pairs(groups: Sequence[Row], kind: str, count: int, seed: int) -> list[tuple[Row, ...]] | str:
    """Return different pairs of a kind, in tuples that are used as a whole, or why there are none.

    Those of other prompts come by twos, see `two_way_pairs`.
    """
    NEGATIVES.get(kind)  # an unknown kind is an error, not a test that does not apply
    try:
        if kind == OTHER_PROMPT:
            return [*two_way_pairs(groups, max(1, count // 2), seed=seed)]
        found = negative_pairs(groups, kind, count, seed=seed)
    except UserError as error:
        return str(error)
    different = {json.dumps(pair, sort_keys=True): pair for pair in found}
    return [(pair,) for pair in different.values()]


def _key(response: Response) -> str:
    content = [response.prompt, response.text, response.finished, response.template_options]
    return json.dumps(content, sort_keys=True)


def _rewards(
    reward_fn: Callable[..., Sequence[float]],
    sides: Mapping[str, Response],
    *,
    batch_size: int | None,
    progress: Advance | None,
) -> dict[str, float]:
    """Return the reward of every side, without those longer than a model's context."""
    if not isinstance(reward_fn, Scorer):
        return dict(zip(sides, function_rewards(reward_fn, list(sides.values())), strict=True))
    rewards = score_fitting(
        reward_fn,
        list(sides.values()),
        ["sight test"] * len(sides),
        name="the reward model",
        batch_size=batch_size or reward_fn.batch_size,
        progress=progress,
    )
    found = zip(sides, rewards, strict=True)
    return {key: reward for key, reward in found if reward is not None}


def _test(
    kind: str, found: list[tuple[Row, ...]] | str, rewards: Mapping[str, float], seed: int
) -> SightTest:
    negative = NEGATIVES.get(kind)
    label, meaning = negative.label, negative.low
    if isinstance(found, str):
        return SightTest(kind, label, None, 0, 0, 0, meaning, found)
    right, prompts, left_out = [], [], 0
    for pairs in found:
        keys = [tuple(map(_key, row_responses(pair, "sight test"))) for pair in pairs]
        if any(side not in rewards for sides in keys for side in sides):
            left_out += len(pairs)
            continue
        for pair, (better, worse) in zip(pairs, keys, strict=True):
            difference = rewards[better] - rewards[worse]
            right.append(0.5 if difference == 0 else float(difference > 0))
            prompts.append(json.dumps(pair.get("prompt"), sort_keys=True))
    if not right:
        reason = f"{kind}: every pair is longer than the model's context"
        return SightTest(kind, label, None, 0, 0, left_out, meaning, reason)
    share = measured_mean(np.array(right), prompts, seed=seed)
    return SightTest(kind, label, share, len(right), len(set(prompts)), left_out, meaning)


# -- do they predict accuracy? ---------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Spearman's rank correlation of a sight test with the accuracy on the policy's own pairs.

    Attributes:
        kind: the sight test.
        rho: None if either number is constant.
        low, high: 95 % interval; None for one seed.
        n: reward models (seed, arm, round) behind it; `seeds` their number of seeds.
    """

    kind: str
    rho: float | None
    low: float | None
    high: float | None
    n: int
    seeds: int


def predicts(
    records: Iterable[Record],
    *,
    when: str = "after",
    target: str = "accuracy_policy",
    seed: int = 0,
) -> list[Prediction]:
    """Say how well each sight test predicts what only labels (or gold) can measure.

    Every (seed, arm, round) with both numbers is one point. The interval draws seeds with all their
    arms and rounds, since those share a first reward model, data and policy.

    Args:
        records: of evaluations; others are ignored. Of two for one number the later counts.
        when: "after", on responses of the policy that was trained with the reward model, or
            "before", on those of the policy that it was made for.
        target: the number to predict, without `_before` or `_after`: also "rank_policy".
        seed: seed of the bootstrap.
    """
    found: dict[str, dict[tuple[int, str, int], float]] = {}
    for record in records:
        if record.stage == "evaluate" and isinstance(record.value, int | float):
            place = (record.seed, record.method, record.round)
            found.setdefault(record.metric, {})[place] = float(record.value)
    truth = found.get(f"{target}_{when}", {})
    kinds = {
        metric.removeprefix("sight_").removesuffix(f"_{when}"): values
        for metric, values in found.items()
        if metric.startswith("sight_") and metric.endswith(f"_{when}")
    }
    return [_prediction(kind, values, truth, seed) for kind, values in kinds.items()]


def _prediction(
    kind: str,
    values: Mapping[tuple[int, str, int], float],
    truth: Mapping[tuple[int, str, int], float],
    seed: int,
) -> Prediction:
    places = sorted(values.keys() & truth.keys())
    seeds = [place[0] for place in places]
    x = np.array([values[place] for place in places])
    y = np.array([truth[place] for place in places])

    def rho(weights: np.ndarray) -> float:
        times = weights.astype(np.int64)
        drawn = rank_correlation(np.repeat(x, times), np.repeat(y, times))
        return float("nan") if drawn is None else drawn

    of_all = measured(rho, seeds, seed=seed) if places else None
    if of_all is None:
        return Prediction(kind, None, None, None, len(places), len(set(seeds)))
    return Prediction(kind, of_all.value, of_all.low, of_all.high, len(places), len(set(seeds)))
