"""Anytime-valid test that a reward model's accuracy has fallen, by betting against it.

A run is audited in rounds. In each round pairs are drawn from a pool of today's pairs and are
labelled. The evidence (an e-value) may be looked at at any time, and the run stopped: the bound on
false alarms holds at all times together, for any number of rounds and any rule for when to audit.
"""

from collections.abc import Sequence

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.errors import UserError

__all__ = ["FRACTIONS", "accuracy_bound", "e_values", "start_weights"]

FRACTIONS = (0.1, 0.2, 0.35)
"""Stakes that the capital is divided over, as shares of the largest that cannot go bankrupt."""

LARGEST = 600.0
"""Logarithm at which a stake's capital is cut, so that every e-value is a finite number."""


def start_weights(rounds: int, planned: int | None = None) -> Floats:
    """Return the share of capital with which betting begins in each round, [rounds]; sum <= 1.

    Args:
        rounds: audits so far.
        planned: number of audits planned: equal shares of 1 / planned. None: no plan, and
            1 / (j (j + 1)) in round j, which sums to 1 over all rounds.

    Raises:
        UserError: more rounds than planned.
    """
    if planned is None:
        j = np.arange(1, rounds + 1, dtype=np.float64)
        return np.asarray(1 / (j * (j + 1)), dtype=np.float64)
    if rounds > planned:
        raise UserError(f"{rounds} rounds of audits, but {planned} were planned")
    return np.full(rounds, 1 / planned)


def e_values(
    correct_N: Sequence[float] | Floats,
    weights_N: Sequence[float] | Floats,
    rounds_N: Sequence[int],
    *,
    threshold: float,
    largest_N: Sequence[float] | Floats,
    planned: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> Floats:
    """Return the evidence against "accuracy was at least `threshold` in every round so far", [N].

    A false alarm is an e-value of 1 / alpha or more while the hypothesis holds. Its probability
    over the whole run, however often one looks, is at most alpha (Ville's inequality).

    With `x` in [0, 1] (1 where the model orders a pair as its label does, 1/2 for a label that is a
    tie), `w` the weight of a pair (`p/q` for a pair that counts p in the accuracy and is drawn with
    probability q), `eps = 1 - threshold` the share of errors allowed and `w <= w_max`, a bet with
    stake f has the pay-off

        1 + f w ((1 - x) / eps - 1) / w_max    >= 1 - f >= 0.

    Draws must be such that `E[w] = 1` and `E[w (1 - x)]`, given everything before, is the share of
    errors. Then the conditional mean of the pay-off is at most 1 whenever accuracy is at least the
    threshold, and the product over draws is a non-negative supermartingale that begins with 1: a
    betting e-process (Waudby-Smith and Ramdas, arXiv 2010.09686, Section 4), with the importance
    weights of Waudby-Smith et al., arXiv 2210.10768, and, as there, `w` also on the threshold
    (their control variate), so that an error never lowers the evidence. This holds after every
    label if prompts are drawn independently and one pair of each, no pair twice. For prompts drawn
    without replacement from a given pool it holds at the end of each round: the expected product of
    m such pay-offs is at most the pool's mean pay-off to the power m (Maclaurin's inequality). See
    `monitor.audits.draw_audit`. Nothing is assumed about the pairs of a prompt, about how accuracy
    moves, or about how pools, probabilities q and the times of audits follow from the past. An
    average of e-processes with fixed shares is one, too. There are two averages:

    - over the stakes `f`, in place of the paper's predictable plug-in: no tuning, and the order of
      labels within the run does not matter;
    - over the round in which betting begins (`start_weights`; capital waits until then): accuracy
      drifts, and labels from before a fall are evidence for high accuracy. A stake that begins
      late does not carry them, at the price of log(1 / share) more evidence. The better-known
      e-detectors (CUSUM, Shiryaev-Roberts) only bound the time between false alarms, not their
      probability.

    What an alarm says: in at least one audited round accuracy was below the threshold. It does not
    say in which, nor that it still is.

    Args:
        correct_N: in the order of drawing.
        weights_N: 0 or more; all 1 for pairs drawn evenly.
        rounds_N: the round of each draw: whole numbers from 1 that never fall.
        threshold: strictly between 0 and 1.
        largest_N: the largest weight that any pair of the pool could have had at this draw.
        planned: see `start_weights`.
        fractions: stakes, each in (0, 1).

    Raises:
        UserError: a value out of range, or sequences of different lengths.
    """
    correct, weights = np.asarray(correct_N, np.float64), np.asarray(weights_N, np.float64)
    rounds, largest = np.asarray(rounds_N, np.int64), np.asarray(largest_N, np.float64)
    stakes_F = np.asarray(fractions, np.float64)
    _check(correct, weights, rounds, largest, stakes_F, threshold)
    if not len(correct):
        return np.zeros(0)
    gain_N = weights / largest * ((1 - correct) / (1 - threshold) - 1)
    logs_FN = np.log1p(stakes_F[:, None] * gain_N)
    total_FN = np.cumsum(logs_FN, axis=1)
    shares = start_weights(int(rounds[-1]), planned)
    values_N = np.zeros(len(correct))
    for j, share in enumerate(shares, start=1):
        first = int(np.searchsorted(rounds, j))  # the first draw of round j or later
        before_F1 = total_FN[:, first - 1 : first] if first else np.zeros((len(stakes_F), 1))
        capital_N = np.ones(len(correct))
        logs = np.minimum(total_FN[:, first:] - before_F1, LARGEST)
        capital_N[first:] = np.exp(logs).mean(axis=0)
        values_N += share * capital_N
    return values_N + (1 - shares.sum())  # the capital of rounds to come waits


def accuracy_bound(
    correct_N: Sequence[float] | Floats,
    weights_N: Sequence[float] | Floats,
    rounds_N: Sequence[int],
    *,
    alpha: float,
    largest_N: Sequence[float] | Floats,
    planned: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> float:
    """Return b such that accuracy was below b in some round, wrong with probability <= alpha.

    It is the smallest threshold that `e_values` has rejected at some time so far; 1 if it rejects
    none. The pay-offs grow with the threshold, so it is found by bisection (to 1e-6). Arguments as
    there.
    """

    def rejected(threshold: float) -> bool:
        found = e_values(
            correct_N,
            weights_N,
            rounds_N,
            threshold=threshold,
            largest_N=largest_N,
            planned=planned,
            fractions=fractions,
        )
        return bool(len(found)) and float(found.max()) >= 1 / alpha

    low, high = 0.0, 1.0
    if not rejected(1 - 1e-6):
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _check(
    correct: Floats,
    weights: Floats,
    rounds: np.ndarray,
    largest: Floats,
    stakes: Floats,
    threshold: float,
) -> None:
    if not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold}; it must lie strictly between 0 and 1")
    if not len(correct) == len(weights) == len(rounds) == len(largest):
        raise UserError("audits: values, weights, rounds and largest weights differ in number")
    if not ((correct >= 0) & (correct <= 1)).all():
        raise UserError("audits: whether a pair is right must be a number from 0 to 1")
    if (
        not ((weights >= 0) & (weights <= largest) & (largest < np.inf)).all()
        or (largest <= 0).any()
    ):
        raise UserError("audits: a weight must lie between 0 and the largest of its pool")
    if len(rounds) and (rounds[0] < 1 or (np.diff(rounds) < 0).any()):
        raise UserError("audits: rounds count from 1 and never fall")
    if not len(stakes) or not ((stakes > 0) & (stakes < 1)).all():
        raise UserError("audits: every stake must lie strictly between 0 and 1")
