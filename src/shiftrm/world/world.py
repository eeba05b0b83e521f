"""A gold world as a value: a small language, and the reward that is true in it.

To add a world, write a file in `world/registered`, or give `package.module:attribute` as its name.

A prompt names a task and a domain. A response is plain text of words of the vocabulary that starts
with a space, so that prompt + response concatenates. The end of a response is the tokenizer's EOS
token, which is never part of the text.

The gold reward is a sum of features. Each weight is multiplied by a factor of the prompt's domain
and by one of its task.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shiftrm.errors import UserError
from shiftrm.registry import Registry

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "DEFAULT_WORLD",
    "GOLD",
    "WORLDS",
    "Feature",
    "GoldReward",
    "World",
    "domain_factors",
    "find_prompt",
    "gold_name",
    "gold_world",
    "word_tokenizer",
]

COLON = ":"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, EOS, UNK)  # ids 0, 1, 2

Key = TypeVar("Key", bound=tuple[str, str])

TABLE_SEED = 7
FACTOR_RANGE = (0.7, 1.3)


@dataclass(frozen=True)
class Feature:
    """One term of a gold reward: `weight * measure(tally)`.

    Attributes:
        measure: computes the term from the counts of a response, which the world's `tally` returns.
        meaning: what it counts, for tables.
        varies: whether domains weigh it differently.
    """

    name: str
    weight: float
    measure: Callable[[Any], float]
    meaning: str
    varies: bool = True


def domain_factors(
    domains: Sequence[str], features: Sequence[Feature]
) -> dict[str, dict[str, float]]:
    """Draw domain -> feature -> factor in [0.7, 1.3], once for all runs."""
    rng = random.Random(TABLE_SEED)
    return {
        domain: {
            feature.name: round(rng.uniform(*FACTOR_RANGE), 2) if feature.varies else 1.0
            for feature in features
        }
        for domain in domains
    }


def find_prompt(prompts: Mapping[str, Key], prompt: str) -> Key:
    """Return what a language says of one of its prompts; extra spaces are ignored.

    Raises:
        UserError: the text is not one of the prompts.
    """
    key = prompts.get(prompt)
    if key is None:
        key = prompts.get(" ".join(prompt.split()))
    if key is None:
        raise UserError(
            f"prompt {prompt!r}: not a prompt of the gold world; write one of its "
            f"{len(prompts)}, such as {next(iter(prompts))!r}"
        )
    return key


@dataclass(frozen=True)
class World:
    """A language with its prompts and demonstrations, and its gold reward.

    Attributes:
        about: what its responses are and what is good in them, as one sentence for the page.
        words: every word, one token each, in the order of ids after the special tokens.
        prompts: every prompt, with its task and its domain.
        draw_prompt: draws one of them.
        demonstration: draws a demonstration with its leading space; quality ranges from 0 (poor) to
            1 (good): `(rng, prompt, quality)`. At most `max_response_tokens` - 1 words.
        features: the terms of the gold reward, their base weights and limits.
        domain_factors: domain -> feature -> factor, for every feature.
        task_factors: task -> feature -> factor; 1 if missing.
        tally: counts what the features need: `(prompt, response, *, finished)`.
        prompt_tokens: length of the longest prompt.
        max_response_tokens: longest response: one word less and EOS, or this many words without.
    """

    name: str
    about: str
    words: tuple[str, ...]
    prompts: Mapping[str, tuple[str, str]]
    draw_prompt: Callable[[random.Random], str]
    demonstration: Callable[[random.Random, str, float], str]
    features: tuple[Feature, ...]
    domain_factors: Mapping[str, Mapping[str, float]]
    task_factors: Mapping[str, Mapping[str, float]]
    tally: Callable[..., Any]
    prompt_tokens: int = 4
    max_response_tokens: int = 20

    def parse_prompt(self, prompt: str) -> tuple[str, str]:
        """Return task and domain of a prompt; see `find_prompt`."""
        return find_prompt(self.prompts, prompt)

    def domain_of(self, prompt: str) -> str:
        """Return the domain of a prompt; raises as `parse_prompt`."""
        return self.parse_prompt(prompt)[1]

    @functools.cached_property
    def _weights(self) -> dict[tuple[str, str], dict[str, float]]:
        return {
            (task, domain): {
                feature.name: feature.weight
                * self.domain_factors[domain][feature.name]
                * self.task_factors.get(task, {}).get(feature.name, 1.0)
                for feature in self.features
            }
            for task, domain in self.prompts.values()
        }

    def weights(self, prompt: str) -> dict[str, float]:
        """Return every feature's weight for a prompt: base * domain factor * task factor."""
        return dict(self._weights[self.parse_prompt(prompt)])

    def explain(self, prompt: str, response: str, *, finished: bool = True) -> dict[str, float]:
        """Return what every feature adds to the gold reward, in the order of `features`.

        Args:
            prompt: a prompt of the language.
            response: its text, with or without the leading space, without EOS.
            finished: whether the response ended by itself (False: cut off at the length limit).

        Raises:
            UserError: not a prompt of this language.
        """
        by_name = self._weights[self.parse_prompt(prompt)]
        counts = self.tally(prompt, response, finished=finished)
        # + 0.0 turns the -0.0 of an absent flaw into 0.0.
        return {
            feature.name: by_name[feature.name] * feature.measure(counts) + 0.0
            for feature in self.features
        }

    def gold_reward(self, prompt: str, response: str, *, finished: bool = True) -> float:
        """Return the gold reward of one response, the sum of `explain` (same arguments)."""
        # fsum: exactly rounded, so the same number on every Python version (sum changed in 3.12).
        return math.fsum(self.explain(prompt, response, finished=finished).values())

    def tokenizer(self, *, model_max_length: int = 64) -> PreTrainedTokenizerFast:
        """Build the language's tokenizer; see `word_tokenizer`."""
        return word_tokenizer(self.words, model_max_length=model_max_length)


