"""The equations of PPO for language models, as pure functions on tensors, and the model passes.

Rows are `prompt + response`, padded on the right, so that absolute positions are the same as in
training. Only the last `A` columns are used, from the end of the shortest prompt on: column
`a` of every [B, A] tensor belongs to the token at `T - A + a` (its log-probability, the value of
the state before it). A mask marks the response tokens, including EOS. It is computed from lengths,
not from token ids, so pad may equal EOS.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.core.likelihood import unwrapped
from shiftrm.models.rewards import pad_right, token_values
from shiftrm.models.sampling import Sample
from shiftrm.policies.ppo_passes import Predictions, logits_at, predictions_at, vocabulary_of

LOGITS_AT_ONCE = 2**27
"""Most logits of one model held at once without gradient (512 MiB in fp32)."""

TOKENS_ON_CPU = 1536
"""Most tokens in one pass without gradient on a CPU, whose caches do not hold more activations."""

FEW_LOGITS = 2**20
"""Rows with fewer logits in all of their last A columns compute them all (4 MiB in fp32)."""

_SLICE = 2**23
"""Most logits copied to fp32 at once."""


def token_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_coefficient: float,
) -> Tensor:
    """Return token rewards: the KL penalty on each, plus the score on the last response token.

    `r_t = -c (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t is last] * score`

    Args:
        scores_B: score of each whole response, shape [B].
        logprobs_BT, ref_logprobs_BT: of the sampled tokens, before the update, shape [B, T].
        mask_BT: True at response tokens, at least one a row, shape [B, T].
        kl_coefficient: c, reward per nat.

    Returns:
        Shape [B, T], 0 where the mask is False.

    Source: Ziegler et al., arXiv 1909.08593, Eq. 2, by token as in Ouyang et al., arXiv 2203.02155.
    """
    penalty_BT = -kl_coefficient * (logprobs_BT - ref_logprobs_BT)
    rewards_BT = penalty_BT.masked_fill(~mask_BT, 0.0)
    last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


def clipped_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_ratio: float,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, to be minimised: `-mean_t min(rho_t A_t, clip(rho_t, 1-e, 1+e) A_t)`.

    Args:
        logprobs_BT: of the policy being trained, shape [B, T]; the old ones are constants.
        mask_BT: True at response tokens; the mean runs over all tokens of the batch.
        clip_ratio: e.
        tokens: number of response tokens of the whole batch, if these rows are a part of it; the
            losses of the parts then add up to that of the batch. By default the rows are the batch.

    Returns:
        The loss, and the share of tokens whose ratio lies outside the clip range; both scalars.

    Source: Schulman et al., arXiv 1707.06347, Eq. 7 (negated), mean over tokens.
    """
    ratio_BT = (logprobs_BT - old_logprobs_BT).masked_fill(~mask_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)  # Eq. 7
    outside_BT = (ratio_BT.detach() - 1).abs() > clip_ratio
    return (
        masked_mean(loss_BT, mask_BT, tokens),
        masked_mean(outside_BT.to(loss_BT.dtype), mask_BT, tokens),
    )


