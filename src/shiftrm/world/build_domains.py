"""Write the gold world's domains as the files of an ordinary run over many domains.

A domain's files are a pure function of (seed, domain) and the sizes. `gold` (see `domain_gold.py`)
labels the pairs and guides the authors, and is not in any file.

A *draft* is a response with its own random mixture of word classes: some complain, some hedge, some
gush, some ramble on until they are cut off. Pairs compare two drafts of a prompt. Fine-tuning data
is of mixed quality: its authors write `CANDIDATES` drafts; half of the authors keep the draft the
domain likes best, a quarter the first, a quarter the worst. So the data tells a little about the
domain's taste, and much of it is bad.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from shiftrm.data.domains import Domain, write_domains
from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, write_jsonl
from shiftrm.world.build import (
    BASE_MODEL,
    README,
    SFT,
    WorldConfig,
    label_pairs,
    make_room,
    write_base_model,
)
from shiftrm.world.domain_gold import (
    FEATURES,
    HELD_OUT,
    SOURCES,
    TABLE_SEED,
    Table,
    asked_pairs,
    domain_prompts,
    draw_table,
    flipped,
    gold_of,
)
from shiftrm.world.language import (
    CONTENT,
    FILLERS,
    HEDGES,
    MAX_RESPONSE_TOKENS,
    NEGATIVE,
    PRAISE,
    TOXIC,
)

__all__ = [
    "DOMAINS",
    "WEIGHTS",
    "DomainWorldConfig",
    "build_domain",
    "draft",
    "read_table",
    "sft_rows",
    "split_prompts",
    "write_domain_world",
]

DOMAINS = "domains"
WEIGHTS = "weights.json"

EVAL_WORD_PAIRS = 5
"""Number of a domain's 15 pairs of asked-for words kept for evaluation: 30 prompts."""

CANDIDATES = 4
"""Number of drafts from which an author of fine-tuning data keeps one."""

CUT_OFF = 0.08
"""Share of drafts that reach the length limit without an end."""

RATES = {
    "placed": 0.16,
    "topical": 0.10,
    "asked": 0.10,
    "praise": 0.10,
    "negative": 0.10,
    "off_topic": 0.10,
    "hedge": 0.10,
    "again": 0.08,
    "again_pair": 0.03,
    "toxic": 0.03,
    "filler": 0.25,
}
"""Relative frequency of the classes of a draft's next phrase; each draft scales them randomly."""

SPREAD = 1.0
"""Standard deviation of the logarithm of that scale."""


@dataclass(frozen=True)
class DomainWorldConfig:
    """Everything that determines the files.

    Raises:
        UserError: on construction, if a value has the wrong type or is out of range.
    """

    seed: int = 0
    table_seed: int = TABLE_SEED
    support: int = 512  # fine-tuning rows of a domain
    pairs: int = 512  # preference pairs of a domain
    eval_pairs: int = 256
    sft_examples: int = 16_000  # drafts over all domains, for the reference policy
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if "seed" in field.name else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"domain world configuration: {field.name} is {value!r}; "
                    f"give a whole number of at least {least}"
                )
        self.model()

    def model(self) -> WorldConfig:
        """The model's settings, as a `WorldConfig`."""
        return WorldConfig(
            seed=self.seed,
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.heads,
            intermediate_size=self.intermediate_size,
        )


def write_domain_world(directory: str | Path, config: DomainWorldConfig) -> Path:
    """Write the world and return its folder; the same configuration gives the same files.

    - `base_model/`: tokenizer and an untrained tiny Llama, as in the other world;
    - `sft.jsonl`: `{prompt, completion, domain}`, drafts in all domains, for the reference policy;
    - `domains/`: the layout of `shiftrm.data.domains`, all 16, with `splits.json`;
    - `weights.json`: the features and every domain's weights (no training reads it);
    - `README.txt`: what the folder holds.

    Raises:
        UserError: one of these files already exists.
    """
    directory = Path(directory)
    make_room(directory, (BASE_MODEL, SFT, DOMAINS, WEIGHTS, README))
    write_base_model(directory / BASE_MODEL, config.model())
    write_jsonl(directory / SFT, sft_rows(config))
    table = draw_table(config.table_seed)
    domains = [build_domain(name, config, table) for name in (*SOURCES, *HELD_OUT)]
    write_domains(directory / DOMAINS, domains, source=SOURCES, held_out=HELD_OUT)
    atomic_write_text(directory / WEIGHTS, _weights_json(config.table_seed, table))
    atomic_write_text(directory / README, _readme(config))  # last, since it marks a complete world
    return directory


