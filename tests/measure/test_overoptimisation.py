"""Over-optimisation along a path: values worked out by hand, and forms recovered exactly."""

import math

import numpy as np
import pytest

from shiftrm.measure.overoptimisation import (
    Path,
    fit,
    overoptimisation,
    path_from_rows,
    smoothed,
    value_at,
)

PATH = Path(
    kl=(0.0, 1.0, 3.0, 2.0, 5.0),
    proxy=(0.0, 1.0, 2.0, 2.5, 4.0),
    gold=(1.0, 3.0, 4.0, 3.5, -1.0),
)


def test_by_hand():
    found = overoptimisation(PATH, at_kl=(0.0, 0.5, 2.0, 5.0, 6.0))
    assert (found.points, found.peak_gold, found.peak_kl) == (5, 4.0, 3.0)
    assert (found.final_gold, found.final_kl, found.final_proxy) == (-1.0, 5.0, 4.0)
    assert (found.drop, found.proxy_rise) == (5.0, 2.0)
    # KL 2 is first reached half-way between the points at 1 and 3, not at the later point.
    assert found.gold_at == {0.0: 1.0, 0.5: 2.0, 2.0: 3.5, 5.0: -1.0, 6.0: None}


def test_rising_path():
    found = overoptimisation(Path((0.0, 1.0), (0.0, 1.0), (0.0, 2.0)))
    assert found.drop == 0


def test_value_at_edges():
    assert value_at([1.0], [7.0], 1.0) == 7.0
    assert value_at([1.0], [7.0], 0.5) is None
    assert value_at([], [], 1.0) is None
    assert value_at([2.0, 2.0, 3.0], [5.0, 6.0, 8.0], 2.0) == 5.0
    assert value_at([3.0, 1.0], [0.0, 4.0], 2.0) == 2.0  # falling KL counts as well


def test_no_points():
    with pytest.raises(ValueError, match="at least one"):
        overoptimisation(Path((), (), ()))


def test_rows_without_numbers_are_left_out():
    rows = [
        {"step": 1, "kl": 0.5, "proxy_mean": 1, "gold_mean": 2.0},
        {"step": 2, "kl": 0.7, "proxy_mean": 1.5},
        {"step": 3, "kl": float("nan"), "proxy_mean": 1.0, "gold_mean": 1.0},
        {"step": 4, "kl": 1.5, "proxy_mean": 2.0, "gold_mean": None},
        {"step": 5, "kl": 2.5, "proxy_mean": 3.0, "gold_mean": 0.0},
    ]
    assert path_from_rows(rows) == Path((0.5, 2.5), (1.0, 3.0), (2.0, 0.0))
    assert path_from_rows([]) == Path((), (), ())


def test_smoothed():
    path = smoothed(PATH, 2)
    assert path.kl == pytest.approx((0.5, 2.0, 2.5, 3.5))
    assert path.gold == pytest.approx((2.0, 3.5, 3.75, 1.25))
    assert smoothed(PATH, 1) == PATH
    with pytest.raises(ValueError, match="from 1 to 5"):
        smoothed(PATH, 6)


KL = np.array([0.0, 0.3, 1.0, 2.0, 5.0, 9.0])


def test_best_of_n_form_is_recovered():
    d = np.sqrt(KL)
    found = fit(KL, d * (1.5 - 0.4 * d), form="bon")
    assert (found.alpha, found.beta) == pytest.approx((1.5, 0.4))
    assert found.r_squared == pytest.approx(1.0)
    assert found.peak_kl == pytest.approx((1.5 / 0.8) ** 2)


def test_rl_form_is_recovered():
    d = np.sqrt(KL[1:])
    found = fit(KL[1:], d * (1.0 - 0.7 * np.log(d)), form="rl")
    assert (found.alpha, found.beta) == pytest.approx((1.0, 0.7))
    assert found.peak_kl == pytest.approx(math.exp(2 * (1.0 / 0.7 - 1)))
    fine = np.linspace(0.5, 4, 4001)
    highest = fine[np.argmax(fine * (1.0 - 0.7 * np.log(fine)))]
    assert found.peak_kl == pytest.approx(highest**2, rel=1e-2)


def test_forms_without_a_peak_or_points():
    d = np.sqrt(KL)
    assert fit(KL, d * (1.0 + 0.1 * d), form="bon").peak_kl is None
    assert fit([0.0, 1.0, 4.0], [0.0, 1.0, 1.0], form="bon") is None
    assert fit([1.0, 1.0, 1.0], [0.0, 1.0, 1.0], form="rl") is None
    with pytest.raises(ValueError, match="negative"):
        fit([-1.0, 1.0, 2.0], [0.0, 1.0, 1.0], form="rl")
