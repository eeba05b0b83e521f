"""What all arms of a seed share: the world's rows as tokens, and the reference policy."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plain_training import Schedule, train
from shiftrm.data.domains import Domain
from shiftrm.files import Row, atomic_write_text
from shiftrm.models.likelihoods import Tokens
from shiftrm.models.rewards import pad_right, sequence_rewards
from shiftrm.oodpl.batches import EncodedDomain, Example, Pair
from shiftrm.world.build import WorldConfig, base_model_config
from shiftrm.world.build_domains import DomainWorldConfig
from shiftrm.world.domain_gold import HELD_OUT, SOURCES

from .worlds import WORLDS, World

SFT = Schedule(steps=500, rate=2e-3, warmup=20)
SFT_BATCH = 64
MODEL, DONE = "model.pt", "start.json"


@dataclass(frozen=True)
class Start:
    """The start of a seed.

    Attributes:
        encoded: all domains as tokens, by name.
        reference: the policy that everything starts from; do not change it.
    """

    world: World
    seed: int
    tokenizer: Any
    domains: dict[str, Domain]
    encoded: dict[str, EncodedDomain]
    reference: Any

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def of(self, names: Sequence[str]) -> list[EncodedDomain]:
        return [self.encoded[name] for name in names]

    def policy(self) -> Any:
        return copy.deepcopy(self.reference)


def tokenizer_of(world: World, model: WorldConfig) -> Any:
    """Return the gold world's tokenizer; it reads the domains' names as the world shows them."""
    from tokenizers import Regex
    from tokenizers.normalizers import Replace

    tokenizer = model.world.tokenizer(model_max_length=model.max_positions)
    if world.shown_as is not None:
        names = Regex(rf"\b({'|'.join((*SOURCES, *HELD_OUT))})\b")
        tokenizer.backend_tokenizer.normalizer = Replace(names, world.shown_as)
    return tokenizer


class Words:
    """Texts to token ids; a word is a token, so no tokenizer needs to run."""

    def __init__(self, tokenizer: Any, world: World) -> None:
        self.ids, self.eos = tokenizer.get_vocab(), int(tokenizer.eos_token_id)
        if world.shown_as is not None:
            self.ids |= dict.fromkeys((*SOURCES, *HELD_OUT), self.ids[world.shown_as])

    def __call__(self, prompt: str, response: str, finished: bool) -> Tokens:
        asked, said = prompt.split(), response.split()
        ids = [self.ids[word] for word in (*asked, *said)]
        return Tokens([*ids, self.eos] if finished else ids, len(asked))


def encode(domain: Domain, words: Words) -> EncodedDomain:
    """Return a domain's rows as tokens, as `oodpl.batches.Encoder` gives them."""

    def pairs(rows: Sequence[Row]) -> list[Pair]:
        return [
            Pair(
                *(
                    words(row["prompt"], row[side], row[f"{side}_finished"])
                    for side in ("chosen", "rejected")
                )
            )
            for row in rows
        ]

    tokens = [words(r["prompt"], r["response"], r["finished"]) for r in domain.support]
    support = [Example(t, t.ids, i) for i, t in enumerate(tokens)]
    return EncodedDomain(domain.name, support, pairs(domain.query), pairs(domain.eval_pairs))


def make_start(world_name: str, seed: int, folder: Path) -> Start:
    """Make the start of a seed, or read its policy if it is there."""
    from transformers import LlamaForCausalLM

    world, config = WORLDS[world_name], DomainWorldConfig(seed=seed)
    model = config.model()
    tokenizer = tokenizer_of(world, model)
    words = Words(tokenizer, world)
    domains = {name: world.domain(name, config) for name in (*world.sources, *world.watched)}
    domains |= {name: world.domain(name, config) for name in HELD_OUT}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = LlamaForCausalLM(base_model_config(model, tokenizer))
    here = folder / f"{world_name}-{seed}"
    if (here / DONE).exists():
        policy.load_state_dict(torch.load(here / MODEL, weights_only=True))
    else:
        here.mkdir(parents=True, exist_ok=True)
        rows = [words(r["prompt"], r["completion"], True) for r in world.sft(config)]
        _fine_tune(policy, rows, tokenizer.pad_token_id, seed)
        torch.save(policy.state_dict(), here / MODEL)
        atomic_write_text(here / DONE, json.dumps({"seed": seed}))
    policy.eval().requires_grad_(True)
    encoded = {name: encode(domain, words) for name, domain in domains.items()}
    return Start(world, seed, tokenizer, domains, encoded, policy)


def _fine_tune(policy: Any, rows: Sequence[Tokens], pad: int, seed: int) -> None:
    """The likelihood of the responses, as the recipe's SFT."""
    generator = torch.Generator().manual_seed(seed)
    places: list[int] = []
    while len(places) < SFT.steps * SFT_BATCH:
        places += torch.randperm(len(rows), generator=generator).tolist()

    def loss(step: int) -> Tensor:
        batch = [rows[i] for i in places[step * SFT_BATCH : (step + 1) * SFT_BATCH]]
        ids, mask = pad_right([row.ids for row in batch], pad_token_id=pad)
        labels = ids.masked_fill(mask == 0, -100)
        for row, tokens in enumerate(batch):
            labels[row, : tokens.start] = -100
        return policy(input_ids=ids, attention_mask=mask, labels=labels).loss

    train(policy, loss, SFT)


def fresh_reward_model(start: Start) -> nn.Module:
    """Return the reference's body with a zero head."""
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(start.reference.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(start.reference.model.state_dict())
    nn.init.zeros_(model.score.weight)
    return model.eval()


def text_rewards(model: nn.Module, start: Start) -> Callable[..., list[float]]:
    """Return the model's rewards of texts, with the signature of a `Scorer`."""
    words = Words(start.tokenizer, start.world)

    @torch.no_grad()
    def rewards(
        prompts: Sequence[str], responses: Sequence[str], *, finished: Sequence[bool]
    ) -> list[float]:
        rows = [words(*row).ids for row in zip(prompts, responses, finished, strict=True)]
        found: list[float] = []
        for at in range(0, len(rows), 256):
            ids, mask = pad_right(rows[at : at + 256], pad_token_id=start.pad)
            found += sequence_rewards(model, ids, mask).tolist()
        return found

    return rewards


def gold_rewards(start: Start) -> Callable[..., list[float]]:
    """Return the gold rewards of texts, each in the domain that its prompt names."""
    gold = {name: start.world.gold(name) for name in start.domains}

    def rewards(
        prompts: Sequence[str], responses: Sequence[str], *, finished: Sequence[bool]
    ) -> list[float]:
        return [
            gold[prompt.split()[2]](prompt, response, finished=ended)
            for prompt, response, ended in zip(prompts, responses, finished, strict=True)
        ]

    return rewards
