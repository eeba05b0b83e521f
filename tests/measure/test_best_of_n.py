"""Best-of-n against enumeration of all subsets, simulation and closed forms."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftrm.measure.best_of_n import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_weights,
    describe,
    powers_of_two,
)


def by_enumeration(proxy, gold, n):
    """Mean over all subsets of size n; a tie at the top is a fair draw."""
    total = Fraction(0)
    subsets = list(itertools.combinations(range(len(proxy)), n))
    for subset in subsets:
        top = max(proxy[i] for i in subset)
        best = [i for i in subset if proxy[i] == top]
        total += sum(Fraction(gold[i]) for i in best) / len(best)
    return float(total / len(subsets))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_all_subsets(data):
    size = data.draw(st.integers(1, 8))
    scores = st.lists(st.integers(0, 4), min_size=size, max_size=size)  # ties are common
    proxy, gold = data.draw(scores), data.draw(scores)
    n = list(range(1, size + 1))
    chosen, measured = best_of_n(proxy, gold, n=n)
    for k in n:
        assert measured[0, k - 1] == pytest.approx(by_enumeration(proxy, gold, k), abs=1e-12)
        assert chosen[0, k - 1] == pytest.approx(by_enumeration(proxy, proxy, k), abs=1e-12)


def test_by_hand():
    """Proxy order is gold 3, 1, 2. n = 2: {3,1} -> 1, {3,2} -> 2, {1,2} -> 2; mean 5/3."""
    _, gold = best_of_n([0.0, 1.0, 2.0], [3.0, 1.0, 2.0], n=[1, 2, 3])
    assert gold[0] == pytest.approx([2.0, 5 / 3, 2.0])


def test_weights_are_exact_fractions():
    for size, n in [(1, 1), (7, 3), (40, 17), (40, 40)]:
        exact = [
            float(Fraction(math.comb(i - 1, n - 1), math.comb(size, n))) for i in range(1, size + 1)
        ]
        assert best_of_n_weights(size, n) == pytest.approx(exact, rel=1e-11)


def test_thousands_of_samples():
    """Proxy = rank: the expected best of n out of N without replacement is n (N + 1) / (n + 1)."""
    size = 16384
    ranks = np.arange(1.0, size + 1)
    n = [1, 2, 100, 4096, 16384]
    chosen, _ = best_of_n(ranks, ranks, n=n)
    assert chosen[0] == pytest.approx([k * (size + 1) / (k + 1) for k in n], rel=1e-10)


def test_against_simulation():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=60)
    gold = proxy - 0.5 * proxy**2 + rng.normal(size=60)
    n = 9
    draws = np.array([rng.permutation(60)[:n] for _ in range(40_000)])
    best = draws[np.arange(len(draws)), proxy[draws].argmax(axis=1)]
    _, expected = best_of_n(proxy, gold, n=[n])
    error = gold[best].std() / math.sqrt(len(draws))
    assert abs(expected[0, 0] - gold[best].mean()) < 4 * error


def test_is_unbiased_for_the_policy():
    """Over many draws of N samples, the mean is that of fresh best-of-n draws: E max of 4 normals.

    The expected maximum of four standard normals is 1.02938 (tables of order statistics).
    """
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(20_000, 6))
    chosen, _ = best_of_n(samples, samples, n=[4])
    assert chosen.mean() == pytest.approx(1.02938, abs=0.02)


def test_order_of_samples_and_chunks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(2)
    proxy, gold = rng.integers(0, 5, (7, 30)).astype(float), rng.normal(size=(7, 30))
    order = rng.permutation(30)
    expected = best_of_n(proxy, gold, n=[1, 3, 30])
    shuffled = best_of_n(proxy[:, order], gold[:, order], n=[1, 3, 30])
    monkeypatch.setattr("shiftrm.measure.best_of_n._CHUNK", 60)
    chunked = best_of_n(proxy, gold, n=[1, 3, 30])
    for a, b, c in zip(expected, shuffled, chunked, strict=True):
        assert b == pytest.approx(a)
        assert c == pytest.approx(a)
        assert c.shape == (7, 3)


def test_kl():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(1000) == pytest.approx(5.9087, abs=1e-3)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


@pytest.mark.parametrize(
    ("proxy", "gold", "n", "message"),
    [
        ([1.0, 2.0], [1.0], [1], "one shape"),
        ([], [], [1], "one shape"),
        ([1.0, float("nan")], [1.0, 2.0], [1], "not finite"),
        ([1.0, 2.0], [1.0, 2.0], [3], "from 1 to the number of samples, 2"),
        ([1.0, 2.0], [1.0, 2.0], [0], "from 1 to"),
    ],
)
def test_refusals(proxy, gold, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n(proxy, gold, n=n)


def test_powers_of_two():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(10) == [1, 2, 4, 8, 10]


def world(prompts=60, size=256, seed=0):
    """Proxy = gold's mistake: gold falls where the proxy is extreme."""
    rng = np.random.default_rng(seed)
    proxy = rng.normal(size=(prompts, size))
    return proxy, proxy - 0.45 * proxy**2 + rng.normal(size=(prompts, 1))


