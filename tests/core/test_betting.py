"""The anytime-valid test of accuracy, against enumeration, brute force and simulation."""

import itertools
import random

import numpy as np
import pytest

from shiftrm.core.betting import FRACTIONS, accuracy_bound, e_values, start_weights
from shiftrm.errors import UserError


def of(correct, rounds=None, threshold=0.6, weights=None, largest=None, **settings):
    n = len(correct)
    return e_values(
        correct,
        [1.0] * n if weights is None else weights,
        [1] * n if rounds is None else rounds,
        threshold=threshold,
        largest_N=[1.0] * n if largest is None else largest,
        **settings,
    )


def by_loops(correct, weights, rounds, largest, threshold, planned, fractions, upto):
    """The definition, one capital at a time, with the bets written as lambda (w e - w eps)."""
    eps, total, spent = 1 - threshold, 0.0, 0.0
    for start in range(1, rounds[upto] + 1):
        share = 1 / planned if planned else 1 / (start * (start + 1))
        spent += share
        capitals = []
        for f in fractions:
            capital = 1.0
            for i in range(upto + 1):
                if rounds[i] >= start:
                    stake = f / (largest[i] * eps)
                    capital *= 1 + stake * (weights[i] * (1 - correct[i]) - weights[i] * eps)
            capitals.append(capital)
        total += share * sum(capitals) / len(capitals)
    return total + 1 - spent


def test_by_hand():
    # eps = 0.4; an error pays 1 + 0.5 (1/0.4 - 1) = 1.75, a right pair 0.5, a tie 1 + 0.5/4 = 1.125
    found = of([0.0, 1.0, 0.5], planned=1, fractions=[0.5])
    assert found == pytest.approx([1.75, 0.875, 0.984375])


def test_a_late_start_forgets_what_was_before():
    # Two planned rounds: half of the capital waits for the second.
    found = of([1.0, 0.0], rounds=[1, 2], planned=2, fractions=[0.5])
    assert found == pytest.approx([0.5 * 0.5 + 0.5, 0.5 * (0.5 * 1.75) + 0.5 * 1.75])


@pytest.mark.parametrize("planned", [None, 5])
def test_equals_the_definition(planned):
    rng = random.Random(3)
    for _ in range(20):
        n = rng.randint(1, 12)
        rounds = sorted(rng.choices([1, 2, 4, 5], k=n))
        largest = [rng.choice([1.0, 2.0, 3.5]) for _ in range(n)]
        weights = [rng.random() * w for w in largest]
        correct = [rng.choice([0.0, 0.5, 1.0]) for _ in range(n)]
        found = of(correct, rounds, 0.7, weights, largest, planned=planned)
        wanted = [
            by_loops(correct, weights, rounds, largest, 0.7, planned, FRACTIONS, i)
            for i in range(n)
        ]
        assert found == pytest.approx(wanted, rel=1e-12)


def test_enumeration_on_the_boundary():
    """Over all outcomes of 10 draws with exactly the allowed errors: mean 1, alarms <= alpha."""
    rounds, eps = [1, 1, 2, 2, 2, 3, 3, 4, 4, 4], 0.35
    mean, alarms = 0.0, {0.05: 0.0, 0.2: 0.0}
    for errors in itertools.product([0, 1], repeat=10):
        probability = float(np.prod([eps if e else 1 - eps for e in errors]))
        values = of([1.0 - e for e in errors], rounds, 1 - eps, planned=4)
        mean += probability * values[-1]
        for alpha in alarms:
            alarms[alpha] += probability * (values.max() >= 1 / alpha)
    assert mean == pytest.approx(1.0, rel=1e-12)
    assert 0 < alarms[0.2] <= 0.2
    assert alarms[0.05] <= 0.05


def test_enumeration_of_weighted_draws():
    """A pool of four pairs, drawn unevenly and with replacement: the mean is still exactly 1."""
    correct, q = [0.0, 1.0, 1.0, 0.5], [0.4, 0.1, 0.3, 0.2]  # accuracy 0.625
    weights = [0.25 / share for share in q]
    mean = 0.0
    for drawn in itertools.product(range(4), repeat=4):
        probability = float(np.prod([q[i] for i in drawn]))
        values = of(
            [correct[i] for i in drawn],
            [1, 1, 2, 2],
            0.625,
            [weights[i] for i in drawn],
            [max(weights)] * 4,
        )
        mean += probability * values[-1]
    assert mean == pytest.approx(1.0, rel=1e-12)


def simulate(rng, *, accuracy_of, rounds=10, labels=20, pool=40):
    """One run that draws where errors are, and stops auditing early if the evidence looks low."""
    correct, weights, places, largest = [], [], [], []
    evidence = 1.0
    for number in range(1, rounds + 1):
        wrong = round(pool * (1 - accuracy_of(number)))
        right_P = np.array([0.0] * wrong + [1.0] * (pool - wrong))
        # Adaptive: after bad luck the errors are drawn three times as often.
        tilt_P = np.where(right_P == 0, 3.0 if evidence < 1 else 1.0, 1.0)
        q_P = 0.5 / pool + 0.5 * tilt_P / tilt_P.sum()
        weight_P = (1 / pool) / q_P
        for i in rng.choice(pool, size=labels, p=q_P):
            correct.append(right_P[i])
            weights.append(weight_P[i])
            largest.append(weight_P.max())
            places.append(number)
        values = of(correct, places, 0.65, weights, largest, planned=rounds)
        evidence = values[-1]
        if values.max() >= 20:
            return True
    return False


def test_false_alarms_with_adaptive_draws():
    rng = np.random.default_rng(0)
    runs = [simulate(rng, accuracy_of=lambda _: 0.65) for _ in range(300)]
    assert sum(runs) / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


def test_power_after_a_late_fall():
    rng = np.random.default_rng(1)
    fell = [simulate(rng, accuracy_of=lambda n: 0.85 if n <= 4 else 0.4) for _ in range(50)]
    assert sum(fell) >= 45


def test_bound():
    errors = [0.0] * 30
    found = accuracy_bound(errors, [1.0] * 30, [1] * 30, alpha=0.05, largest_N=[1.0] * 30)
    below, above = (of(errors, threshold=found + shift).max() for shift in (-1e-4, 1e-4))
    assert below < 20 <= above
    right = [1.0] * 30
    assert accuracy_bound(right, right, [1] * 30, alpha=0.05, largest_N=right) == 1.0


def test_start_weights():
    assert start_weights(3) == pytest.approx([1 / 2, 1 / 6, 1 / 12])
    assert start_weights(2, 4) == pytest.approx([0.25, 0.25])
    with pytest.raises(UserError, match="planned"):
        start_weights(5, 4)


def test_e_values_are_finite():
    values = of([0.0] * 2000, threshold=1 - 1e-6)
    assert np.isfinite(values).all()
    assert values[-1] > 1e200


def test_no_labels_yet():
    assert len(of([])) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"weights": [1.0]}, "differ in number"),
        ({"weights": [2.0, 1.0]}, "largest of its pool"),
        ({"rounds": [2, 1]}, "never fall"),
        ({"rounds": [0, 1]}, "from 1"),
        ({"correct": [1.5, 0.0]}, "from 0 to 1"),
        ({"fractions": [1.0]}, "stake"),
    ],
)
def test_bad_values(change, said):
    with pytest.raises(UserError, match=said):
        of(**{"correct": [1.0, 0.0], **change})
