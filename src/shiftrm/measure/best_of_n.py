"""Best-of-n: proxy and gold of the sample that the proxy chooses out of n.

With N >= n samples per prompt, the expectation over all subsets of size n has a closed form:
sorted by proxy, sample i is the best of a random subset with probability
C(i - 1, n - 1) / C(N, n). This is the unbiased estimator of Nakano et al. 2021 (WebGPT, arXiv
2112.09332, appendix I), also used by Gao et al. 2023 (arXiv 2210.10760).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from shiftrm.core.discrimination import Floats, Numbers
from shiftrm.core.intervals import RESAMPLES, Measured, measured_mean
from shiftrm.measure.diagnosis.thresholds import FEW_PROMPTS

_CHUNK = 2**20  # samples sorted at a time, in about 50 MB


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n for one n, means over prompts with intervals.

    Attributes:
        n: number of samples to choose from.
        kl: analytic KL of the best-of-n policy to the one sampled, in nats.
        proxy, gold: expected scores of the sample with the highest proxy.
    """

    n: int
    kl: float
    proxy: Measured
    gold: Measured


@dataclass(frozen=True)
class BestOfNCurve:
    """Best-of-n for several n.

    Attributes:
        prompts: number of prompts.
        samples: minimum number of samples of a prompt.
        points: by n, ascending.
        peak: the n with the highest mean gold.
        drop: gold at the peak minus gold at the largest n, with paired resampling of prompts. It is
            slightly biased upwards, since the peak is chosen on the same samples.
        proxy_rise: proxy at the largest n minus proxy at the peak.
    """

    prompts: int
    samples: int
    points: tuple[BestOfN, ...]
    peak: int
    drop: Measured
    proxy_rise: Measured


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n to the sampled policy in nats: log n - (n - 1) / n.

    It is exact without ties, otherwise an upper bound (Beirami et al. 2024, arXiv 2401.01879).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_weights(samples: int, n: int) -> Floats:
    """Return the probability that the sample of rank i (lowest first) is the best of n: (samples,).

    C(i - 1, n - 1) / C(N, n), in log space, since C(16384, 1000) overflows. They sum to 1.

    Raises:
        ValueError: n < 1 or n > samples.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n is {n}; it must be from 1 to the number of samples, {samples}")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1)))])

    below = np.arange(n - 1, samples)  # i - 1 for ranks that can be the best of n
    log_choose = log_factorial[below] - log_factorial[n - 1] - log_factorial[below - (n - 1)]
    log_total = log_factorial[samples] - log_factorial[n] - log_factorial[samples - n]
    weights = np.zeros(samples)
    weights[n - 1 :] = np.exp(log_choose - log_total)  # C(i - 1, n - 1) / C(N, n)
    return weights / weights.sum()  # corrects rounding of about 1e-12


def best_of_n(proxy: Floats, gold: Floats, *, n: Sequence[int]) -> tuple[Floats, Floats]:
    """Compute expected proxy and gold of the best of n by proxy, per prompt.

    Samples with equal proxy share their probability equally.

    Args:
        proxy, gold: scores, of shape (prompts, samples) or (samples,).
        n: numbers of samples to choose from; each from 1 to samples.

    Returns:
        Expected proxy and expected gold, of shape (prompts, len(n)).

    Raises:
        ValueError: shapes that differ, no samples, a score that is not finite, or an n out of
            range.
    """
    proxy, gold = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (proxy, gold))
    if proxy.shape != gold.shape or proxy.ndim != 2 or not proxy.size:
        raise ValueError(f"proxy has shape {proxy.shape} and gold {gold.shape}; expected one shape")
    prompts, samples = proxy.shape
    weights = np.stack([best_of_n_weights(samples, each) for each in n], axis=1)
    found = np.empty((2, prompts, len(n)))
    rows = max(1, _CHUNK // samples)
    for start in range(0, prompts, rows):
        part = slice(start, start + rows)
        if not (np.isfinite(proxy[part]).all() and np.isfinite(gold[part]).all()):
            raise ValueError("a score is not finite")
        order = np.argsort(proxy[part], axis=1, kind="stable")
        ranked = np.take_along_axis(proxy[part], order, axis=1)
        golds = _mean_over_ties(ranked, np.take_along_axis(gold[part], order, axis=1))
        found[0, part], found[1, part] = ranked @ weights, golds @ weights
    return found[0], found[1]


def _mean_over_ties(ranked: Floats, values: Floats) -> Floats:
    """Replace each value by the mean over the samples of its row with the same proxy."""
    if not (ranked[:, 1:] == ranked[:, :-1]).any():
        return values
    new = np.ones(ranked.shape, dtype=bool)  # a row's first entry starts a group
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = np.cumsum(new.ravel()) - 1
    means = np.bincount(group, values.ravel()) / np.bincount(group)
    return np.asarray(means[group]).reshape(values.shape)


def powers_of_two(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of samples, and that number itself."""
    found = [2**k for k in range(samples.bit_length()) if 2**k <= samples]
    return found if found[-1] == samples else [*found, samples]


