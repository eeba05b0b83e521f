"""A reward minus its uncertainty: the Laplace approximation of a reward model's linear head.

`reward = r(x, y) - penalty * s(x, y)` with `s` the posterior standard deviation (`core/laplace.py`)
of `w . (phi(x, y) - reference(x))`. Preferences say nothing about the level of a prompt's rewards,
so a response is compared with a reference: the mean state of the training pairs' responses to the
same prompt if there are at least `LEAST` of them, else that of all training responses. A reward
must not depend on what else is scored, so the reference is never taken from the scored batch.

A reward is a function of the tokens alone, which do not say where the prompt ends. So the prompt of
a sequence is the longest known one with whose tokens it begins, unless a later turn of the
assistant follows: a template's opening of an answer shows that the known prompt is only the
beginning of a conversation. In plain text nothing shows that; a prompt that continues another known
prompt, and is not known itself, is taken for that one with a longer answer.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiftrm.core.laplace import covariance_root, pair_precision, posterior_std
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.rewards import hidden_states, pad_right, score_head
from shiftrm.models.scoring import Scorer

__all__ = [
    "Ids",
    "LaplaceScorer",
    "PairTokens",
    "Posterior",
    "answer_opening",
    "fit_posterior",
    "has_posterior",
    "read_posterior",
    "states_of",
]

SETTINGS, TENSORS = "laplace.json", "laplace.safetensors"

LEAST = 8
"""Responses of the training pairs to one prompt, from which its reference is their mean."""

Ids = tuple[int, ...]
"""Tokens."""


@dataclass(frozen=True)
class Posterior:
    """The posterior of a head, and the references.

    Attributes:
        root: of the covariance, [H, H]; see `core.laplace.covariance_root`.
        mean: mean state of the training responses, [H].
        prompts: tokens of the prompts with a reference of their own.
        prompt_means: those references, [P, H].
        prior: precision of the prior.
        pairs: number of pairs behind it.
        penalty: see the module.
    """

    root: Tensor
    mean: Tensor
    prompts: tuple[Ids, ...]
    prompt_means: Tensor
    prior: float
    pairs: int
    penalty: float

    def write(self, folder: Path) -> None:
        """Write `laplace.safetensors` and `laplace.json` beside a checkpoint."""
        tensors = {"root": self.root, "mean": self.mean, "prompt_means": self.prompt_means}
        save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / TENSORS)
        said = {"penalty": self.penalty, "prior": self.prior, "pairs": self.pairs}
        text = json.dumps({**said, "prompts": self.prompts})
        atomic_write_text(folder / SETTINGS, text + "\n")


def has_posterior(path: str | Path) -> bool:
    """Whether one of a posterior's files lies in the folder."""
    try:
        return any((Path(path) / name).is_file() for name in (SETTINGS, TENSORS))
    except (OSError, ValueError):
        return False


def read_posterior(path: str | Path) -> Posterior | None:
    """Read the posterior beside a checkpoint; None if there is none.

    Raises:
        UserError: its files are broken, or one is missing.
    """
    if not has_posterior(path):
        return None
    folder = Path(path)
    try:
        said = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        prompts = tuple(tuple(map(int, ids)) for ids in said["prompts"])
        numbers = float(said["prior"]), int(said["pairs"]), float(said["penalty"])
        tensors = load_file(folder / TENSORS)
        root, mean, means = (tensors[name] for name in ("root", "mean", "prompt_means"))
        H = len(mean)
        shapes = root.shape == (H, H) and means.shape == (len(prompts), H)
        finite = all(bool(t.isfinite().all()) for t in (root, mean, means))
        if not (shapes and finite and math.isfinite(numbers[2])):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError):
        raise UserError(
            f"{path}: its {SETTINGS} or {TENSORS} is missing or broken; train it again"
        ) from None
    return Posterior(root, mean, prompts, means, *numbers)


class LaplaceScorer(Scorer):
    """A reward model whose rewards are lowered where its training pairs say little."""

    def __init__(self, scorer: Scorer, posterior: Posterior, name: str) -> None:
        head = score_head(scorer.model)
        if head.in_features != len(posterior.mean):
            raise UserError(
                f"{name}: its {TENSORS} is of a head with {len(posterior.mean)} inputs, and the "
                f"model's has {head.in_features}; train it again"
            )
        self.model = scorer.model
        self._adopt(scorer)
        self.posterior, self._root = posterior, posterior.root
        self._numbers = {ids: number for number, ids in enumerate(posterior.prompts)}
        self._lengths = sorted({len(ids) for ids in posterior.prompts}, reverse=True)
        self._opening = answer_opening(scorer.tokenizer)

    def _rewards(
        self, input_ids: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]]
    ) -> Tensor:
        states_BH = hidden_states(self.model, input_ids, mask)
        head = score_head(self.model)
        bias = None if head.bias is None else head.bias.to(states_BH)
        rewards_B = F.linear(states_BH, head.weight.to(states_BH), bias)[:, 0]
        away_BH = states_BH - self._references(sequences).to(states_BH)
        self._root = self._root.to(states_BH)  # moved once
        s_B = posterior_std(away_BH, self._root)
        return rewards_B - self.posterior.penalty * s_B

    def _references(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the reference of each sequence, see the module."""
        found = [self.posterior.mean] * len(sequences)
        for row, sequence in enumerate(sequences):
            for length in self._lengths:
                number = self._numbers.get(tuple(sequence[:length]))
                if number is not None:
                    if not _within(self._opening, sequence[length:]):
                        found[row] = self.posterior.prompt_means[number]
                    break
        return torch.stack(found)


def answer_opening(tokenizer: Any) -> Ids:
    """Return the tokens with which the chat template opens an answer; empty without a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    try:
        one, other = (
            encode_prompt(tokenizer, [{"role": "user", "content": word}])[::-1] for word in "ab"
        )
    except UserError:  # a template for other conversations
        return ()
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in same)[::-1]