def build_domain(name: str, config: DomainWorldConfig, table: Table | None = None) -> Domain:
    """Return one domain's data, a pure function of the configuration and the name.

    Every part has its own random stream: changing the size of one does not change the others.

    Args:
        table: the weights, if available; None draws them from `config.table_seed`.

    Raises:
        UserError: no such domain.
    """
    table = draw_table(config.table_seed) if table is None else table
    train, evaluation = split_prompts(name, seed=config.seed)
    return Domain(
        name=name,
        support=tuple(_support(name, train, config, table)),
        query=tuple(_pairs(name, train, config, table, part="pairs", count=config.pairs)),
        eval_pairs=tuple(
            _pairs(name, evaluation, config, table, part="eval_pairs", count=config.eval_pairs)
        ),
        prompts=tuple(evaluation),
    )


def split_prompts(domain: str, *, seed: int) -> tuple[list[str], list[str]]:
    """Split a domain's 90 prompts into 60 for training and 30 for evaluation.

    Prompts that ask for the same two words are on the same side.
    """
    pairs = asked_pairs(domain)
    kept = set(_stream(seed, domain, "prompts").sample(pairs, EVAL_WORD_PAIRS))
    train: list[str] = []
    evaluation: list[str] = []
    for asked, prompt in domain_prompts(domain):
        (evaluation if asked in kept else train).append(prompt)
    return train, evaluation


def draft(rng: random.Random, domain: str, prompt: str, *, cut_off: float = CUT_OFF) -> Row:
    """Draw a response with its own random mixture, independent of the domain's taste.

    Args:
        cut_off: probability that it reaches the length limit without an end.

    Returns:
        `{"response", "finished"}`; the response starts with a space and has 3 to 19 words, or 20
        if it was cut off.
    """
    rates = [rate * rng.lognormvariate(0.0, SPREAD) for rate in RATES.values()]
    asked = [word for word in prompt.split() if word in CONTENT[domain]]
    finished = rng.random() >= cut_off
    longest = MAX_RESPONSE_TOKENS - 1
    length = max(3, min(longest, round(rng.gauss(10, 3)))) if finished else MAX_RESPONSE_TOKENS
    words: list[str] = []
    while len(words) < length:
        (kind,) = rng.choices(list(RATES), rates)
        words += _phrase(rng, kind, domain, asked, words)
    return {"response": " " + " ".join(words[:length]), "finished": finished}


def _phrase(
    rng: random.Random, kind: str, domain: str, asked: Sequence[str], words: Sequence[str]
) -> list[str]:
    """Return the next word or two of a draft."""
    match kind:
        case "placed":
            return [rng.choice(PRAISE), rng.choice(CONTENT[domain])]
        case "off_topic":  # from a source: only held-out domains' files have their words
            elsewhere = rng.choice([other for other in SOURCES if other != domain])
            return [rng.choice(CONTENT[elsewhere])]
        case "again" if words:
            return [rng.choice(words)]
        case "again_pair" if len(words) > 1:
            start = rng.randrange(len(words) - 1)
            return list(words[start : start + 2])
    classes: dict[str, Sequence[str]] = {
        "topical": CONTENT[domain],
        "asked": asked or FILLERS,
        "praise": PRAISE,
        "negative": NEGATIVE,
        "hedge": HEDGES,
        "toxic": TOXIC,
    }
    return [rng.choice(classes.get(kind, FILLERS))]