class GoldReward:
    """A gold reward as a reward function over a batch, for the control that trains on it.

    Args:
        world: by default `DEFAULT_WORLD`.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = WORLDS.get(DEFAULT_WORLD) if world is None else world

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[float]:
        """Return one reward per response; `finished=None` means that all are finished.

        Raises:
            ValueError: sequences of different lengths.
            UserError: a text that is not a prompt of the world's language.
        """
        ended = [True] * len(responses) if finished is None else finished
        return [
            self.world.gold_reward(prompt, response, finished=bool(end))
            for prompt, response, end in zip(prompts, responses, ended, strict=True)
        ]


def word_tokenizer(words: Sequence[str], *, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: one token per word, case unchanged.

    It adds no special tokens: there is no BOS, and the caller appends EOS to a finished response
    (TRL's trainers do). So a prompt and its response may be tokenized together or apart. Decoding
    joins words with single spaces; `encode(decode(ids)) == ids` for every sequence of words, and
    what follows `decode(prompt_ids)` in `decode(prompt_ids + response_ids)` is the response with
    its leading space. A colon is split off, so a response glued to its prompt reads the same.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(COLON), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=model_max_length,
        padding_side="right",
        # By default a fast tokenizer also returns token_type_ids, which Llama does not accept, and
        # decoding may attach punctuation to the word before it, which would not be exact.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


WORLDS = Registry[World]("gold world", World, home="shiftrm.world.registered")

DEFAULT_WORLD = "topics"

GOLD = "gold"
"""Name that selects the gold reward of `DEFAULT_WORLD` in place of a reward model's folder;
`gold:NAME` selects that of another world."""


def gold_name(world: str) -> str:
    """Return the name of a world's gold reward, which `gold_world` reads."""
    return GOLD if world == DEFAULT_WORLD else f"{GOLD}:{world}"


def gold_world(name: str) -> World | None:
    """Return the world whose gold reward a name selects; None for a folder or a hub name.

    Raises:
        UserError: `gold:NAME` with a name that is not a world's.
    """
    first, colon, rest = name.partition(":")
    if first != GOLD:
        return None
    return WORLDS.get(rest if colon else DEFAULT_WORLD)
