"""Which pairs of the policy's responses to label: those that say most about the reward model."""

from collections.abc import Sequence

from shiftrm.core.acquisition import choose_pairs
from shiftrm.data.loaded import no_text
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.measure.score_once import Tokens, tokens_of
from shiftrm.models.combined import EnsembleScorer
from shiftrm.models.laplace import fit_posterior, states_of
from shiftrm.models.responses import group_responses
from shiftrm.models.rewards import score_head
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.scored_pairs import tokens_of_pairs

__all__ = ["informative_pairs"]

PRIOR = 1.0
"""Precision of the prior of every weight of the head."""


def informative_pairs(
    reward: str, pairs: Sequence[Row], samples: Sequence[Row], *, count: int, batch_size: int = 64
) -> list[int]:
    """Return the indices, in order, of the samples to label (`core.acquisition.choose_pairs`).

    The posterior is that of the reward model's head given the pairs that it was trained on.

    Args:
        reward: folder of the reward model.
        samples: two responses to each prompt. Pairs of equal or blank responses are not chosen:
            they get no label. Nor are those beyond the model's context.
        count: how many to choose; fewer, or none, if there are not as many to choose from.

    Raises:
        UserError: the reward model is an ensemble, or its head is not one linear layer.
    """
    scorer = Scorer.from_pretrained(reward).to_accelerator()
    if isinstance(scorer, EnsembleScorer):
        raise UserError(
            f"{reward}: is an ensemble; active labels need one reward model with a head"
        )
    tokens = tokens_of_pairs(pairs, scorer, name="pairs", max_length=None)
    posterior = fit_posterior(scorer, tokens, prior=PRIOR, batch_size=batch_size)
    able = _able(scorer, samples)
    if not able:
        return []
    first_NH, second_NH = (
        states_of(scorer, [sides[k] for sides in able.values()], batch_size) for k in (0, 1)
    )
    differences_NH = first_NH - second_NH
    means_N = differences_NH @ score_head(scorer.model).weight[0].detach().double().cpu()
    rooted_NH = differences_NH @ posterior.root.T
    chosen = choose_pairs(means_N, rooted_NH @ rooted_NH.T, min(count, len(able)))
    places = list(able)
    return sorted(places[i] for i in chosen)


def _able(scorer: Scorer, samples: Sequence[Row]) -> dict[int, list[Tokens]]:
    """Return the samples that can be labelled and read, by index: the tokens of both responses."""
    able = {}
    for index, row in enumerate(samples):
        responses = group_responses(row)
        first, second = (response.text for response in responses)
        if first == second or no_text(first) or no_text(second):
            continue
        tokens = tokens_of(scorer, responses, f"samples, row {index}")
        if tokens is not None:
            able[index] = tokens
    return able
