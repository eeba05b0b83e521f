"""What a reward model was trained on, to tell how far the policy's responses are from it.

Two free signals read this (`registered/trained_on.py`): the Mahalanobis distance of hidden states
from those of the training pairs (Lee et al., arXiv 1807.03888; for reward models, InfoRM, arXiv
2402.09345), and the errors that a Bayesian last layer, fitted to the pairs, expects.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shiftrm.core.discrimination import Floats
from shiftrm.core.laplace import covariance_root, pair_precision, posterior_std
from shiftrm.errors import UserError
from shiftrm.files import Row, read_jsonl
from shiftrm.models.combined import EnsembleScorer
from shiftrm.models.laplace import states_of
from shiftrm.models.responses import Response
from shiftrm.models.rewards import score_head
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.scored_pairs import tokens_of_pairs

__all__ = ["TrainingStates"]

MOST = 2048
"""Training pairs that are read; of more, so many are drawn."""

PRIOR = 1.0
"""Precision of the prior of every weight of the head, as for active labels."""

RIDGE = 0.01
"""Added to the states' covariance, as a share of its mean variance, so that it has an inverse."""


class TrainingStates:
    """The hidden states of a reward model's training pairs.

    Args:
        scorer: the reward model.
        pairs: rows of `prompt`, `chosen` and `rejected` that it was trained on.
        batch_size: rows of a forward pass.
        seed: of which pairs are drawn, if there are more than `MOST`.

    Raises:
        UserError: an ensemble, a head that is not one linear layer, or no pairs that fit.
    """

    def __init__(
        self, scorer: Scorer, pairs: Sequence[Row], *, batch_size: int = 64, seed: int = 0
    ) -> None:
        if isinstance(scorer, EnsembleScorer):
            raise UserError("the monitor cannot read the states of an ensemble; give one member")
        self.scorer, self.batch_size = scorer, batch_size
        self._head_H = score_head(scorer.model).weight[0].detach().double().cpu()
        if len(pairs) > MOST:
            pairs = random.Random(f"states/{seed}").sample(list(pairs), MOST)
        tokens = tokens_of_pairs(pairs, scorer, name="pairs", max_length=None)
        if not tokens:
            raise UserError("there are no pairs of the reward model's training to compare with")
        sides = [ids for pair in tokens for ids in (pair.chosen, pair.rejected)]
        states_NH = states_of(scorer, sides, batch_size)
        margin_N, weight_N = torch.tensor([(p.margin, p.weight) for p in tokens]).double().unbind(1)
        precision_HH = pair_precision(
            states_NH[0::2] - states_NH[1::2], self._head_H, margin_N=margin_N, weight_N=weight_N
        )
        self._posterior_root_HH = covariance_root(precision_HH, prior=PRIOR)
        self._mean_H = states_NH.mean(0)
        away_NH = states_NH - self._mean_H
        covariance_HH = away_NH.T @ away_NH / max(1, len(away_NH) - 1)
        ridge = max(RIDGE * float(covariance_HH.diagonal().mean()), 1e-12)
        self._root_HH = covariance_root(covariance_HH, prior=ridge)
        self._usual = max(float(posterior_std(away_NH, self._root_HH).mean()), 1e-12)

    @classmethod
    def from_pretrained(cls, model: str | Path, pairs: str | Path) -> "TrainingStates":
        """Read a reward model's folder and the file of its training pairs.

        Raises:
            UserError: as `Scorer.from_pretrained` and `read_jsonl`, and as the class.
        """
        return cls(Scorer.from_pretrained(model).to_accelerator(), read_jsonl(pairs))

    def states(self, responses: Sequence[Response]) -> Tensor:
        """Return the states under the head at the end of each response, fp64, [N, H]."""
        ids = [self.scorer.encode_response(response) for response in responses]
        return states_of(self.scorer, ids, self.batch_size)

    def distances(self, states_NH: Tensor) -> Floats:
        """Return the Mahalanobis distance of each state from the training pairs' states, [N].

        `sqrt((h - mean)^T (covariance + ridge)^-1 (h - mean))`, over the mean of the training
        states, so that 1 is as far as they are themselves.
        """
        found_N = posterior_std(states_NH - self._mean_H, self._root_HH) / self._usual
        return np.asarray(found_N.numpy(), dtype=np.float64)

    def error_probabilities(self, states_NH: Tensor, i: Floats, j: Floats) -> Floats:
        """Return how probable it is that each pair is ordered wrongly, [pairs].

        `Phi(-|w . d| / s)` with d the difference of states and s the posterior standard deviation
        of `w . d`: the share of heads drawn from the posterior that order the pair the other way.

        Args:
            i, j: indices of the two states of each pair.
        """
        d_MH = states_NH[torch.as_tensor(i)] - states_NH[torch.as_tensor(j)]
        gaps_M = (d_MH @ self._head_H).abs()
        s_M = posterior_std(d_MH, self._posterior_root_HH).clamp(min=1e-300)
        return np.asarray(torch.special.ndtr(-gaps_M / s_M).numpy(), dtype=np.float64)
