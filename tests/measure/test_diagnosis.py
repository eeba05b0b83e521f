"""The numbers of a diagnosis, against values worked out by hand and against plain definitions."""

import math
import random
import statistics

import pytest
import torch

from shiftrm.core.discrimination import auc, calibration_error
from shiftrm.core.intervals import Measured, measured, prompt_weights, weighted_mean
from shiftrm.core.losses import difference_loss
from shiftrm.measure.diagnosis.diagnosis import ScoredFile, diagnose, labels, lengths
from shiftrm.measure.diagnosis.scored import (
    ScoredGroup,
    ScoredPair,
    ScoredResponse,
    differences,
    distinct,
)
from shiftrm.measure.diagnosis.spread import spread, variance_ratio


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def group(prompt, *responses):
    return ScoredGroup(prompt, tuple(ScoredResponse(*response) for response in responses))


def pair(prompt, chosen, rejected):
    return ScoredPair(prompt, ScoredResponse(*chosen), ScoredResponse(*rejected))


A = group("a", (1.0, 2), (3.0, 4))
B = group("b", (0.0, 5), (0.0, 1), (3.0, 3))


def random_groups(n, *, scale=1.0, seed=0, sizes=(2, 3, 5)):
    rng = random.Random(seed)
    return [
        group(i, *((rng.gauss(rng.gauss(0, 1), scale), rng.randint(1, 9)) for _ in range(k)))
        for i in range(n)
        for k in [rng.choice(sizes)]
    ]


def test_spread_by_hand():
    """A: one difference, 2. B: differences 0, 3, 3. Every prompt counts the same."""
    s = spread([A, B])
    assert (s.prompts, s.responses, s.comparisons) == (2, 5, 4)
    assert (s.duplicate_share, s.collapsed_share) == (0.0, 0.0)
    assert s.reward_mean == pytest.approx(7 / 5)
    assert s.reward_std == pytest.approx(math.sqrt(19 / 5 - (7 / 5) ** 2))
    assert s.difference_mean.value == pytest.approx((2 + 2) / 2)
    assert s.difference_variance.value == pytest.approx((4 + 18 / 3) / 2)
    assert s.within_std == pytest.approx(math.sqrt((2 + 3) / 2)), "unbiased variances 2 and 3"
    assert s.equal_share == s.noise_share == s.coin_share == pytest.approx((0 + 1 / 3) / 2)
    assert s.saturated_share == 0.0
    assert s.difference_loss == pytest.approx(
        (2 / 4 * sigmoid(2) + 2 / 9 * (0.5 + 2 * sigmoid(3))) / 2
    )
    assert s.difference_loss_lowest == pytest.approx((1 / 4 + 2 / 6) / 2)
    assert s.difference_loss_highest == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert s.difference_quantiles["0.5"] == 2.5, "of 0, 2, 3, 3"


def test_share_within_prompts_by_hand():
    """Within 2; prompts' means 2 and 12: variance 50, of which 2/2 comes from within."""
    s = spread([A, group("c", (11.0, 1), (13.0, 1))])
    assert s.within_share.value == pytest.approx(2 / (2 + 50 - 1))
    assert s.relative_std == pytest.approx(math.sqrt(2 / 51))
    assert spread([A, B]).within_share.value == 1.0, "means as close as chance: none between"
    assert spread([A]).within_share is None
    assert (
        spread([group("a", (0.1, 1), (0.1, 2)), group("b", (0.1, 1), (0.1, 1))]).relative_std
        is None
    )


def test_shares_within_and_between_are_found_again():
    """Groups of 4 drawn with variance 1 within and 3 between prompts."""
    rng = random.Random(3)
    groups = []
    for i in range(4000):
        centre = rng.gauss(0, math.sqrt(3))
        groups.append(group(i, *((rng.gauss(centre, 1), 1) for _ in range(4))))
    s = spread(groups, resamples=50)
    assert s.within_share.value == pytest.approx(0.25, abs=0.01)
    assert s.difference_variance.value == pytest.approx(2.0, abs=0.05)
    assert s.within_share.low < 0.25 < s.within_share.high


def test_difference_loss_is_the_one_that_is_trained():
    groups = random_groups(30)
    K = max(len(g.responses) for g in groups)
    rewards, mask = torch.zeros(30, K, dtype=torch.float64), torch.zeros(30, K, dtype=torch.bool)
    for i, g in enumerate(groups):
        rewards[i, : len(g.responses)] = torch.tensor([r.reward for r in g.responses])
        mask[i, : len(g.responses)] = True
    expected = difference_loss(rewards, mask=mask).mean().item()
    assert spread(groups, resamples=2).difference_loss == pytest.approx(expected, abs=1e-7)


