"""Intervals against a numerical integral and hand values; the index against hand counts."""

import math

import numpy as np
import pytest

from shiftrm.metrics import UndeclaredMetric
from shiftrm.records import Record
from shiftrm.report.measurements import Measurements, SeedEstimate, estimate, t_quantile_95


def coverage(quantile: float, degrees: int) -> float:
    """P(|T| <= quantile) by integrating Student's density: independent of the table."""
    x = np.linspace(-quantile, quantile, 200_001)
    constant = math.gamma((degrees + 1) / 2) / (
        math.sqrt(degrees * math.pi) * math.gamma(degrees / 2)
    )
    density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    return float(np.trapezoid(density, x))


@pytest.mark.parametrize("degrees", [*range(1, 36), 60, 120])
def test_t_quantiles_cover_95_percent(degrees):
    assert coverage(t_quantile_95(degrees), degrees) == pytest.approx(0.95, abs=1e-5)


def test_t_quantile_needs_two_values():
    with pytest.raises(ValueError, match="at least two"):
        t_quantile_95(0)


def test_interval_by_hand():
    # 1, 2, 3: standard deviation 1, standard error 1/sqrt(3), t(2) = 4.3027.
    found = estimate({0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None
    assert found.mean == pytest.approx(2.0)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert (found.low, found.high) == pytest.approx((-0.4841, 4.4841), abs=1e-4)
    assert not found.excludes_zero


def test_interval_of_two_seeds_that_excludes_zero():
    # 1.0 and 1.1: standard error 0.05, t(1) = 12.7062.
    found = estimate({0: 1.0, 7: 1.1})
    assert found is not None
    assert found.half_width == pytest.approx(0.63531, abs=1e-4)
    assert found.excludes_zero


def test_one_seed_has_no_interval_and_never_excludes_zero():
    assert estimate({3: 9.0}) == SeedEstimate(9.0, None, 1)
    assert not SeedEstimate(9.0, None, 1).excludes_zero
    assert estimate({}) is None


def test_later_record_counts_and_curves_are_sorted():
    def record(value, step=None, seed=0, n=None):
        return Record("ppo", "fixed", 1, "kl", value, step=step, seed=seed, n=n)

    m = Measurements(
        [record(1.0), record(2.0, n=10), record(5.0, 2), record(4.0, 1), record(3.0, 1)]
    )
    assert m.final("ppo", "fixed", 1, "kl") == {0: 2.0}
    assert m.curve("ppo", "fixed", 1, "kl") == {0: [(1, 3.0), (2, 5.0)]}
    assert m.sample_size("ppo", "fixed", 1, "kl") == 10


def test_sample_sizes_add_up_over_seeds_only_if_all_are_known():
    def record(seed, n):
        return Record("evaluate", "fixed", 1, "gold_mean", 1.0, seed=seed, n=n)

    both = Measurements([record(0, 100), record(1, 150)])
    assert both.sample_size("evaluate", "fixed", 1, "gold_mean") == 250
    one = Measurements([record(0, 100), record(1, None)])
    assert one.sample_size("evaluate", "fixed", 1, "gold_mean") is None


def test_names_of_earlier_training_logs_are_read_as_todays():
    """Where they were renamed: "kl" of a training is another number than "kl" of an evaluation."""
    m = Measurements(
        [
            Record("ppo", "fixed", 1, "kl", 1.0, step=1),
            Record("ppo", "fixed", 1, "proxy_mean", 2.0, step=1),
            Record("evaluate", "fixed", 1, "kl", 3.0),
        ]
    )
    assert m.curve("ppo", "fixed", 1, "sequence_kl") == {0: [(1, 1.0)]}
    assert m.rounds("fixed", "ppo", "standardised_mean") == [1]
    assert m.mean("fixed", 1, "kl") == 3.0
    assert m.mean("fixed", 1, "sequence_kl") is None


def test_an_undeclared_metric_cannot_be_read():
    with pytest.raises(UndeclaredMetric, match="kll"):
        Measurements([]).final("evaluate", "fixed", 1, "kll")