def _support(name: str, prompts: list[str], config: DomainWorldConfig, table: Table) -> list[Row]:
    rng, reward = _stream(config.seed, name, "support"), gold_of(name, table)
    rows: list[Row] = []
    for _ in range(config.support):
        prompt = rng.choice(prompts)
        drafts = [draft(rng, name, prompt) for _ in range(CANDIDATES)]
        ranked = sorted(drafts, key=lambda d: reward(prompt, d["response"], finished=d["finished"]))
        hand = rng.random()
        kept = ranked[-1] if hand < 0.5 else drafts[0] if hand < 0.75 else ranked[0]
        rows.append({"prompt": prompt, **kept})
    return rows


def _pairs(
    name: str,
    prompts: list[str],
    config: DomainWorldConfig,
    table: Table,
    *,
    part: str,
    count: int,
) -> list[Row]:
    rng = _stream(config.seed, name, part)
    asked: list[str] = []
    first: list[Row] = []
    second: list[Row] = []
    while len(asked) < count:
        prompt = rng.choice(prompts)
        a, b = draft(rng, name, prompt), draft(rng, name, prompt)
        if a["response"] != b["response"]:  # equal ones would be omitted below
            asked.append(prompt)
            first.append(a)
            second.append(b)
    return label_pairs(
        asked,
        [a["response"] for a in first],
        [b["response"] for b in second],
        seed=rng.getrandbits(32),
        finished=[(a["finished"], b["finished"]) for a, b in zip(first, second, strict=True)],
        reward=gold_of(name, table),
        domain=name,
    )


def sft_rows(config: DomainWorldConfig) -> list[Row]:
    """Return drafts in all domains for the reference policy: `{prompt, completion, domain}`.

    All are finished, since TRL closes every completion with EOS.
    """
    rng = _stream(config.seed, "all", "sft")
    prompts = {name: split_prompts(name, seed=config.seed)[0] for name in (*SOURCES, *HELD_OUT)}
    rows: list[Row] = []
    for _ in range(config.sft_examples):
        name = rng.choice(list(prompts))
        prompt = rng.choice(prompts[name])
        text = draft(rng, name, prompt, cut_off=0.0)["response"]
        rows.append({"prompt": prompt, "completion": text, "domain": name})
    return rows


def _stream(seed: int, domain: str, part: str) -> random.Random:
    return random.Random(f"domains/{seed}/{domain}/{part}")


def read_table(directory: str | Path) -> Table:
    """Read the weights that a world was written with.

    Raises:
        UserError: the file is missing or not one of ours.
    """
    path = Path(directory) / WEIGHTS
    try:
        domains = json.loads(path.read_text(encoding="utf-8"))["domains"]
        return {name: dict(entry["weights"]) for name, entry in domains.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write the world again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError):
        raise UserError(f"{path}: not a table of domain weights; write the world again") from None


def _weights_json(table_seed: int, table: Table) -> str:
    content = {
        "table_seed": table_seed,
        "features": {
            f.name: {"weight": f.weight, "taste": f.taste, "counts": f.meaning} for f in FEATURES
        },
        "domains": {
            name: {
                "split": "held_out" if name in HELD_OUT else "source",
                "flipped": flipped(weights),
                "weights": weights,
            }
            for name, weights in table.items()
        },
    }
    return json.dumps(content, indent=2) + "\n"


def _readme(config: DomainWorldConfig) -> str:
    settings = "\n".join(f"  {name} = {value}" for name, value in asdict(config).items())
    return f"""\
The gold world's domains, written by shiftrm (shiftrm.world.build_domains.write_domain_world).

{BASE_MODEL + "/":<14}a tiny Llama with random weights and its word-level tokenizer
{SFT:<14}drafts of all domains for the reference policy: prompt, completion, domain (TRL format)
{DOMAINS + "/":<14}a folder per domain: finetune.jsonl, pairs.jsonl, eval_pairs.jsonl, prompts.jsonl
{WEIGHTS:<14}what each domain likes; nothing may train on it

The gold reward is shiftrm.world.domain_gold.gold(domain, prompt, response, finished=...).

Made with:
{settings}
"""