def clipped_value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    value_clip: float | None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The critic's loss: `mean_t 1/2 max((V - R)^2, (clip(V, V_old +- c) - R)^2)`, a scalar.

    Args:
        values_BT: of the critic being trained, shape [B, T]; the old ones are constants.
        returns_BT: targets, from `gae`.
        value_clip: c, in units of reward; None is the plain squared error.
        tokens: as in `clipped_policy_loss`.

    Source: the PPO code of OpenAI's baselines, as Ziegler et al. used it; not in the PPO paper.
    """
    error_BT = (values_BT - returns_BT) ** 2
    if value_clip is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip, value_clip)
        error_BT = torch.maximum(error_BT, (near_BT - returns_BT) ** 2)
    return 0.5 * masked_mean(error_BT, mask_BT, tokens)


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over positions where the mask is True, a scalar; the others may hold anything.

    With `count`, the number of positions in the whole batch, return this part's share of its mean.
    """
    return x.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over positions where the mask is True, a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and population variance 1 over the mask; 0 elsewhere.

    Values that are all equal become 0. Source: common PPO practice; not in the PPO paper.
    """
    centred = (x - masked_mean(x, mask)).masked_fill(~mask, 0.0)
    return centred * torch.rsqrt(masked_variance(x, mask) + 1e-8)


@dataclass
class KLController:
    """The KL penalty's coefficient, steered so that the policy stays at a given KL.

    `c <- c * exp(rate * e + damping * (e - e_before))`, `e = clip((KL - target) / target, -1, 1)`.
    Without a target, c is constant.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2, which multiplies by `1 + 0.1 e` with e
    clipped at 0.2. Ours is in log space throughout, so that up and down steps undo each other, is
    clipped at 1, and has a damping term: the policy answers to a new coefficient only some steps
    later, so that the plain rule swings around its target (and overshoots it at the start).

    Attributes:
        coefficient: c, reward per nat.
        target: sequence KL to the reference, in nats; None for a constant coefficient.
        rate: largest change of log c in one update at constant KL.
        damping: change of log c when the relative error changes by 1.
    """

    coefficient: float
    target: float | None = None
    rate: float = 0.1
    damping: float = 0.0
    _before: float | None = None

    def update(self, kl: float) -> float:
        """Adjust to the measured KL (nats a sequence) and return the new coefficient."""
        if self.target is not None:
            error = max(-1.0, min(1.0, (kl - self.target) / self.target))
            change = 0.0 if self._before is None else error - self._before
            self.coefficient *= math.exp(self.rate * error + self.damping * change)
            self._before = error
        return self.coefficient


@dataclass(frozen=True)
class Rows:
    """Samples as right-padded rows; see the module docstring.

    Attributes:
        input_ids, attention_mask: int64, shape [B, T].
        response_mask: bool, shape [B, A]; the columns are the last A of T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @classmethod
    def pack(cls, samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> "Rows":
        """Pack samples, each with at least one prompt and one response token."""
        ids, attention = pad_right(
            # Any token works as padding: causal attention does not look to the right.
            [s.prompt_ids + s.response_ids for s in samples],
            pad_token_id=0,
            device=device,
        )
        prompt_B = torch.tensor([len(s.prompt_ids) for s in samples], device=device)
        start = int(prompt_B.min())
        mask = attention[:, start:].bool()
        return cls(
            ids,
            attention,
            mask & (torch.arange(start, ids.shape[1], device=device) >= prompt_B[:, None]),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Sequence[int] | slice) -> "Rows":
        return Rows(self.input_ids[rows], self.attention_mask[rows], self.response_mask[rows])

    def chunks(self, size: int) -> Iterator["Rows"]:
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    @property
    def places(self) -> Tensor:
        """Index among the B * T tokens of the state before each of the N response tokens, [N]."""
        T, A = self.input_ids.shape[1], self.response_mask.shape[1]
        row, column = self.response_mask.nonzero(as_tuple=True)
        return row * T + column + (T - A - 1)

    @property
    def tokens(self) -> Tensor:
        """The response tokens of all rows, row by row, shape [N]."""
        return self.input_ids[:, -self.response_mask.shape[1] :][self.response_mask]

    def spread(self, values_N: Tensor) -> Tensor:
        """Return values of the response tokens at their places, shape [B, A]; 0 elsewhere."""
        zeros = values_N.new_zeros(self.response_mask.shape)
        return zeros.masked_scatter(self.response_mask, values_N)

    def logits(self, model: Any) -> Tensor:
        """Unmodified logits of the response tokens, as the model gives them, shape [N, V].

        The model may be wrapped (DDP, FSDP).
        """
        return self._of_few(model) if self._are_few(model) else logits_at(model, *self._inputs())

    def predictions(self, model: Any) -> Predictions:
        """What the model predicts at the response tokens; see `predictions_at`."""
        if self._are_few(model):
            return Predictions(self._of_few(model), vocabulary_of(model))
        return predictions_at(model, *self._inputs())

    def logprobs(self, model: Any) -> Tensor:
        """Log-probabilities of the last A tokens, shape [B, A]; 0 where the mask is False."""
        return self.spread(self.predictions(model).logprobs(self.tokens))

    def _inputs(self) -> tuple[dict[str, Tensor], Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}, self.places

    def _are_few(self, model: Any) -> bool:
        return self.response_mask.numel() * vocabulary_of(model) <= FEW_LOGITS

    def _of_few(self, model: Any) -> Tensor:
        """`logits` from those of the last A tokens: one product where there is little to save."""
        A = self.response_mask.shape[1]
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
            options["logits_to_keep"] = A + 1
        logits: Tensor = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            use_cache=False,
            **options,
        ).logits[:, -(A + 1) : -1]
        return logits[self.response_mask]

    def portions(self, most: int, vocabulary: int | None = None) -> Iterator["Rows"]:
        """Yield parts for passes without gradient, of at most this many rows.

        Args:
            vocabulary: logits per token, if the pass returns logits.
        """
        if vocabulary is not None:
            most = min(most, self.within(LOGITS_AT_ONCE, vocabulary))
        if self.input_ids.device.type == "cpu":
            most = min(most, max(1, TOKENS_ON_CPU // self.input_ids.shape[1]))
        return self.chunks(most)

    def within(self, logits: int, vocabulary: int) -> int:
        """Number of rows, at least 1, that together have at most this many logits."""
        longest = int(self.response_mask.sum(dim=1).max())
        return max(1, logits // max(1, longest * vocabulary))

    def values(self, critic: nn.Module) -> Tensor:
        """The critic's value of the state before each of the last A tokens, shape [B, A]."""
        A = self.response_mask.shape[1]
        return token_values(critic, self.input_ids, self.attention_mask)[:, -(A + 1) : -1]


@torch.no_grad()
def policy_logprobs(
    model: Any, samples: Sequence[Sample], *, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens under a model, without temperature, top-p or penalty.

    Args:
        model: a causal language model of transformers, in eval mode.
        samples: prompts may be of unequal length.

    Returns:
        Log-probabilities (0 off the mask) and the mask of response tokens, both shape [B, A].
        Where prompts are of unequal length the responses start in different columns.
    """
    rows = Rows.pack(samples, device=next(model.parameters()).device)
    logprobs = torch.cat([chunk.logprobs(model) for chunk in rows.chunks(batch_size)])
    return logprobs, rows.response_mask


@torch.no_grad()
def exact_token_kl(
    policy: Any, reference: Any, samples: Sequence[Sample], *, batch_size: int = 64
) -> Tensor:
    """Sequence KL by sample: the sum over its states of the KL over the whole vocabulary.

    `sum_t KL(pi(.|s_t) || pi_ref(.|s_t))`. Its expectation over samples of the unmodified policy is
    the sequence KL (chain rule), as for the usual `sum_t log pi/pi_ref` (k1), with less variance
    and never negative. Along samples drawn otherwise (temperature, top-p, penalties) it is the KL
    over the states that those visit; k1 along them is not an estimate and may be negative.

    Args:
        batch_size: rows in one pass at most; fewer where their logits exceed `LOGITS_AT_ONCE`.

    Returns:
        Nats, shape [B].
    """
    rows = Rows.pack(samples, device=next(policy.parameters()).device)
    kl: list[Tensor] = []
    for chunk in rows.portions(batch_size, vocabulary_of(policy)):
        kl_N, _ = kl_and_entropy(chunk.logits(policy), chunk.logits(reference))
        kl.append(chunk.spread(kl_N).sum(1))
    return torch.cat(kl)


@torch.no_grad()
def kl_and_entropy(logits_NV: Tensor, ref_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL to the reference and entropy at each state, exactly over the vocabulary; in fp32 or more.

    `KL_t = sum_v pi_v (log pi_v - log pi_ref_v)`, `H_t = -sum_v pi_v log pi_v`.

    Args:
        logits_NV, ref_logits_NV: of policy and reference, any precision, shape [N, V].

    Returns:
        Nats, shape [N] each, at least 0; NaN where a logit is.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    kl, entropy = [], []
    size = max(1, _SLICE // logits_NV.shape[-1])  # of states: the copies in fp32 stay small
    for start in range(0, len(logits_NV), size):
        log_p = logits_NV[start : start + size].to(dtype).log_softmax(-1)
        log_q = ref_logits_NV[start : start + size].to(dtype).log_softmax(-1)
        p = log_p.exp()
        never = p == 0  # where log p may be -inf
        entropy.append(-(p * log_p).masked_fill(never, 0.0).sum(-1))
        kl.append((p * (log_p - log_q)).masked_fill(never, 0.0).sum(-1))
    return torch.cat(kl).clamp(min=0.0), torch.cat(entropy).clamp(min=0.0)
