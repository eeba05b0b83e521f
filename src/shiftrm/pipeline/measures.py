"""Numbers of sampled responses: rewards, length, truncation, distance from the reference."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shiftrm.files import Row
from shiftrm.models.loading import to_accelerator
from shiftrm.models.sampling import as_samples, load_policy
from shiftrm.models.scoring import mean_and_spread
from shiftrm.policies.ppo_math import exact_token_kl
from shiftrm.records import Recorder

__all__ = ["ResponseNumbers", "free", "policy_kl"]


@dataclass(frozen=True)
class ResponseNumbers:
    """A policy's responses under its reward model.

    Attributes:
        proxy: mean reward; `standardised` with mean and standard deviation on SFT responses.
        length: words per response.
        distinct: share of different responses.
        truncated: share of responses that the length limit cut off.
    """

    proxy: float
    standardised: float
    length: float
    distinct: float
    truncated: float
    n: int

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        rewards: Sequence[Sequence[float]],
        standard: tuple[float, float],
    ) -> "ResponseNumbers":
        texts = [response for row in rows for response in row["responses"]]
        finished = [done for row in rows for done in row["finished"]]
        mean, _ = mean_and_spread(rewards)
        return cls(
            proxy=mean,
            standardised=(mean - standard[0]) / standard[1],
            length=sum(len(text.split()) for text in texts) / len(texts),
            distinct=len(set(texts)) / len(texts),
            truncated=finished.count(False) / len(finished),
            n=len(texts),
        )

    def record(self, recorder: Recorder) -> None:
        recorder.add("proxy_mean", self.proxy, n=self.n)
        recorder.add("proxy_mean_standardised", self.standardised, n=self.n)
        recorder.add("length_mean", self.length, n=self.n)
        recorder.add("distinct_share", self.distinct, n=self.n)
        recorder.add("truncated_share", self.truncated, n=self.n)


def policy_kl(
    policy: str, reference: str, rows: Sequence[Row], batch_size: int
) -> tuple[float, int]:
    """Return the sequence KL of the policy to the reference, in nats, and the number of responses.

    With a temperature or top-p other than 1 the responses are of the modified distribution, and
    the number is the KL along those.
    """
    ours, tokenizer = load_policy(policy)
    theirs, _ = load_policy(reference)
    ours, theirs = to_accelerator(ours), to_accelerator(theirs)
    samples = as_samples(tokenizer, rows)
    total = 0.0
    for start in range(0, len(samples), batch_size):
        total += float(exact_token_kl(ours, theirs, samples[start : start + batch_size]).sum())
    del ours, theirs
    free()
    return total / len(samples), len(samples)


def free() -> None:
    """Free the memory of deleted models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
