"""What inner steps can do for A_PL at best: weights made of the gold reward, on source domains.

For each inner learning rate, D and reduction: A_PL and preference loss of the adapted policy on the
evaluation pairs of the last three sources (no held-out domain is read), mean over the three.

    shiftrm run gold_domains --output runs/oodpl/search domains.search=true methods=[reference] \
        domains.betas=[1.0]
    python benchmarks/oodpl_inner_steps.py runs/oodpl/search
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from shiftrm.core.inner_curvature import InnerLoss
from shiftrm.core.losses import reward_weights
from shiftrm.data.domains import Domain, load_split
from shiftrm.models.sampling import load_policy
from shiftrm.oodpl.batches import Encoder, inner_batch
from shiftrm.oodpl.preference import preference_accuracy
from shiftrm.pipeline.domain_section import DomainSection
from shiftrm.world.build_domains import DOMAINS, read_table
from shiftrm.world.domain_gold import gold_of

RATES = {"sum": (0.003, 0.01, 0.03), "mean": (0.1, 0.3, 1.0)}
STEPS = (1, 4)
BETAS = (None, 2.0, 1.0, 0.5)  # None: all weights equal
BATCH = 64


def adapted(
    start: Any, tokenizer: Any, domain: Domain, rewards: list[float], *, rate: float, D: int,
    beta: float | None, reduction: str,
) -> tuple[float, float]:  # fmt: skip
    """A_PL and loss after D steps."""
    policy = type(start)(start.config).eval()
    policy.load_state_dict(start.state_dict())
    support = Encoder(tokenizer).domain(domain, query=False, eval_pairs=False).support
    inner = InnerLoss.of(policy, reduction=reduction)
    rng = random.Random(0)
    pad = tokenizer.pad_token_id
    for _ in range(D):
        rows = rng.sample(range(len(support)), BATCH)
        weights = torch.ones(BATCH)
        if beta is not None:
            given = torch.tensor([rewards[i] for i in rows])
            weights = reward_weights(given, beta=beta, normalize=True)
        batch = inner_batch([support[i] for i in rows], policy_pad_id=pad, reward_pad_id=pad)
        _, gradient = inner.gradient(batch.policy, weights)
        with torch.no_grad():
            torch._foreach_add_(inner.parameters, gradient, alpha=-rate)
    found = preference_accuracy(policy, tokenizer, domain.eval_pairs, reduction=reduction)
    return found.accuracy, found.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, with data/ and sft/")
    args = parser.parse_args()
    files = args.run / "data" / "world"
    table = read_table(files)
    names = DomainSection(search=True).targets
    domains = [d for d in load_split(files / DOMAINS).source if d.name in names]
    policy, tokenizer = load_policy(args.run / "sft" / "model")
    gold = {
        d.name: [
            gold_of(d.name, table)(r["prompt"], r["response"], finished=r["finished"])
            for r in d.support
        ]
        for d in domains
    }
    print(f"mean over {', '.join(names)}: A_PL, loss")
    for reduction, rates in RATES.items():
        found = [
            preference_accuracy(policy, tokenizer, d.eval_pairs, reduction=reduction)
            for d in domains
        ]
        print(f"{reduction}, reference: {_mean(f.accuracy for f in found)}, "
              f"{_mean(f.loss for f in found)}")  # fmt: skip
        for rate in rates:
            for D in STEPS:
                for beta in BETAS:
                    found = [
                        adapted(policy, tokenizer, d, gold[d.name], rate=rate, D=D, beta=beta,
                                reduction=reduction)
                        for d in domains
                    ]  # fmt: skip
                    what = "equal weights" if beta is None else f"gold, beta {beta:g}"
                    accuracy, loss = (_mean(column) for column in zip(*found, strict=True))
                    print(f"{reduction}, rate {rate:g}, D {D}, {what}: {accuracy}, {loss}")


def _mean(values: Any) -> str:
    numbers = list(values)
    return f"{sum(numbers) / len(numbers):.3f}"


if __name__ == "__main__":
    main()
