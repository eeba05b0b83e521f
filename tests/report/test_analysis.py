"""Gaps, matched KL and adaptation readings against numbers worked out by hand."""

import math

import pytest

from shiftrm.records import Record
from shiftrm.report.analysis import (
    accuracy_noise,
    adaptation,
    gold_gap,
    influence,
    kl_below_zero,
    kl_spreads,
    normalised_differences,
    relative_gap,
)
from shiftrm.report.measurements import Measurements
from shiftrm.report.pictures import pictures
from shiftrm.report.results import Results

from .records import DEMO, change


def test_gold_gap_is_paired_by_seed(three_seeds):
    # 4.77-4.32, 5.10-4.46, 4.73-4.62 = 0.45, 0.64, 0.11: mean 0.40, sd sqrt(0.1442/2) = 0.26851,
    # half width 4.3027 * 0.26851 / sqrt(3) = 0.66703.
    gap = gold_gap(Measurements(three_seeds), "metarm_scale_free", "fixed")
    assert gap is not None
    assert gap.round == 3
    assert gap.difference.mean == pytest.approx(0.40)
    assert gap.difference.half_width == pytest.approx(0.66703, abs=1e-4)
    assert not gap.difference.excludes_zero
    assert gap.matched is True


def test_gold_gap_that_excludes_zero(three_seeds):
    # 0.51, 0.49, 0.53: mean 0.51, sd 0.02, half width 4.3027 * 0.02 / sqrt(3) = 0.04968.
    gap = gold_gap(Measurements(three_seeds), "fresh_labels", "fixed")
    assert gap is not None
    assert gap.difference.mean == pytest.approx(0.51)
    assert gap.difference.half_width == pytest.approx(0.04968, abs=1e-4)
    assert gap.difference.excludes_zero


def test_sampling_error_of_one_seed(one_seed):
    # Both arms: standard deviation 1.5 over 400 responses; 1.96 * sqrt(2 * 2.25 / 400) = 0.20789.
    gap = gold_gap(Measurements(one_seed), "retrained", "fixed")
    assert gap is not None
    assert gap.difference.half_width is None
    assert gap.sampling_half_width == pytest.approx(0.20789, abs=1e-5)


def test_gold_gap_takes_the_last_round_both_arms_have(one_seed):
    records = change(one_seed, None, method="fixed", round=3, metric="gold_mean")
    gap = gold_gap(Measurements(records), "retrained", "fixed")
    assert gap is not None
    assert gap.round == 2
    assert (
        gold_gap(Measurements(change(records, None, method="fixed")), "retrained", "fixed") is None
    )


def test_gold_gap_uses_common_seeds_only(three_seeds):
    records = change(
        three_seeds, None, method="fixed", round=3, metric="gold_mean", seed=1, stage="evaluate"
    )
    gap = gold_gap(Measurements(records), "metarm_scale_free", "fixed")
    assert gap is not None
    assert gap.difference.count == 2
    assert gap.difference.mean == pytest.approx((0.45 + 0.11) / 2)


@pytest.mark.parametrize(
    ("values", "gap"),
    [([4.0, 5.0], 0.25), ([6.0, 4.0], 0.5), ([0.0, 1.0], math.inf), ([0.0, 0.0], 0.0)],
)
def test_relative_gap(values, gap):
    assert relative_gap(values) == pytest.approx(gap)


def test_kl_spread_names_the_extremes(one_seed):
    records = change(
        one_seed, 9.0, method="metarm_scale_free", round=3, metric="kl", stage="evaluate", step=None
    )
    spreads = kl_spreads(Results(records, DEMO))
    assert [spread.matched for spread in spreads] == [True, True, False]
    assert (spreads[2].highest, spreads[2].highest_kl) == ("metarm_scale_free", 9.0)
    assert spreads[2].gap == pytest.approx(0.5)
    gap = gold_gap(Measurements(records), "metarm_scale_free", "fixed")
    assert gap is not None
    assert gap.matched is False


def test_accuracy_noise():
    # 2 * sqrt(2 * 0.25 / 200) = 0.1; large samples are floored at 0.02; unknown sizes give 0.05.
    assert accuracy_noise(0.5, 0.5, 200, 200) == pytest.approx(0.1)
    assert accuracy_noise(0.5, 0.5, 10**6, 10**6) == 0.02
    assert accuracy_noise(0.5, 0.5, None, 200) == 0.05


