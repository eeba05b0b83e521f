"""Meta-test by RLOO: TRL's trainer with a frozen reward model and KL to the reference.

RLOO (Ahmadian et al., arXiv 2402.14740) uses the other responses to a prompt as each response's
baseline, so it needs no critic; the KL penalty is part of a sequence's reward.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from shiftrm.data.domains import Domain
from shiftrm.errors import UserError
from shiftrm.models.rendering import Text, encode_prompt
from shiftrm.models.responses import Response
from shiftrm.models.reward_functions import rewards_of
from shiftrm.models.sampling import SamplingConfig, check_prompt_lengths
from shiftrm.oodpl.meta_test import support_prompts, with_scale
from shiftrm.policies.configs import RLOOConfig
from shiftrm.policies.ppo import RewardFunction
from shiftrm.policies.trl_trainers import RLOOTrainer

__all__ = ["RLOOLog", "RLOOSettings", "guide_by_rloo"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RLOOSettings:
    """Settings of `guide_by_rloo`; settings shared with PPO are named as in `PPOConfig`."""

    steps: int = _option(100, "batches of roll-outs")
    prompts_per_step: int = _option(16, "prompts of one batch")
    rollouts_per_prompt: int = _option(16, "responses sampled to each prompt, 2 at least")
    minibatch_size: int = _option(64, "sequences in one optimizer step; divides a batch")
    learning_rate: float = _option(1e-6, "falls linearly to 0")
    kl_coefficient: float = _option(0.05, "KL penalty, reward per nat of a sequence")
    reward_mean: float | None = _option(None, "subtracted from every reward; None: measured")
    reward_std: float | None = _option(None, "then every reward is divided by it; None: measured")
    truncation_penalty: float = _option(0.0, "then taken from responses cut off by the limit")
    clip_ratio: float = _option(0.2, "probability ratios of sequences are clipped to 1 +- this")
    normalize_advantages: bool = _option(False, "advantages to mean 0, variance 1 over the batch")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    bf16: bool = _option(False, "passes in bf16 on fp32 weights")
    sampling: SamplingConfig = field(
        default_factory=SamplingConfig, metadata={"help": "how roll-outs are drawn"}
    )
    seed: int = _option(0, "decides prompts and samples")

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("prompts_per_step", 1),
            ("rollouts_per_prompt", 2),
            ("minibatch_size", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "clip_ratio", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("kl_coefficient", "truncation_penalty"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.reward_std is not None and not self.reward_std > 0:
            raise UserError(f"reward_std is {self.reward_std}; it must be above 0, or None")
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option.name} is {value}; it must be finite")
        batch = self.prompts_per_step * self.rollouts_per_prompt
        if batch % self.minibatch_size:
            raise UserError(
                f"minibatch_size is {self.minibatch_size}; it must divide the {batch} sequences of "
                "a step (prompts_per_step x rollouts_per_prompt)"
            )


@dataclass(frozen=True)
class RLOOLog:
    """One batch of roll-outs.

    Attributes:
        step: from 1.
        score_mean: raw reward.
        kl: sequence KL to the reference in nats, as `StepLog.kl` (on some of the roll-outs); None
            if kl_coefficient is 0, where the reference is not evaluated.
    """

    step: int
    score_mean: float
    kl: float | None


def guide_by_rloo(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    domain: Domain,
    config: RLOOSettings,
    *,
    reward_fn: RewardFunction,
    on_step: Callable[[RLOOLog], None] | None = None,
) -> None:
    """Run RLOO with KL to the reference on the prompts of the domain's support, in place.

    Rewards are standardised as for `guide_by_ppo`: by mean and standard deviation over the
    reference's responses, unless the configuration sets them. Evaluation prompts are not used.

    Raises:
        UserError: a reward or gradient that is not finite, a prompt that leaves no room for a
            response; names the domain.
    """
    prompts = support_prompts(domain)
    try:
        check_prompt_lengths(
            [encode_prompt(tokenizer, prompt) for prompt in prompts],
            policy.config.get_text_config(),
            config.sampling.max_new_tokens,
        )
        scaled = with_scale(
            config, reference, tokenizer, prompts, reward_fn, batch_size=config.minibatch_size
        )
        _train(policy, reference, tokenizer, prompts, scaled, reward_fn, on_step)
    except UserError as error:
        raise UserError(f"domain {domain.name!r}: {error}") from None


def _train(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    config: RLOOSettings,
    reward_fn: RewardFunction,
    on_step: Callable[[RLOOLog], None] | None,
) -> None:
    # TRL draws full batches of different prompts; with too few, repeat every prompt.
    copies = -(-config.prompts_per_step // len(prompts))
    reward = _Standardised(reward_fn, config)
    own_forwards = [model.__dict__.get("forward") for model in (policy, reference)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            policy,
            reference,
            _arguments(config, policy, Path(folder)),
            reward_fn=reward,
            tokenizer=tokenizer,
            train_dataset=_table(list(prompts) * copies),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Reporting(reward, on_step))
        trainer.train()
    policy.zero_grad(set_to_none=True)
    for model, own in zip((policy, reference), own_forwards, strict=True):
        _give_back(model, own)


def _table(prompts: Sequence[Text]) -> Dataset:
    """Return the prompts as a data set, which stores only their numbers.

    A column of Arrow's cannot hold strings beside chats, nor lone surrogates.
    """

    def read(batch: dict[str, list[int]]) -> dict[str, list[Text]]:
        return {"prompt": [prompts[number] for number in batch["number"]]}

    return Dataset.from_dict({"number": list(range(len(prompts)))}).with_transform(read)


def _arguments(config: RLOOSettings, policy: Any, folder: Path) -> RLOOConfig:
    batch = config.prompts_per_step * config.rollouts_per_prompt
    updates = batch // config.minibatch_size
    sampling = config.sampling
    return RLOOConfig(
        output_dir=str(folder),
        max_steps=config.steps * updates,
        per_device_train_batch_size=config.minibatch_size,
        generation_batch_size=batch,
        num_generations=config.rollouts_per_prompt,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        beta=config.kl_coefficient,
        epsilon=config.clip_ratio,
        normalize_advantages=config.normalize_advantages,
        max_grad_norm=config.max_grad_norm,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        disable_dropout=True,
        logging_steps=updates,
        seed=config.seed % 2**32,
        bf16=config.bf16,
        activation_checkpointing=False,
        use_cpu=next(policy.parameters()).device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _Standardised:
    """`(reward - reward_mean) / reward_std`, minus a penalty for truncated responses.

    Attributes:
        raw_mean: mean raw reward of the last batch.
    """

    def __init__(self, reward_fn: RewardFunction, config: RLOOSettings) -> None:
        self._reward_fn, self._config = reward_fn, config
        self.raw_mean = math.nan

    def __call__(
        self, prompts: list[Text], responses: list[str], /, *, finished: list[bool]
    ) -> list[float]:
        return self.score(list(map(Response, prompts, responses, finished)))

    def score(self, responses: Sequence[Response], /) -> list[float]:
        """Score the sampled tokens if the reward function reads tokens."""
        config = self._config
        mean, std = config.reward_mean or 0.0, config.reward_std or 1.0
        raw = rewards_of(self._reward_fn, responses)
        self.raw_mean = sum(raw) / len(raw)
        return [
            (reward - mean) / std - (0.0 if response.finished else config.truncation_penalty)
            for reward, response in zip(raw, responses, strict=True)
        ]


class _Reporting(TrainerCallback):
    """Turn TRL's log of a batch into an `RLOOLog`."""

    def __init__(self, reward: _Standardised, on_step: Callable[[RLOOLog], None] | None) -> None:
        self._reward, self._on_step, self._step = reward, on_step, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._on_step is None or "reward" not in (logs or {}):
            return
        self._step += 1
        self._on_step(RLOOLog(self._step, self._reward.raw_mean, logs.get("sequence_kl")))


def _give_back(model: torch.nn.Module, own_forward: Any) -> None:
    """Restore the forward pass that TRL replaced."""
    model.eval()
    if own_forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = own_forward