def best_of_n_curve(
    proxies: Sequence[Numbers],
    golds: Sequence[Numbers],
    *,
    n: Sequence[int] | None = None,
    prompts: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> BestOfNCurve:
    """Compute best-of-n for several n, means over prompts with bootstrap intervals.

    Args:
        proxies, golds: one sequence of scores per prompt, of any length.
        n: by default `powers_of_two` of the minimum number of samples of a prompt.
        prompts: identifies the prompt of each row; by default, every row is one.
        seed, resamples: parameters of the bootstrap.

    Raises:
        ValueError: no prompts, and as `best_of_n`.
    """
    if not len(proxies) or len(proxies) != len(golds):
        raise ValueError(f"{len(proxies)} prompts with proxy scores and {len(golds)} with gold")
    sizes = np.array([len(scores) for scores in proxies])
    fewest = int(sizes.min())
    if not fewest:
        raise ValueError("a prompt has no samples")
    ns = sorted(set(powers_of_two(fewest) if n is None else n))
    if not ns or ns[0] < 1 or ns[-1] > fewest:
        raise ValueError(f"n is {ns}; each must be from 1 to {fewest}, the fewest samples")
    values = np.empty((2, len(sizes), len(ns)))
    for size in np.unique(sizes):  # chunks of prompts with the same number of samples
        rows = np.flatnonzero(sizes == size)
        step = max(1, _CHUNK // int(size))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            values[:, chunk] = best_of_n(
                np.array([proxies[i] for i in chunk]), np.array([golds[i] for i in chunk]), n=ns
            )
    keys = list(range(len(sizes))) if prompts is None else list(prompts)

    def mean(per_prompt: Floats) -> Measured:
        return measured_mean(per_prompt, keys, seed=seed, resamples=resamples)

    proxy, gold = values
    points = tuple(
        BestOfN(each, best_of_n_kl(each), mean(proxy[:, k]), mean(gold[:, k]))
        for k, each in enumerate(ns)
    )
    peak = max(range(len(ns)), key=lambda k: points[k].gold.value)
    return BestOfNCurve(
        prompts=len(set(keys)),
        samples=fewest,
        points=points,
        peak=ns[peak],
        drop=mean(gold[:, peak] - gold[:, -1]),
        proxy_rise=mean(proxy[:, -1] - proxy[:, peak]),
    )


def describe(curve: BestOfNCurve) -> str:
    """Describe where gold peaks, and whether more samples hurt."""
    first, last = curve.points[0], curve.points[-1]
    peak = next(point for point in curve.points if point.n == curve.peak)
    if len(curve.points) == 1:
        return f"Only n = {first.n} was measured, so more samples cannot be judged."
    if peak.n == last.n:
        return (
            f"Gold is highest at the largest n, {last.n} (KL {last.kl:.2f}): {last.gold}; no "
            "over-optimisation up to there."
        )
    where = f"Gold peaks at n = {peak.n} (KL {peak.kl:.2f}) with {peak.gold}"
    there = f"at n = {last.n} (KL {last.kl:.2f}) it is {last.gold}"
    drop = curve.drop
    if drop.low is None or drop.high is None:
        return f"{where}; {there}. With one prompt there is no interval, so this may be chance."
    change = f"{drop.value:.2f} lower (95 % interval {drop.low:.2f} to {drop.high:.2f})"
    if drop.low <= 0:
        return f"{where}; {there}, {change}: level within the interval, not clearly a decline."
    rise = curve.proxy_rise
    meanwhile = (
        f" The proxy rises by {rise.value:.2f} in the meantime: over-optimised."
        if rise.value > 0
        else ""
    )
    if curve.prompts < FEW_PROMPTS:
        meanwhile += f" But {curve.prompts} prompts are few: below {FEW_PROMPTS}, believe little."
    if peak.n == first.n:
        where = f"Gold is highest without any choice, at n = {first.n}, with {first.gold}"
    return f"{where}; {there}, {change}.{meanwhile}"
