"""Regression within prompts against dummy variables, a plain sandwich, a jackknife and hands."""

import math

import numpy as np
import pytest

from shiftrm.core.within import LEAST_PROMPTS, centred, fit_within, spread_within


def data(seed=0, prompts=60, features=3, sizes=(2, 3, 5)):
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(prompts) for _ in range(sizes[i % len(sizes)])]
    x = rng.normal(size=(len(names), features)) * [1.0, 5.0, 0.2][:features] + 3.0
    level = {name: rng.normal() * 10 for name in set(names)}
    noise = {name: 0.1 + rng.random() for name in set(names)}
    r = np.array([level[n] + noise[n] * rng.normal() for n in names]) + x @ [0.5, -0.2, 0.0]
    order = rng.permutation(len(names))  # the rows of a prompt need not stand together
    return x[order], r[order], [names[i] for i in order]


def dummies(names):
    return np.array([[float(name == other) for other in sorted(set(names))] for name in names])


def test_coefficients_are_those_of_least_squares_with_a_constant_for_every_prompt():
    x, r, names = data()
    fit = fit_within(x, r, names)
    whole = np.hstack([x, dummies(names)])
    b, residual = np.linalg.lstsq(whole, r, rcond=None)[:2]
    np.testing.assert_allclose(fit.coefficients_F / fit.spreads_F, b[:3], atol=1e-10)
    within = r - dummies(names) @ np.linalg.lstsq(dummies(names), r, rcond=None)[0]
    assert fit.explained == pytest.approx(1 - residual[0] / (within @ within))
    assert (fit.prompts, fit.rows) == (60, len(r))


def test_errors_are_those_of_the_clustered_sandwich():
    """The covariance of all coefficients with dummies, summed over pairs of rows of a prompt."""
    x, r, names = data(seed=3)
    fit = fit_within(x, r, names)
    whole = np.hstack([x / fit.spreads_F, dummies(names)])
    bread = np.linalg.inv(whole.T @ whole)
    e = r - whole @ (bread @ (whole.T @ r))
    same = np.array([[a == b for b in names] for a in names])
    meat = whole.T @ (np.outer(e, e) * same) @ whole
    plain = bread @ meat @ bread * 60 / 59
    np.testing.assert_allclose(fit.errors_F, np.sqrt(np.diag(plain)[:3]), rtol=1e-8)


