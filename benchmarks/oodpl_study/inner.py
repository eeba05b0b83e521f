"""What inner steps do for A_PL at best: weights made of the gold reward, on the watched domains."""

import math
from collections.abc import Sequence

import torch

from shiftrm.core.hypergradient import preference_margins
from shiftrm.core.inner_curvature import InnerLoss
from shiftrm.core.losses import reward_weights
from shiftrm.files import Row
from shiftrm.oodpl.batches import EncodedDomain, outer_batch
from shiftrm.oodpl.fine_tuning import support_rewards

from .data import Start, gold_rewards
from .guiding import standardised
from .learning import Meta, task_plan

STEPS = (1, 4, 16)
RATES = (0.1, 0.3, 1.0)
GOLD_BETA = 0.5
"""Temperature of the gold weights, in standard deviations of gold over the domain's rows."""


def inner_rows(start: Start, *, steps: Sequence[int], rates: Sequence[float]) -> list[Row]:
    """Return A_PL and loss of the adapted policy for every D and rate, gold and equal weights.

    Means over the watched domains; `support` rows as the default of `Meta`.
    """
    rows = []
    for D in steps:
        for rate in rates:
            meta = Meta(inner_steps=D, inner_rate=rate)
            found = [_adapted(start, d, meta) for d in start.of(start.world.watched)]
            names = found[0]
            means = {n: _finite(sum(f[n] for f in found) / len(found)) for n in names}
            rows.append({"seed": start.seed, "inner_steps": D, "inner_rate": rate, **means})
    return rows


def _finite(value: float) -> float | None:
    """Return the value in few digits; None if the inner loop diverged."""
    return round(value, 4) if math.isfinite(value) else None


def _adapted(start: Start, domain: EncodedDomain, meta: Meta) -> dict[str, float]:
    support = start.domains[domain.name].support
    gold = support_rewards(standardised(gold_rewards(start), support), support)
    batches, places = task_plan(start, meta).support_of(domain, role="inner")
    pairs = outer_batch(domain.eval_pairs, policy_pad_id=start.pad)
    found = _measured("reference", preference_margins(start.reference, pairs, reduction="mean"))
    for name in ("gold", "equal"):
        policy = start.policy()
        inner = InnerLoss.of(policy, reduction="mean")
        for batch, rows in zip(batches, places, strict=True):
            given = torch.tensor([gold[row] for _, row in rows])
            weights = reward_weights(given, beta=GOLD_BETA, normalize=True)
            if name == "equal":
                weights = torch.ones_like(weights)
            _, gradient = inner.gradient(batch.policy, weights)
            with torch.no_grad():
                torch._foreach_add_(list(inner.parameters), gradient, alpha=-meta.inner_rate)
        found |= _measured(name, preference_margins(policy, pairs, reduction="mean"))
    return found


def _measured(name: str, margins: torch.Tensor) -> dict[str, float]:
    loss = float(torch.nn.functional.softplus(-margins).mean())
    return {f"{name}_accuracy": float((margins > 0).float().mean()), f"{name}_loss": loss}
