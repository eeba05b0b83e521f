"""Meta-test: guide a policy in an unseen domain by a frozen reward model, and measure the result.

There are three methods, all starting from the reference policy: reward-weighted fine-tuning on the
domain's data, and PPO or RLOO (`oodpl.rloo`) with a KL penalty on its prompts. The paper (Jia,
arXiv 2402.14760) says "regularised policy optimization with the learned reward model"; the methods
and the judges are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from shiftrm.data.domains import Domain
from shiftrm.data.prompt_keys import prompt_key
from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.rendering import Text
from shiftrm.models.sampling import Draws, SamplingConfig, as_samples, sample_rows
from shiftrm.models.scoring import score_rows
from shiftrm.oodpl.fine_tuning import FineTuningConfig, FineTuningLog, fine_tune
from shiftrm.oodpl.preference import preference_accuracy, sampled_kl
from shiftrm.policies.ppo import PPOTrainer, Problem, RewardFunction, StepLog, make_critic
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.text_rewards import reward_scale

if TYPE_CHECKING:
    from shiftrm.oodpl.rloo import RLOOSettings

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "evaluate_policy",
    "guide_by_ppo",
    "guide_by_weights",
    "support_prompts",
    "with_scale",
]

Scaled = TypeVar("Scaled", PPOConfig, "RLOOSettings")
"""Settings with a reward's mean and standard deviation, `sampling` and `seed`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is measured in a domain."""

    responses_per_prompt: int = 8
    pairs: int = 256
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("responses_per_prompt", "pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a policy in a domain.

    Attributes:
        numbers: `accuracy_sum`, `accuracy_mean` (A_PL, log pi the sum over tokens as in the paper,
            or their mean), `judged` (mean reward under the judge), `proxy` (under the reward model
            that guided it), `kl` to the reference in nats, `length_mean` in tokens,
            `truncated_share`. Unavailable measurements are left out.
        rows: the sampled responses, `{"prompt", "responses", "finished", "judged"?}`.
        pairs, responses: how many the numbers are based on.
    """

    numbers: dict[str, float]
    rows: list[Row]
    pairs: int
    responses: int


def guide_by_weights(
    policy: Any,
    tokenizer: Any,
    domain: Domain,
    config: FineTuningConfig,
    *,
    reward_fn: RewardFunction | None,
    on_step: Callable[[FineTuningLog], None] | None = None,
) -> None:
    """Fine-tune on the domain's support in place, weighted by `reward_fn` if given."""
    try:
        fine_tune(policy, tokenizer, domain.support, config, reward_fn=reward_fn, on_step=on_step)
    except UserError as error:
        raise UserError(f"domain {domain.name!r}: {error}") from None


def guide_by_ppo(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    domain: Domain,
    config: PPOConfig,
    *,
    reward_fn: RewardFunction,
    on_step: Callable[[StepLog], None] | None = None,
) -> None:
    """Run PPO with KL to the reference on the prompts of the domain's support, in place.

    Rewards are standardised, see `with_scale`. The evaluation prompts are not used.
    """
    prompts = support_prompts(domain)
    config = with_scale(
        config, reference, tokenizer, prompts, reward_fn, batch_size=config.forward_batch_size
    )

    def report(log: StepLog, _: Any) -> None:
        if on_step is not None:
            on_step(log)

    try:
        problem = Problem(policy, reference, tokenizer, prompts, reward_fn)
        PPOTrainer(problem, make_critic(policy), config, on_step=report).train()
    except UserError as error:
        raise UserError(f"domain {domain.name!r}: {error}") from None


def support_prompts(domain: Domain) -> list[Text]:
    """Return the distinct prompts of the domain's support."""
    return list({prompt_key(row["prompt"]): row["prompt"] for row in domain.support}.values())


def with_scale(
    config: Scaled,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    reward_fn: RewardFunction,
    *,
    batch_size: int,
) -> Scaled:
    """Fill in unset `reward_mean` and `reward_std` from the reference's responses.

    A KL coefficient then means the same under any reward model.
    """
    if config.reward_mean is not None and config.reward_std is not None:
        return config
    mean, std = reward_scale(
        reference,
        tokenizer,
        prompts,
        reward_fn=reward_fn,
        sampling=config.sampling,
        batch_size=batch_size,
        seed=config.seed,
    )
    return replace(
        config,
        reward_mean=mean if config.reward_mean is None else config.reward_mean,
        reward_std=std if config.reward_std is None else config.reward_std,
    )


def evaluate_policy(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    domain: Domain,
    config: EvaluationConfig,
    *,
    judge: RewardFunction | None = None,
    proxy: RewardFunction | None = None,
) -> Evaluation:
    """Measure a policy on a domain's evaluation pairs and prompts.

    Args:
        judge: the gold reward if there is one, or a reward model used only for evaluation.
        proxy: the reward model that guided the policy.

    Raises:
        UserError: the domain has neither evaluation pairs nor prompts, or has a pair that
            `preference_accuracy` refuses.
    """
    pairs = domain.eval_pairs[: config.pairs]
    if not pairs and not domain.prompts:
        raise UserError(
            f"domain {domain.name!r}: neither eval_pairs.jsonl nor prompts.jsonl to measure on"
        )
    numbers: dict[str, float] = {}
    for reduction in ("sum", "mean") if pairs else ():
        try:
            found = preference_accuracy(
                policy, tokenizer, pairs, reduction=reduction, batch_size=2 * config.batch_size
            )
        except UserError as error:
            raise UserError(f"domain {domain.name!r}, eval_pairs.jsonl: {error}") from None
        numbers[f"accuracy_{reduction}"] = found.accuracy
        numbers[f"pl_loss_{reduction}"] = found.loss
    rows: list[Row] = []
    if domain.prompts:
        rows = sample_rows(
            policy,
            tokenizer,
            list(domain.prompts),
            Draws(
                config.sampling,
                config.responses_per_prompt,
                batch_size=config.batch_size,
                seed=config.seed,
            ),
        )
        numbers |= _of_responses(policy, reference, tokenizer, rows, judge, proxy)
    return Evaluation(numbers, rows, len(pairs), sum(len(row["responses"]) for row in rows))


def _of_responses(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    rows: list[Row],
    judge: RewardFunction | None,
    proxy: RewardFunction | None,
) -> dict[str, float]:
    samples = as_samples(tokenizer, rows)
    n = len(samples)
    numbers = {
        "kl": sampled_kl(policy, reference, samples),
        "length_mean": sum(len(s.response_ids) for s in samples) / n,
        "truncated_share": sum(not s.finished for s in samples) / n,
    }
    if judge is not None:
        judged = _score(judge, rows)
        numbers["judged"] = sum(judged) / n
        left = iter(judged)
        for row in rows:
            row["judged"] = [round(next(left), 6) for _ in row["responses"]]
    if proxy is not None:
        numbers["proxy"] = sum(_score(proxy, rows)) / n
    return numbers


def _score(reward_fn: RewardFunction, rows: Sequence[Row]) -> list[float]:
    return [reward for group in score_rows(reward_fn, rows) for reward in group]
