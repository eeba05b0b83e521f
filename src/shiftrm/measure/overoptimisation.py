"""Over-optimisation: proxy and gold along growing KL, such as in a PPO run or best-of-n.

After Gao, Schulman and Hilton 2023, "Scaling laws for reward model overoptimization"
(arXiv 2210.10760).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shiftrm.core.discrimination import Floats, Numbers
from shiftrm.files import is_number

Form = Literal["bon", "rl"]


@dataclass(frozen=True)
class Path:
    """Finite points in the order of training, in columns of equal length.

    Attributes:
        kl: to the first policy, in nats.
        proxy, gold: mean scores.
    """

    kl: tuple[float, ...]
    proxy: tuple[float, ...]
    gold: tuple[float, ...]


@dataclass(frozen=True)
class Overoptimisation:
    """Over-optimisation along a path.

    Attributes:
        points: number of points.
        peak_gold, peak_kl: highest gold, and the KL there.
        final_gold, final_kl, final_proxy: at the end of the path.
        drop: peak_gold - final_gold, at least 0.
        proxy_rise: proxy at the end minus proxy at the peak of gold.
        gold_at: gold at fixed KL; None if the path never reaches it.
    """

    points: int
    peak_gold: float
    peak_kl: float
    final_gold: float
    final_kl: float
    final_proxy: float
    drop: float
    proxy_rise: float
    gold_at: dict[float, float | None]


@dataclass(frozen=True)
class Fit:
    """A functional form of gold over d = sqrt(KL), by least squares.

    Attributes:
        form: "bon": R(d) = d (alpha - beta d); "rl": R(d) = d (alpha - beta log d).
        alpha, beta: its coefficients.
        r_squared: share of the variance of R that it explains.
        peak_kl: KL at the peak; None if there is no peak (beta <= 0) or it overflows.
    """

    form: Form
    alpha: float
    beta: float
    r_squared: float
    peak_kl: float | None


def path_from_rows(
    rows: Iterable[Mapping[str, object]],
    *,
    kl: str = "kl",
    proxy: str = "proxy_mean",
    gold: str = "gold_mean",
) -> Path:
    """Return the path from log rows such as those of `training_log.jsonl`, in their order.

    Rows that lack one of the three numbers, or hold one that is not finite, are left out.
    """
    kept = []
    for row in rows:
        values = [row.get(name) for name in (kl, proxy, gold)]
        if all(map(is_number, values)):
            kept.append([float(v) for v in values])  # type: ignore[arg-type]
    columns = zip(*kept, strict=True) if kept else ((), (), ())
    return Path(*(tuple(column) for column in columns))


def smoothed(path: Path, window: int) -> Path:
    """Return running means over `window` points, so that the peak is not a lucky batch.

    Only whole windows are kept: the path gets window - 1 points shorter.

    Raises:
        ValueError: window < 1, or more than the path has points.
    """
    if not 1 <= window <= len(path.kl):
        raise ValueError(f"window is {window}; it must be from 1 to {len(path.kl)}, the points")
    kernel = np.full(window, 1 / window)
    return Path(
        *(
            tuple(np.convolve(values, kernel, mode="valid").tolist())
            for values in (path.kl, path.proxy, path.gold)
        )
    )


def overoptimisation(path: Path, *, at_kl: Sequence[float] = ()) -> Overoptimisation:
    """Compute peak, end and drop of gold along a path, and gold at fixed KL.

    Args:
        path: at least one point. The peak of noisy points is biased upwards: see `smoothed`.
        at_kl: KLs at which to interpolate gold linearly, where the path first reaches them (in PPO,
            KL may fall between steps).

    Raises:
        ValueError: no points, or columns of different length.
    """
    if not path.kl or not len(path.kl) == len(path.proxy) == len(path.gold):
        raise ValueError(
            f"{len(path.kl)} KLs, {len(path.proxy)} proxies and {len(path.gold)} golds; expected "
            "equal numbers, at least one of each"
        )
    peak = int(np.argmax(path.gold))
    return Overoptimisation(
        points=len(path.kl),
        peak_gold=path.gold[peak],
        peak_kl=path.kl[peak],
        final_gold=path.gold[-1],
        final_kl=path.kl[-1],
        final_proxy=path.proxy[-1],
        drop=path.gold[peak] - path.gold[-1],
        proxy_rise=path.proxy[-1] - path.proxy[peak],
        gold_at={kl: value_at(path.kl, path.gold, kl) for kl in at_kl},
    )


def value_at(kl: Sequence[float], values: Sequence[float], where: float) -> float | None:
    """Return the value where the path first reaches a KL; None if it never does."""
    if kl and kl[0] == where:
        return values[0]
    for i in range(1, len(kl)):
        before, after = kl[i - 1], kl[i]
        if min(before, after) <= where <= max(before, after):
            share = 1.0 if before == after else (where - before) / (after - before)
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def fit(kl: Numbers, gold: Numbers, *, form: Form) -> Fit | None:
    """Fit a form of Gao et al. (their Eq. 1), linear in alpha and beta, by least squares.

    Args:
        kl: in nats, at least 0.
        gold: relative to the policy at KL 0, whose R is 0 by definition: subtract its mean first.
        form: "bon" or "rl".

    Returns:
        None where fewer than three points have KL > 0, or all of them the same.

    Raises:
        ValueError: lists of different length, or a negative KL.
    """
    distance = np.asarray(kl, dtype=np.float64)
    reward = np.asarray(gold, dtype=np.float64)
    if distance.shape != reward.shape:
        raise ValueError(f"{distance.size} KLs and {reward.size} golds")
    if (distance < 0).any():
        raise ValueError("a KL is negative; leave such points out (they are estimation noise)")
    kept = distance > 0
    d, reward = np.sqrt(distance[kept]), reward[kept]
    if len(d) < 3 or len(np.unique(d)) < 2:
        return None
    bent = d * d if form == "bon" else d * np.log(d)
    columns: Floats = np.stack([d, -bent], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(columns, reward, rcond=None)
    if rank < 2:
        return None
    alpha, beta = (float(c) for c in solution)
    total = float(((reward - reward.mean()) ** 2).sum())
    residual = float(((reward - columns @ solution) ** 2).sum())
    r_squared = 1.0 - residual / total if total > 0 else float(residual == 0)
    return Fit(form, alpha, beta, r_squared, _peak_kl(alpha, beta, form))


def _peak_kl(alpha: float, beta: float, form: Form) -> float | None:
    if beta <= 0:
        return None
    if form == "bon":
        at = alpha / (2 * beta)  # R' = alpha - 2 beta d
    elif alpha / beta - 1 > 300:
        return None
    else:
        at = math.exp(alpha / beta - 1)  # R' = alpha - beta log d - beta
    return at * at if at > 0 else None