def test_curve_is_the_mean_over_prompts_with_intervals():
    proxy, gold = world()
    curve = best_of_n_curve(list(proxy), list(gold), n=[64, 1, 8])
    assert [point.n for point in curve.points] == [1, 8, 64]
    expected = best_of_n(proxy, gold, n=[1, 8, 64])[1].mean(axis=0)
    assert [point.gold.value for point in curve.points] == pytest.approx(expected)
    assert curve.points[0].gold.value == pytest.approx(gold.mean())
    for point in curve.points:
        assert point.gold.low < point.gold.value < point.gold.high
    assert (curve.prompts, curve.samples) == (60, 256)


def test_over_optimisation_is_seen_in_words():
    proxy, gold = world()
    curve = best_of_n_curve(list(proxy), list(gold))
    assert curve.peak in (2, 4, 8)
    assert curve.drop.low > 0
    assert f"Gold peaks at n = {curve.peak} " in describe(curve)
    assert "over-optimised" in describe(curve)
    few = best_of_n_curve(list(proxy[:20]), list(gold[:20]))
    assert "But 20 prompts are few" in describe(few)
    honest = best_of_n_curve(list(proxy), list(proxy))
    assert honest.peak == 256
    assert "no over-optimisation up to there" in describe(honest)
    noise = np.random.default_rng(3).normal(size=gold.shape)
    assert "not clearly a decline" in describe(best_of_n_curve(list(proxy), list(noise)))
    assert "Gold is highest without any choice" in describe(
        best_of_n_curve(list(proxy), list(-proxy))
    )


def test_prompts_of_different_sizes():
    proxy, gold = world(prompts=4, size=8)
    ragged_proxy, ragged_gold = [*proxy[:2], proxy[2][:5], proxy[3][:5]], [
        *gold[:2], gold[2][:5], gold[3][:5],
    ]  # fmt: skip
    curve = best_of_n_curve(ragged_proxy, ragged_gold)
    assert [point.n for point in curve.points] == [1, 2, 4, 5]
    single = [
        best_of_n(p, g, n=[4])[1][0, 0] for p, g in zip(ragged_proxy, ragged_gold, strict=True)
    ]
    assert curve.points[2].gold.value == pytest.approx(np.mean(single))
    with pytest.raises(ValueError, match="from 1 to 5"):
        best_of_n_curve(ragged_proxy, ragged_gold, n=[6])


def test_one_prompt_has_no_interval():
    curve = best_of_n_curve([[0.0, 1.0, 2.0]], [[0.0, 5.0, 1.0]])
    assert curve.points[0].gold.low is None
    assert "may be chance" in describe(curve)
    assert "Only n = 1" in describe(best_of_n_curve([[1.0]], [[1.0]]))


@pytest.mark.slow
def test_a_thousand_prompts_of_16384_samples():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(1000, 16384))
    curve = best_of_n_curve(proxy, proxy, resamples=50)
    assert curve.points[-1].n == 16384
    assert curve.points[-1].proxy.value == pytest.approx(proxy.max(axis=1).mean())
