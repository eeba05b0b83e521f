"""Agreement against published and hand-worked values."""

import numpy as np
import pytest

from shiftrm.measure.people.result import cohen_kappa, krippendorff_alpha, pairwise_agreement

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers,
# twelve units, missing answers; nominal alpha 0.743.
OBSERVERS = [
    "123321412...",
    "1233224125.3",
    ".3332342251.",
    "12332441251.",
]


def counts_of(columns, categories):
    return np.array([[column.count(c) for c in categories] for column in columns], dtype=float)


def krippendorffs_example():
    return counts_of(["".join(unit) for unit in zip(*OBSERVERS, strict=True)], "12345")


def test_alpha_is_the_published_one():
    counts = krippendorffs_example()
    assert counts.sum() == 41
    assert krippendorff_alpha(counts, np.ones(12)) == pytest.approx(0.743, abs=5e-4)


def test_weights_count_units_as_often_as_they_say():
    """Weights 2, 1, 0 against the rows written out twice, once and not at all."""
    counts = krippendorffs_example()
    weights = np.array([2.0, 1, 0] * 4)
    written_out = np.repeat(counts, weights.astype(int), axis=0)
    for statistic in (krippendorff_alpha, pairwise_agreement):
        expected = statistic(written_out, np.ones(len(written_out)))
        assert statistic(counts, weights) == pytest.approx(expected, rel=1e-12)


def test_kappa_by_hand():
    """50 units, 20 both yes, 5 yes-no, 10 no-yes, 15 both no: p_o 0.7, p_e 0.5, kappa 0.4."""
    first = np.repeat([[1, 0], [1, 0], [0, 1], [0, 1]], [20, 5, 10, 15], axis=0).astype(float)
    second = np.repeat([[1, 0], [0, 1], [1, 0], [0, 1]], [20, 5, 10, 15], axis=0).astype(float)
    assert cohen_kappa(first, second, np.ones(50)) == pytest.approx(0.4, rel=1e-12)
    assert pairwise_agreement(first + second, np.ones(50)) == pytest.approx(0.7, rel=1e-12)
    # Scott's pi has the pooled shares in p_e: 55/100 yes, p_e 0.505; alpha corrects it for n = 100:
    # 1 - 99 * (2 * 15) / (2 * 55 * 45).
    assert krippendorff_alpha(first + second, np.ones(50)) == pytest.approx(
        1 - 99 * 30 / (2 * 55 * 45), rel=1e-12
    )


def test_three_raters_by_hand():
    """Units (3, 0), (2, 1), (1, 0): agreement (1 + 1/3) / 2, the third unit has no pair."""
    counts = np.array([[3.0, 0], [2, 1], [1, 0]])
    assert pairwise_agreement(counts, np.ones(3)) == pytest.approx(2 / 3, rel=1e-12)
    # n = 6, n_c = (5, 1); unlike pairs: unit 2 has 2 * 2 * 1 / 2 = 2; 2 * 5 * 1 by chance.
    assert krippendorff_alpha(counts, np.ones(3)) == pytest.approx(1 - 5 * 2 / 10, abs=1e-12)


def test_perfect_opposite_and_undefined():
    same = np.array([[2.0, 0], [0, 2]])
    assert krippendorff_alpha(same, np.ones(2)) == pytest.approx(1)
    one_hot = np.eye(2)
    assert cohen_kappa(one_hot, one_hot, np.ones(2)) == pytest.approx(1)
    assert cohen_kappa(one_hot, one_hot[::-1], np.ones(2)) == pytest.approx(-1)
    alike = np.array([[2.0, 0], [2, 0]])
    assert np.isnan(krippendorff_alpha(alike, np.ones(2)))
    assert np.isnan(cohen_kappa(alike / 2, alike / 2, np.ones(2)))
    for statistic in (krippendorff_alpha, pairwise_agreement):
        assert np.isnan(statistic(np.array([[1.0, 0]]), np.ones(1)))
        assert np.isnan(statistic(same, np.zeros(2)))
    assert np.isnan(cohen_kappa(one_hot, one_hot, np.zeros(2)))


def test_random_answers_have_no_agreement_beyond_chance():
    rng = np.random.default_rng(0)
    answers = np.eye(3)[rng.choice(3, p=[0.6, 0.3, 0.1], size=(20000, 2))]
    first, second = answers[:, 0], answers[:, 1]
    assert abs(cohen_kappa(first, second, np.ones(20000))) < 0.03
    assert abs(krippendorff_alpha(first + second, np.ones(20000))) < 0.03