def test_adaptation_compares_two_reward_models_on_one_policy(three_seeds):
    # Round 2: the round-1 model after PPO (0.66, spread 0.5) against the adapted one (0.70, 1.8).
    found = adaptation(Results(three_seeds, DEMO), "metarm_scale_free", 2)
    assert found.accuracy == pytest.approx((0.66, 0.70))
    assert found.relative_variance == pytest.approx((0.5, 1.8))
    assert found.reading == "sharper"


def test_first_adaptation_is_compared_with_the_vanilla_model(three_seeds):
    found = adaptation(Results(three_seeds, DEMO), "metarm_scale_free", 1)
    assert found.accuracy == pytest.approx((0.72, 0.76))
    without_fixed = Results([r for r in three_seeds if r.method != "fixed"], DEMO)
    assert adaptation(without_fixed, "metarm_scale_free", 1) == found


@pytest.mark.parametrize(
    ("accuracy", "relative_variance", "reading"),
    [
        (0.70, 1.8, "sharper"),
        (0.66, 1.8, "louder, not sharper"),
        (0.60, 1.8, "louder, not sharper"),
        (0.60, 0.5, "duller"),
        (0.67, 0.5, "no clear change"),
        (None, 1.8, "not measured"),
    ],
)
def test_reading_of_an_adaptation(three_seeds, accuracy, relative_variance, reading):
    where = {"stage": "evaluate", "method": "metarm_scale_free", "round": 2}
    records = change(three_seeds, accuracy, **where, metric="accuracy_policy_before")
    records = change(
        records, relative_variance, **where, metric="relative_difference_variance_before"
    )
    records = change(records, 0.4, **where, metric="difference_variance_before")
    assert adaptation(Results(records, DEMO), "metarm_scale_free", 2).reading == reading


def test_mere_rescaling_is_louder(three_seeds):
    """Raw variance up, relative variance and accuracy as they were."""
    where = {"stage": "evaluate", "method": "metarm_paper", "round": 2}
    records = change(three_seeds, 4.0, **where, metric="difference_variance_before")
    records = change(records, 0.5, **where, metric="relative_difference_variance_before")
    found = adaptation(Results(records, DEMO), "metarm_paper", 2)
    assert found.reading == "louder, not sharper"


def test_influence_is_the_mean_over_steps_then_seeds():
    def record(seed, step, value):
        return Record("reward_model", "metarm", 1, "meta_influence", value, step=step, seed=seed)

    m = Measurements([record(0, 1, 0.1), record(0, 2, 0.3), record(1, 1, 0.4)])
    found = influence(m, "metarm", 1)
    assert found is not None
    assert found.mean == pytest.approx(0.3)
    assert influence(m, "metarm", 2) is None


def test_normalised_by_the_own_maximum_of_every_seed():
    def record(seed, metric, values):
        return Record("evaluate", "metarm", 1, metric, values, seed=seed)

    m = Measurements(
        [
            record(0, "difference_values_before", [1.0, 2.0]),
            record(0, "difference_values_sft", [4.0, 0.5]),
            record(1, "difference_values_before", [10.0, 5.0]),
            record(1, "difference_values_sft", [1.0]),
            record(2, "difference_values_before", [0.0]),
        ]
    )
    assert normalised_differences(m, "metarm", 1) == pytest.approx([0.25, 0.5, 1.0, 0.5, 0.0])


def test_a_kl_below_zero_in_old_records_is_said_on_the_page(one_seed):
    def with_kl(*values):
        point = {"method": "retrained", "round": 1, "seed": 0, "metric": "sequence_kl"}
        new = [Record(stage="ppo", step=900 + k, value=v, **point) for k, v in enumerate(values)]
        return Results([*one_seed, *new], DEMO)

    steps = sum(r.stage == "ppo" and r.metric == "sequence_kl" for r in one_seed)
    assert kl_below_zero(with_kl(0.0, -0.05)) == "", "noise around 0"
    said = kl_below_zero(with_kl(-1.2, 0.4, -0.3))
    assert said.startswith(f"2 of {steps + 3} policy steps have a KL clearly below 0")
    [picture] = [p for p in pictures(with_kl(-1.2, 0.4, -0.3)) if "against KL" in p.title]
    assert picture.caption.endswith(said)