def _within(part: Ids, sequence: Sequence[int]) -> bool:
    """Whether the tokens follow one another somewhere in the sequence; False for no tokens."""
    ends = range(len(part), len(sequence) + 1) if part else ()
    return any(tuple(sequence[end - len(part) : end]) == part for end in ends)


class PairTokens(NamedTuple):
    """A preference pair in tokens.

    Attributes:
        chosen, rejected: of the whole sequences.
        prompt: with which both begin; empty if unknown.
        number: equal for pairs with equal prompts; -1 if unknown.
        margin, weight: as in training (`core.losses.bradley_terry_loss`, a factor of the loss).
    """

    chosen: Ids
    rejected: Ids
    prompt: Ids = ()
    number: int = -1
    margin: float = 0.0
    weight: float = 1.0


def fit_posterior(
    scorer: Scorer,
    pairs: Sequence[PairTokens],
    *,
    prior: float,
    penalty: float = 0.0,
    batch_size: int = 64,
) -> Posterior:
    """Return the posterior of a trained head given preference pairs.

    A pair of weight 2 counts as two, and one of weight 0 as none. If no pair has a weight, the
    posterior is the prior, and the references are means over all pairs.

    Args:
        prior: precision of the prior of every weight; above 0.

    Raises:
        UserError: the head is not one linear layer, or there are no pairs.
    """
    head = score_head(scorer.model)
    if not pairs:
        raise UserError("there are no pairs to fit the posterior of the head on")
    weighted = [pair for pair in pairs if pair.weight > 0]
    shares = [pair.weight for pair in weighted] or [1.0] * len(pairs)
    pairs = weighted or pairs
    counts = Counter(pair.prompt for pair in pairs)
    known = [ids for ids, count in counts.items() if ids and 2 * count >= LEAST]
    numbers = {ids: number for number, ids in enumerate(known)}
    H, w_H = head.in_features, head.weight[0].detach().double().cpu()
    precision_HH, total_H = torch.zeros(H, H).double(), torch.zeros(H).double()
    sums_PH, counts_P = torch.zeros(len(known), H).double(), torch.zeros(len(known)).double()
    by_length = sorted(
        zip(pairs, shares, strict=True), key=lambda p: max(len(p[0].chosen), len(p[0].rejected))
    )
    for start in range(0, len(by_length), batch_size):
        chunk = by_length[start : start + batch_size]
        chosen_BH = states_of(scorer, [pair.chosen for pair, _ in chunk], batch_size)
        rejected_BH = states_of(scorer, [pair.rejected for pair, _ in chunk], batch_size)
        precision_HH += pair_precision(
            chosen_BH - rejected_BH,
            w_H,
            margin_N=torch.tensor([pair.margin for pair, _ in chunk]).double(),
            weight_N=torch.tensor([pair.weight for pair, _ in chunk]).double(),
        )
        both_BH = chosen_BH + rejected_BH
        for row, (pair, share) in enumerate(chunk):
            total_H += share * both_BH[row]
            if pair.prompt in numbers:
                sums_PH[numbers[pair.prompt]] += share * both_BH[row]
                counts_P[numbers[pair.prompt]] += 2 * share
    return Posterior(
        covariance_root(precision_HH, prior=prior),
        total_H / (2 * sum(shares)),
        tuple(known),
        sums_PH / counts_P[:, None],
        prior,
        len(weighted),
        penalty,
    )


@torch.no_grad()
def states_of(scorer: Scorer, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return the states under the head at the end of each sequence, fp64 on the CPU, [N, H]."""
    device = next(scorer.model.parameters()).device
    found = []
    for start in range(0, len(sequences), batch_size):
        rows, mask = pad_right(
            sequences[start : start + batch_size], pad_token_id=scorer.pad_token_id, device=device
        )
        found.append(hidden_states(scorer.model, rows, mask).double().cpu())
    return torch.cat(found)