def test_saturation_and_coins_at_their_edges():
    """sigmoid(ln 99) = 0.99 is not above it; sigmoid(0.04) = 0.509999 is a coin, 0.041 is not."""

    def one(d):
        return spread([group("a", (0.0, 1), (d, 1))])

    assert one(math.log(99) - 1e-9).saturated_share == 0.0
    assert one(math.log(99) + 1e-6).saturated_share == 1.0
    assert (one(0.04).coin_share, one(0.041).coin_share) == (1.0, 0.0)
    assert (one(9e-7).noise_share, one(1.1e-6).noise_share, one(9e-7).equal_share) == (1, 0, 0)


def test_identical_responses_are_duplicates_and_not_ties():
    same = group("a", (1.0, 2, True, "x"), (1.0, 2, True, "x"), (2.0, 2, True, "y"))
    all_same = group("b", (5.0, 2, True, "z"), (5.0, 2, True, "z"))
    s = spread([same, all_same])
    assert s.duplicate_share == pytest.approx(2 / 5)
    assert (s.collapsed_share, s.comparisons, s.equal_share) == (0.5, 1, 0.0)
    assert s.difference_mean.value == 1.0
    expected = (2 / 9 * (0.5 + 2 * sigmoid(1)) + 2 / 4 * 0.5) / 2
    assert s.difference_loss == pytest.approx(expected), "J is of the groups as they are"
    nothing = spread([all_same])
    assert (nothing.comparisons, nothing.difference_mean, nothing.coin_share) == (0, None, None)
    assert distinct(A) is A, "no keys: all different"


def test_differences_keep_the_order_of_the_groups():
    assert [d.tolist() for d in differences([B, A, group("c", (5.0, 1), (1.0, 1))])] == [
        [0.0, 3.0, 3.0], [2.0], [4.0],
    ]  # fmt: skip


def test_spread_does_not_depend_on_a_constant_and_scales_with_the_rewards():
    groups = random_groups(40)
    moved = [
        ScoredGroup(g.prompt, tuple(r._replace(reward=8 + 4 * r.reward) for r in g.responses))
        for g in groups
    ]
    before, after = spread(groups, resamples=20), spread(moved, resamples=20)
    assert after.difference_variance.value == pytest.approx(16 * before.difference_variance.value)
    assert after.within_share.value == pytest.approx(before.within_share.value)
    assert variance_ratio(moved, groups, resamples=20).value == pytest.approx(16)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no groups"):
        spread([])
    with pytest.raises(ValueError, match="no groups"):
        lengths([])
    with pytest.raises(ValueError, match="at least two responses"):
        spread([group("a", (1.0, 1))])


def test_lengths_by_hand():
    """Centred: A rewards -1 1, lengths -1 1; B rewards -1 -1 2, lengths 2 -2 0. 2 / sqrt(8 * 10).
    The best of A is the longest (chance 1/2), the best of B is not (chance 1/3)."""
    found = lengths([A, B])
    assert found.length_mean == 3.0
    assert found.correlation_within == pytest.approx(2 / math.sqrt(80))
    rewards, tokens = [1, 3, 0, 0, 3], [2, 4, 5, 1, 3]
    assert found.correlation == pytest.approx(statistics.correlation(rewards, tokens))
    assert found.longest_best_share == 0.5
    assert found.longest_best_chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_lengths_that_say_nothing():
    flat = lengths([group("a", (1.0, 3), (2.0, 3)), group("b", (1.0, 3), (0.0, 3))])
    assert (flat.correlation, flat.correlation_within, flat.longest_best_share) == (None,) * 3
    blind = lengths([group("a", (0.1, 3), (0.1, 5), (0.1, 4)), group("b", (0.3, 1), (0.3, 2))])
    assert blind.correlation_within is None
    assert blind.longest_best_share == pytest.approx((1 / 3 + 1 / 2) / 2), "a tie for the best"
    noise = lengths([group("a", (0.1, 3), (0.1 + 1e-8, 5))])
    assert noise.correlation_within is None, "rounding is not a preference for length"


def test_cut_off_responses_by_hand():
    """a: -1 - mean(1, 3); b has no finished one, c no cut-off one."""
    found = lengths(
        [
            group("a", (1.0, 1), (3.0, 1), (-1.0, 1, False)),
            group("b", (9.0, 1, False), (8.0, 1, False)),
            group("c", (9.0, 1), (7.0, 1)),
        ]
    )
    assert found.truncated_share == pytest.approx(3 / 7)
    assert (found.truncated_gap, found.truncated_prompts) == (-3.0, 1)
    assert lengths([A]).truncated_gap is None


PAIRS = [
    pair("a", (2.0, 5), (1.0, 3)),  # right, chosen longer
    pair("a", (0.0, 2), (1.0, 3)),  # wrong, chosen shorter
    pair("b", (1.0, 4), (1.0, 2)),  # tie, chosen longer
    pair("c", (3.0, 1), (0.0, 1)),  # right, as long
    pair("d", (7.0, 1, True, "k"), (7.0, 1, True, "k")),  # the same tokens: left out
]


