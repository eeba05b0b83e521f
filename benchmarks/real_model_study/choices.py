"""Pairs, labels, splits and best-of-n demonstrations: pure functions on rows."""

import math
import random
from collections.abc import Mapping, Sequence

from shiftrm.data.loaded import no_text
from shiftrm.data.prompt_keys import hashed_uniform, prompt_key
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Messages

__all__ = ["chosen_demonstrations", "first_turns", "label_pairs", "split_prompts"]


def first_turns(pairs: Sequence[Row], system: str) -> list[Messages]:
    """Return each different first message of a user once, after the system message."""
    found: dict[str, Messages] = {}
    for pair in pairs:
        users = [turn for turn in pair["prompt"] if turn["role"] == "user"]
        if users:
            opening = [{"role": "user", "content": users[0]["content"]}]
            before = [{"role": "system", "content": system}] if system else []
            found.setdefault(prompt_key(opening), [*before, *opening])
    return list(found.values())


def split_prompts(
    prompts: Sequence[Messages], sizes: Mapping[str, int], *, seed: int
) -> dict[str, list[Row]]:
    """Return rows `{"prompt"}` for each purpose; no prompt has two purposes.

    Raises:
        UserError: too few prompts.
    """
    total = sum(sizes.values())
    if total > len(prompts):
        raise UserError(
            f"the study needs {total} prompts and the pairs have {len(prompts)} that are short "
            "enough; lower eval_prompts and the others, or raise max_prompt_tokens"
        )
    drawn = sorted(prompts, key=lambda prompt: hashed_uniform(seed, "prompt", prompt_key(prompt)))
    rows = iter([{"prompt": prompt} for prompt in drawn])
    return {purpose: [next(rows) for _ in range(size)] for purpose, size in sizes.items()}


def label_pairs(
    groups: Sequence[Row],
    golds: Sequence[Sequence[float]],
    count: int,
    *,
    temperature: float,
    seed: int,
) -> list[Row]:
    """Return `count` preference pairs of responses to one prompt, labelled by the gold.

    Responses 1 and 2, 3 and 4, and so on are pairs; those whose texts or golds are equal, or of
    which one is blank, are left out. Every prompt gives its first pair before any gives its second.

    Args:
        golds: of each response.
        temperature: the first is preferred with probability sigmoid((g1 - g2) / temperature)
            (Bradley-Terry); at 0 the one with the higher gold is.

    Raises:
        UserError: fewer than `count` pairs.
    """
    rng = random.Random(f"labels/{seed}")
    pairs: list[Row] = []
    for place in range(0, max((len(row["responses"]) for row in groups), default=0) - 1, 2):
        for row, gold in zip(groups, golds, strict=True):
            here = row["responses"][place : place + 2]
            if len(here) < 2 or here[0] == here[1] or any(map(no_text, here)):
                continue
            difference = gold[place] - gold[place + 1]
            draw = rng.random()
            if difference == 0:
                continue
            first = (
                difference > 0 if temperature == 0 else draw < _sigmoid(difference / temperature)
            )
            better, worse = (place, place + 1) if first else (place + 1, place)
            pairs.append(
                {
                    "prompt": row["prompt"],
                    "chosen": row["responses"][better],
                    "rejected": row["responses"][worse],
                    "chosen_finished": row["finished"][better],
                    "rejected_finished": row["finished"][worse],
                }
            )
    if len(pairs) < count:
        raise UserError(
            f"only {len(pairs)} of {count} pairs can be labelled: the other responses are equal, "
            "blank or of equal gold; sample more (label_prompts or label_responses)"
        )
    return pairs[:count]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def chosen_demonstrations(groups: Sequence[Row], rewards: Sequence[Sequence[float]]) -> list[Row]:
    """Return the response with the highest reward to each prompt as a demonstration.

    Only finished responses with text take part: a policy trained on others would learn to end in
    the middle of a sentence. A prompt without one gives no demonstration. Of equal rewards the
    first counts.

    Raises:
        UserError: no prompt gives one.
    """
    rows: list[Row] = []
    for row, found in zip(groups, rewards, strict=True):
        fit = [
            place
            for place, (text, done) in enumerate(
                zip(row["responses"], row["finished"], strict=True)
            )
            if done and not no_text(text)
        ]
        if fit:
            best = max(fit, key=found.__getitem__)
            answer = {"role": "assistant", "content": row["responses"][best]}
            rows.append({"prompt": row["prompt"], "completion": [answer]})
    if not rows:
        raise UserError("no response is finished, so there is nothing to fine-tune on")
    return rows
