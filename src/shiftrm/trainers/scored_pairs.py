"""Rewards of a training's pairs by a finished reward model, whatever it is made of."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from shiftrm.core.losses import reward_model_loss
from shiftrm.data.pairs import WEIGHT, check_margin, check_weight
from shiftrm.data.replies import has_prompt
from shiftrm.files import Row
from shiftrm.models.laplace import Ids, PairTokens
from shiftrm.models.rendering import encode_prompt, template_options
from shiftrm.models.rope import length_limit
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.pair_batches import PROMPT, encode_pair, length_filters
from shiftrm.trainers.pair_metrics import PairStatistics

if TYPE_CHECKING:
    from shiftrm.trainers.training import TrainingJob

__all__ = ["load_scorer", "measure_pairs", "score_pairs", "tokens_of_pairs"]


def load_scorer(folder: Path) -> Scorer:
    """Load a reward model on this process's device."""
    scorer = Scorer.from_pretrained(folder)
    scorer.model.to(PartialState().device)
    return scorer


def tokens_of_pairs(
    rows: Iterable[Row], scorer: Scorer, *, name: str, max_length: int | None
) -> list[PairTokens]:
    """Return the tokens of the pairs that training keeps: neither too long nor of equal sides.

    Args:
        name: of the pairs, for errors.
    """
    keeps = length_filters(length_limit(scorer.model.config, max_length)).values()
    found = []
    for index, row in enumerate(rows):
        pair = encode_pair(row, index, scorer.tokenizer, name)
        margin = check_margin(row.get("margin"), f"{name} data, row {index}")
        weight = check_weight(row.get(WEIGHT), f"{name} data, row {index}")
        if all(keep(pair) for keep in keeps):
            chosen, rejected = tuple(pair["chosen_ids"]), tuple(pair["rejected_ids"])
            prompt = _prompt_tokens(row, scorer.tokenizer, chosen, rejected)
            found.append(PairTokens(chosen, rejected, prompt, pair[PROMPT], margin, weight))
    return found


def score_pairs(
    job: "TrainingJob", scorer: Scorer, name: str
) -> tuple[list[PairTokens], list[tuple[float, float]]]:
    """Return the pairs of one of the job's tables, and the rewards of both sides."""
    args = job.chosen.args
    pairs = tokens_of_pairs(job.tables[name], scorer, name=name, max_length=args.max_length)
    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    rewards = scorer.score_ids(sequences, batch_size=args.per_device_eval_batch_size)
    return pairs, list(zip(rewards[0::2], rewards[1::2], strict=True))


def measure_pairs(job: "TrainingJob") -> dict[str, dict[str, float]]:
    """Return the metrics of the finished reward model on each held-out set of the job."""
    names = [name for name in job.tables if name != "pairs"]
    found = {}
    for name in names:
        pairs, rewards = score_pairs(job, load_scorer(job.finished), name)
        rewards_N2 = torch.tensor(rewards, dtype=torch.float64)
        lengths_N2 = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
        numbers_N = torch.tensor([pair.number for pair in pairs])
        margins_N, weights_N = (
            torch.tensor([(p.margin, p.weight) for p in pairs]).double().unbind(1)
        )
        losses_N = reward_model_loss(
            *rewards_N2.unbind(1),
            margin=margins_N,
            weight=weights_N,
            centring=job.chosen.args.center_rewards_coefficient,
        )
        statistics, counted_N = PairStatistics(), torch.ones(len(pairs))
        statistics.add(rewards_N2, lengths_N2, losses_N, numbers_N, counted_N, lambda rows: rows)
        found[name.removeprefix("eval").strip()] = statistics.take(intervals=True)
    return found


def _prompt_tokens(row: Row, tokenizer: Any, *sides: Ids) -> Ids:
    """Return the tokens of the prompt with which both sides begin.

    Its last token may be missing: tokenizers may join it with the first of an answer. Empty if
    there is no prompt, or only a blank one, or if less than that is left of it.
    """
    prompt: Any = row.get("prompt")
    if not has_prompt(row) or (isinstance(prompt, str) and not prompt.strip()):
        return ()
    opening = encode_prompt(tokenizer, prompt, template_options=template_options(row))
    before_any = 0 if isinstance(prompt, list) else len(encode_prompt(tokenizer, ""))  # such as BOS
    shared = _shared(opening, *sides)
    return shared if len(shared) >= max(len(opening) - 1, before_any + 1) else ()


def _shared(*sequences: Sequence[int]) -> Ids:
    """Return the tokens with which all sequences begin."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return tuple(sequences[0][:length])
