"""Whether the gold world's domains are what the bilevel method is for; writes docs/domains.md.

Two kinds of reward model, each pooled over the sources' pairs or trained on a held-out domain's
own, judged on the domain's evaluation pairs:

- a linear one on the features of the gold reward (Newton's method): what can be known at best;
- a tiny transformer on text, started from a language model of all domains' drafts.

    python benchmarks/domain_world.py --seeds 0 1 2 --docs docs/domains.md
    python benchmarks/domain_world.py --seeds 0 --transformer --docs docs/domains.md

The first takes seconds and writes the linear tables, the second two minutes of one core a seed.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shiftrm.core.losses import bradley_terry_loss
from shiftrm.data.domains import Domain
from shiftrm.files import Row, atomic_write_text
from shiftrm.models.rendering import encode
from shiftrm.world.build_domains import DomainWorldConfig, build_domain, sft_rows
from shiftrm.world.domain_gold import FEATURES, HELD_OUT, SOURCES, TABLE, flipped, gold, measure
from shiftrm.world.language import TOPICS, build_tokenizer

MARKS = ("<!-- {}:begin -->", "<!-- {}:end -->")


# -- linear ----------------------------------------------------------------------------------


def differences(domain: str, rows: Sequence[Row]) -> np.ndarray:
    """Gold features of chosen minus those of rejected: [pairs, features]."""

    def counts(row: Row, side: str) -> list[float]:
        finished = row[f"{side}_finished"]
        return list(measure(domain, row["prompt"], row[side], finished=finished).values())

    return np.array([np.subtract(counts(r, "chosen"), counts(r, "rejected")) for r in rows])


def logistic(x: np.ndarray, *, decay: float = 1e-3) -> np.ndarray:
    """Bradley-Terry weights by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = decay * weights - x.T @ (1 - p) / len(p)
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(p)
        weights -= np.linalg.solve(curvature + decay * np.eye(len(weights)), gradient)
    return weights


def linear_accuracies(domains: dict[str, Domain]) -> dict[str, dict[str, float]]:
    pooled = logistic(np.concatenate([differences(n, domains[n].query) for n in SOURCES]))
    result = {}
    for name in HELD_OUT:
        test = differences(name, domains[name].eval_pairs)
        own = logistic(differences(name, domains[name].query))
        weights = np.array(list(TABLE[name].values()))
        result[name] = {
            "pooled": float((test @ pooled > 0).mean()),
            "its own": float((test @ own > 0).mean()),
            "gold itself": float((test @ weights > 0).mean()),
        }
    return result


# -- transformer -----------------------------------------------------------------------------


def batch(tokenizer: Any, texts: Sequence[tuple[str, str, bool]]) -> dict[str, torch.Tensor]:
    """Prompt, response and whether it ended, padded on the right."""
    ids = [encode(tokenizer, prompt, text, finished=end) for prompt, text, end in texts]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i in ids]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids]),
    }