def test_labels_by_hand():
    found = labels(PAIRS)
    assert (found.pairs, found.prompts, found.same_share) == (4, 3, pytest.approx(0.2))
    assert found.accuracy.value == 2.5 / 4
    assert found.margin_mean.value == pytest.approx((1 - 1 + 0 + 3) / 4)
    assert (found.accuracy_longer.value, found.pairs_longer) == (0.75, 2)
    assert (found.accuracy_shorter.value, found.pairs_shorter) == (0.0, 1)
    assert found.auc.value == auc([2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, 0.0])
    assert found.calibration_error == calibration_error([1.0, -1.0, 0.0, 3.0])
    assert sum(count for _, _, count in found.curve) == 4
    assert labels(PAIRS[4:]) is None
    assert labels(PAIRS[3:4]).accuracy == Measured(1.0), "one prompt has no interval"
    assert labels(PAIRS[3:4]).accuracy_shorter is None


def test_the_interval_of_an_accuracy_is_about_that_of_coin_tosses():
    rng = random.Random(5)
    many = [pair(i, (1.0 if rng.random() < 0.7 else -1.0, 1), (0.0, 1)) for i in range(400)]
    found = labels(many).accuracy
    p = found.value
    half_width = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert found.high - found.low == pytest.approx(2 * half_width, rel=0.1)
    assert found.low < 0.7 < found.high


def test_pairs_of_one_prompt_are_drawn_together():
    """Every pair ten times under its prompt: no new information, so no narrower interval."""
    rng = random.Random(6)
    single = [pair(i, (rng.gauss(0.5, 1), 1), (0.0, 1)) for i in range(60)]
    tenfold = [p for p in single for _ in range(10)]
    assert labels(tenfold).accuracy == labels(single).accuracy
    alone = labels([p._replace(prompt=i) for i, p in enumerate(tenfold)]).accuracy
    assert alone.high - alone.low < 0.5 * (
        labels(single).accuracy.high - labels(single).accuracy.low
    )


def test_weighted_auc_is_the_auc_of_repeated_pairs():
    rng = random.Random(7)
    some = [pair(i, (rng.randint(0, 4), 1), (rng.randint(0, 4), 1)) for i in range(15)]
    draws = list(prompt_weights([p.prompt for p in some], seed=1, resamples=30))
    expected = []
    for weights in draws:
        drawn = [p for p, w in zip(some, weights, strict=True) for _ in range(int(w))]
        expected.append(auc([p.chosen.reward for p in drawn], [p.rejected.reward for p in drawn]))
    found = labels(some, seed=1, resamples=30).auc
    assert (found.low, found.high) == pytest.approx(
        tuple(statistics.quantiles(expected, n=40, method="inclusive")[i] for i in (0, 38))
    )


def test_weights_are_draws_of_prompts():
    weights = list(prompt_weights(["a", "b", "a", "c"], seed=0, resamples=200))
    for w in weights:
        assert w[0] == w[2], "rows of one prompt come together"
        assert w[0] + w[1] + w[3] == 3
    again = list(prompt_weights(["a", "b", "a", "c"], seed=0, resamples=200))
    assert all((w == v).all() for w, v in zip(weights, again, strict=True))
    assert measured(lambda w: math.nan, ["a"], seed=0) is None
    assert math.isnan(weighted_mean(weights[0], 0 * weights[0]))


def test_the_first_file_is_the_reference_of_its_model():
    def file(model, name, scale, seed):
        return ScoredFile(model, name, groups=tuple(random_groups(200, scale=scale, seed=seed)))

    sft, policy, other = diagnose(
        [file("m", "sft", 1.0, 1), file("m", "policy", 0.1, 2), file("n", "sft", 5.0, 3)]
    )
    assert sft.shift is None
    assert other.shift is None, "another model's rewards have another scale"
    shift = policy.shift
    assert shift.reference == "sft"
    expected = policy.spread.difference_variance.value / sft.spread.difference_variance.value
    assert shift.variance_ratio.value == pytest.approx(expected)
    assert shift.variance_ratio.low < expected < shift.variance_ratio.high
    assert shift.reward_shift == pytest.approx(
        (policy.spread.reward_mean - sft.spread.reward_mean) / sft.spread.reward_std
    )
    assert shift.length_ratio == policy.lengths.length_mean / sft.lengths.length_mean


def test_a_reference_of_equal_rewards_has_no_ratio():
    flat = ScoredFile("m", "flat", groups=(group("a", (1.0, 1), (1.0, 2)),))
    _, policy = diagnose([flat, ScoredFile("m", "policy", groups=(A, B))])
    assert policy.shift.variance_ratio is None
    assert policy.shift.reward_shift is None


def test_pairs_are_groups_of_two_as_well():
    found = diagnose([ScoredFile("m", "held out", pairs=tuple(PAIRS))])[0]
    assert (found.kind, found.rows, found.spread.responses) == ("pairs", 5, 10)
    assert found.spread.duplicate_share == pytest.approx(1 / 10)
    assert found.labels == labels(PAIRS)
    assert found.spread.equal_share == pytest.approx(1 / 4)