def test_errors_are_near_those_of_leaving_one_prompt_out():
    x, r, names = data(prompts=200)
    fit = fit_within(x, r, names)
    left_out = []
    for one in dict.fromkeys(names):
        rest = [i for i, name in enumerate(names) if name != one]
        part = fit_within(x[rest], r[rest], [names[i] for i in rest])
        left_out.append(part.coefficients_F / part.spreads_F * fit.spreads_F)
    jackknife = np.sqrt(199 / 200 * ((left_out - np.mean(left_out, axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(fit.errors_F, jackknife, rtol=0.1)


def test_by_hand():
    """Ten prompts, two responses each: the feature is 0 and 2, the reward rises by 3 and 5."""
    names = [i for i in range(10) for _ in range(2)]
    x = np.array([[0.0], [2.0]] * 10)
    r = np.array([value for i in range(10) for value in (i, i + (3.0 if i % 2 else 5.0))])
    fit = fit_within(x, r, names, scale=2.0)
    # Within a prompt x is -1 and 1: variance 20 / (20 - 10). The slope by one unit is 2.
    assert fit.spreads_F[0] == pytest.approx(math.sqrt(2))
    assert fit.coefficients_F[0] == pytest.approx(2 * math.sqrt(2) / 2)
    # Residuals are -+0.5 and +-0.5, so X_g' e_g = +-1 and V = 10 / 9 * 10 / 20^2 a unit.
    assert fit.errors_F[0] == pytest.approx(math.sqrt(10 / 9 * 10 / 400) * math.sqrt(2) / 2)
    # Of the sum of squares 2 (5 * 1.5^2 + 5 * 2.5^2) = 85, 2 * 10 * 0.5^2 = 5 is left.
    assert fit.explained == pytest.approx(1 - 5 / 85)
    found = fit.measured(0)
    assert found.high - found.value == pytest.approx(2.262157 * fit.errors_F[0], rel=1e-6)
    assert spread_within(r, names) == pytest.approx(math.sqrt(85 / 10))


def test_neither_a_prompt_s_level_nor_the_unit_of_a_feature_matters():
    x, r, names = data()
    shift = {name: i * 1e3 for i, name in enumerate(dict.fromkeys(names))}
    other = fit_within(
        x * [1e-3, 1e5, 7.0] + [[shift[n], 0.0, 5.0] for n in names],
        r + [shift[n] for n in names],
        names,
    )
    fit = fit_within(x, r, names)
    # Column 0 now also has the prompt's level, which is taken out again.
    np.testing.assert_allclose(other.coefficients_F, fit.coefficients_F, rtol=1e-5)
    np.testing.assert_allclose(other.errors_F, fit.errors_F, rtol=1e-5)


def test_a_reference_s_difference_is_the_difference_of_the_coefficients():
    x, r, names = data()
    other = x @ [1.0, 1.0, 1.0]
    difference = fit_within(x, r / 2 - other, names)
    ours, theirs = fit_within(x, r, names, scale=2.0), fit_within(x, other, names)
    np.testing.assert_allclose(
        difference.coefficients_F, ours.coefficients_F - theirs.coefficients_F, atol=1e-12
    )


def test_features_that_say_the_same_get_equal_shares():
    x, r, names = data()
    twice = np.hstack([x, -2 * x[:, :1]])
    fit, plain = fit_within(twice, r, names), fit_within(x, r, names)
    assert fit.coefficients_F[0] == pytest.approx(plain.coefficients_F[0] / 2)
    assert fit.coefficients_F[3] == pytest.approx(-plain.coefficients_F[0] / 2)
    assert fit.errors_F[0] == pytest.approx(plain.errors_F[0] / 2)
    assert fit.explained == pytest.approx(plain.explained)


def test_what_hardly_varies_is_left_out():
    x, r, names = data()
    rare = np.zeros(len(names))
    for name in sorted(set(names))[: LEAST_PROMPTS - 1]:
        rare[names.index(name)] = 1.0
    level = np.array([float(name[1:]) / 3 for name in names])  # the same within every prompt
    fit = fit_within(np.column_stack([x, rare, level, np.full(len(r), 0.1)]), r, names)
    assert np.isnan(fit.coefficients_F[3:]).all()
    assert fit.measured(4) is None
    plain = fit_within(x, r, names)
    np.testing.assert_allclose(fit.coefficients_F[:3], plain.coefficients_F)


def test_prompts_with_one_response_say_nothing():
    x, r, names = data()
    more = fit_within(np.vstack([x, x[:5]]), np.append(r, r[:5] + 9), [*names, *range(5)])
    np.testing.assert_allclose(more.coefficients_F, fit_within(x, r, names).coefficients_F)
    assert more.prompts == 60


@pytest.mark.parametrize("case", ["alone", "flat", "few", "constant", "none"])
def test_nothing_to_measure(case):
    x, r, names = data(prompts=30 if case != "few" else 4)
    found = {
        "alone": lambda: fit_within(x, r, list(range(len(r)))),
        "flat": lambda: fit_within(x, np.full(len(r), 0.1), names),
        "few": lambda: fit_within(x, r, names),
        "constant": lambda: fit_within(np.ones_like(x), r, names),
        "none": lambda: fit_within(np.empty((0, 3)), np.empty(0), []),
    }[case]()
    assert found is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Rewards with other noise in every prompt; the second feature is seldom there."""
    rng = np.random.default_rng(0)
    names = [i for i in range(80) for _ in range(2)]
    inside = 0
    for _ in range(400):
        x = np.column_stack([rng.normal(size=160), rng.random(160) < 0.25]).astype(float)
        noise = rng.normal(size=160) * np.repeat(rng.random(80) * 2, 2)
        fit = fit_within(x, x @ [0.3, -0.5] + noise, names)
        truth = [0.3, -0.5] * fit.spreads_F
        found = [fit.measured(f) for f in range(2)]
        inside += sum(m.low <= t <= m.high for m, t in zip(found, truth, strict=True))
    assert 0.91 < inside / 800 < 0.97


def test_centred():
    values = np.array([[1.0], [0.1], [3.0], [0.1], [0.1]])
    index = np.array([0, 1, 0, 1, 1])
    assert centred(values, index)[:, 0].tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    assert spread_within(np.array([1.0, 2.0]), ["a", "b"]) == 0.0