def language_model(config: DomainWorldConfig, tokenizer: Any, *, epochs: int = 3) -> Any:
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    texts = [(row["prompt"], row["completion"], True) for row in sft_rows(config)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for chosen in batches(len(texts), 64, epochs, config.seed):
        inputs = batch(tokenizer, [texts[i] for i in chosen])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    return model


def batches(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    orders = [rng.sample(range(count), count) for _ in range(epochs)]
    return [order[at : at + size] for order in orders for at in range(0, count - size + 1, size)]


class RewardModel(torch.nn.Module):
    """The language model's body and a score at the last token."""

    def __init__(self, model: Any, hidden: int) -> None:
        super().__init__()
        self.body = model.model
        self.score = torch.nn.Linear(hidden, 1, bias=False)
        torch.nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.score(states[torch.arange(len(last)), last]).squeeze(1)


def sides(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """All chosen, then all rejected."""
    return [(r["prompt"], r[s], r[f"{s}_finished"]) for s in ("chosen", "rejected") for r in rows]


def transformer_accuracy(
    base: Any, tokenizer: Any, pairs: Sequence[Row], tests: dict[str, Sequence[Row]], seed: int
) -> dict[str, float]:
    """Train on pairs for 600 steps of 32; accuracy on each set of test pairs."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict())
    reward = RewardModel(model, base.config.hidden_size)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=5e-4, weight_decay=0.01)
    epochs = max(1, 600 * 32 // len(pairs))
    for chosen in batches(len(pairs), 32, epochs, seed):
        scores = reward(**batch(tokenizer, sides([pairs[i] for i in chosen])))
        optimizer.zero_grad()
        bradley_terry_loss(*scores.chunk(2)).mean().backward()
        optimizer.step()
    result = {}
    with torch.no_grad():
        for name, rows in tests.items():
            better, worse = reward(**batch(tokenizer, sides(rows))).chunk(2)
            result[name] = (better > worse).float().mean().item()
    return result


def transformer_accuracies(
    config: DomainWorldConfig, domains: dict[str, Domain]
) -> tuple[dict[str, dict[str, float]], float]:
    """Accuracy on the held-out domains, pooled and own; and of the pooled one on the sources."""
    tokenizer = build_tokenizer()
    base = language_model(config, tokenizer)
    pairs = [row for name in SOURCES for row in domains[name].query]
    tests = {name: domains[name].eval_pairs for name in TOPICS}
    pooled = transformer_accuracy(base, tokenizer, pairs, tests, config.seed)
    result = {}
    for name in HELD_OUT:
        own = transformer_accuracy(
            base, tokenizer, domains[name].query, {name: tests[name]}, config.seed
        )
        result[name] = {"pooled": pooled[name], "its own": own[name]}
    return result, statistics.mean(pooled[name] for name in SOURCES)


# -- tables ----------------------------------------------------------------------------------


def weights_table() -> str:
    head = "| feature | base | counts | " + " | ".join(HELD_OUT) + " | flipped in sources |"
    lines = [head, "| --- |" + " --- |" * (3 + len(HELD_OUT))]
    for f in FEATURES:
        cells = [f"{TABLE[name][f.name]:+.2f}" for name in HELD_OUT]
        cells = [
            f"**{c}**" if f.name in flipped(TABLE[n]) else c
            for n, c in zip(HELD_OUT, cells, strict=True)
        ]
        sources = [name for name in SOURCES if f.name in flipped(TABLE[name])]
        lines.append(
            f"| `{f.name}` | {f.weight:+g} | {f.meaning} | {' | '.join(cells)} | "
            f"{', '.join(sources) or '-'} |"
        )
    return "\n".join(lines)


def accuracy_table(seeds: dict[int, dict[str, dict[str, float]]]) -> str:
    columns = list(next(iter(seeds.values()))[HELD_OUT[0]])
    lines = [
        "| domain | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in HELD_OUT:
        cells = [" ".join(f"{s[name][c]:.3f}" for s in seeds.values()) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = [statistics.mean(s[n][c] for s in seeds.values() for n in HELD_OUT) for c in columns]
    lines.append("| mean | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    return "\n".join(lines)


def quality_table(domains: dict[str, Domain]) -> str:
    lines = ["| domain | mean | lowest tenth | highest tenth |", "| --- | --- | --- | --- |"]
    for name in HELD_OUT:
        kept = [
            gold(name, row["prompt"], row["response"], finished=row["finished"])
            for row in domains[name].support
        ]
        low, high = np.quantile(kept, [0.1, 0.9])
        lines.append(f"| {name} | {statistics.mean(kept):.2f} | {low:.2f} | {high:.2f} |")
    return "\n".join(lines)


def put(text: str, mark: str, content: str) -> str:
    begin, end = (m.format(mark) for m in MARKS)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--docs", type=Path, help="the page to write the tables into")
    parser.add_argument("--transformer", action="store_true", help="train the transformers")
    options = parser.parse_args()
    linear: dict[int, dict[str, dict[str, float]]] = {}
    transformer: dict[int, dict[str, dict[str, float]]] = {}
    on_sources = []
    for seed in options.seeds:
        config = DomainWorldConfig(seed=seed)
        domains = {name: build_domain(name, config) for name in TOPICS}
        linear[seed] = linear_accuracies(domains)
        if options.transformer:
            transformer[seed], sources = transformer_accuracies(config, domains)
            on_sources.append(f"{sources:.3f}")
    if options.transformer:
        said = "The pooled one's accuracy on the sources' own evaluation pairs"
        tables = {
            "transformer": f"{accuracy_table(transformer)}\n\n{said}: {' '.join(on_sources)}."
        }
    else:
        first = DomainWorldConfig(seed=options.seeds[0])
        tables = {
            "weights": weights_table(),
            "linear": accuracy_table(linear),
            "quality": quality_table({name: build_domain(name, first) for name in HELD_OUT}),
        }
    print(*tables.values(), sep="\n\n")
    if options.docs:
        text = options.docs.read_text(encoding="utf-8")
        for mark, content in tables.items():
            text = put(text, mark, content)
        atomic_write_text(options.docs, text)


if __name__ == "__main__":
    main()
