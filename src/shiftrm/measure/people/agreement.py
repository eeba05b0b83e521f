"""How far raters agree, raw and beyond chance, from counts of answers.

Categories have no order here: win against tie counts as much as win against lose.
"""

import numpy as np

from shiftrm.core.discrimination import Floats


def pairwise_agreement(counts: Floats, weights: Floats) -> float:
    """The chance that two different raters of a unit gave the same answer, averaged over units.

    Args:
        counts: answers of each category, [units, categories]; units with fewer than two answers
            are left out.
        weights: how often each unit counts, [units].

    Returns:
        NaN if no unit has two answers.
    """
    answers = counts.sum(axis=1)
    several = answers >= 2
    n, w = answers[several], weights[several]
    if w.sum() == 0:
        return float("nan")
    same = (counts[several] * (counts[several] - 1)).sum(axis=1) / (n * (n - 1))
    return float((same * w).sum() / w.sum())


def krippendorff_alpha(counts: Floats, weights: Floats) -> float:
    """Krippendorff's alpha for nominal data: any number of raters, answers may be missing.

    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C.

    Args:
        counts, weights: as in `pairwise_agreement`.

    Returns:
        1 for perfect agreement, 0 for chance, below 0 for less than that; NaN where it is not
        defined: no unit with two answers, or all answers are the same.
    """
    answers = counts.sum(axis=1)
    several = (answers >= 2) & (weights > 0)
    if not several.any():
        return float("nan")
    c, n_u, w = counts[several], answers[several], weights[several]
    # o_cc' = sum_u n_uc (n_uc' - [c = c']) / (n_u - 1), here its diagonal and its row sums n_c.
    matched = (c * (c - 1) * (w / (n_u - 1))[:, None]).sum(axis=0)
    n_c = (c * w[:, None]).sum(axis=0)
    n = n_c.sum()
    expected = n * (n - 1) - (n_c * (n_c - 1)).sum()
    if expected <= 0:
        return float("nan")
    # alpha = 1 - D_o / D_e = 1 - (n - 1) sum_{c != c'} o_cc' / sum_{c != c'} n_c n_c'
    return float(1 - (n - 1) * (n - matched.sum()) / expected)


def cohen_kappa(first: Floats, second: Floats, weights: Floats) -> float:
    """Cohen's kappa of two raters who answered the same units.

    Source: Cohen, "A coefficient of agreement for nominal scales" (1960).

    Args:
        first, second: one-hot answers, [units, categories].
        weights: how often each unit counts, [units].

    Returns:
        (p_o - p_e) / (1 - p_e); NaN without units, or if both gave one and the same answer always.
    """
    total = weights.sum()
    if total == 0:
        return float("nan")
    p = (weights / total) @ np.concatenate([first, second], axis=1)
    first_shares, second_shares = p[: first.shape[1]], p[first.shape[1] :]
    observed = float((first * second).sum(axis=1) @ weights / total)
    expected = float(first_shares @ second_shares)
    if expected >= 1:
        return float("nan")
    return (observed - expected) / (1 - expected)
