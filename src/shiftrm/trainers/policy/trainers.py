"""TRL's trainers of policies as this project uses them: our tokens, our reward, nothing silent.

Each is a thin subclass; what they share: a gradient that is not finite stops the run before it
reaches the weights, dropout is off where TRL says so, nothing is reported to TRL's makers, and TRL
writes no model card (the command writes its own).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from shiftrm.rendering import pin_template
from shiftrm.sampling import remember_stop_tokens
from shiftrm.trainers.finite import require_finite_gradient
from shiftrm.trainers.policy.text_reward import TextReward
from shiftrm.trainers.policy.tokens import drop, encode_demonstration, encode_preference
from shiftrm.trainers.policy.watch import GOLD_WORLD
from shiftrm.trainers.reward import switch_off_dropout

__all__ = ["DPOTrainer", "GRPOTrainer", "RLOOTrainer", "SFTTrainer"]


class _Guarded:
    """What every policy trainer does in the same way."""

    dropped: dict[str, int]
    """Rows that were left out, by reason."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before every optimizer step: a norm that is not finite must not become weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        require_finite_gradient(self, norm)
        return norm

    def _send_telemetry(self) -> None:
        """TRL reports to its makers that a trainer was made; ours does not."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The command writes its own."""


class SFTTrainer(_Guarded, trl.SFTTrainer):
    """`trl.SFTTrainer` on `data.demonstrations` rows.

    The loss is on completions, or on every answer of the assistant. Rows longer than `max_length`
    are dropped and counted in `dropped`; nothing is truncated.
    """

    def __init__(self, model: Any, args: Any, **rest: Any) -> None:
        self.dropped, self._context = {}, _context(model)
        if args.completion_only_loss is None:
            args.completion_only_loss = True  # TRL would not, for rows of messages
        super().__init__(model, args, **rest)
        remember_stop_tokens(self.model, self.processing_class)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, *rest: Any
    ) -> Dataset:
        dataset, self.dropped = _encoded(
            dataset,
            processing_class,
            encode_demonstration,
            "demonstrations",
            args,
            context=self._context,
            length=lambda row: len(row["input_ids"]),
            more={"in which nothing is to be learnt": lambda row: any(row["completion_mask"])},
        )
        return super()._prepare_dataset(dataset, processing_class, args, *rest)


class DPOTrainer(_Guarded, trl.DPOTrainer):
    """`trl.DPOTrainer` on `data.pairs` rows: pairs longer than `max_length` are dropped, counted.

    Args:
        reference: None for the policy as it is now.
    """

    def __init__(self, model: Any, reference: Any, args: Any, **rest: Any) -> None:
        self.dropped, self._context = {}, _context(model)
        super().__init__(model, reference, args, **rest)
        remember_stop_tokens(self.model, self.processing_class)
        if args.disable_dropout:
            switch_off_dropout(self.model)
            if self.ref_model is not None:
                switch_off_dropout(self.ref_model)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        dataset, self.dropped = _encoded(
            dataset,
            processing_class,
            encode_preference,
            "pairs",
            args,
            context=self._context,
            length=lambda row: (
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            ),
            more={
                "whose two sides are the same tokens": lambda row: (
                    row["chosen_ids"] != row["rejected_ids"]
                )
            },
        )
        return dataset


def _context(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _encoded(
    dataset: Dataset,
    tokenizer: Any,
    encode: Callable[..., dict[str, list[int]]],
    name: str,
    args: Any,
    *,
    context: int | None,
    length: Callable[[dict[str, Any]], int],
    more: dict[str, Any],
) -> tuple[Dataset, dict[str, int]]:
    """Rows as tokens without those that are too long, and how many were dropped, by reason."""
    pin_template(tokenizer)
    with PartialState().main_process_first():
        dataset = dataset.map(
            encode,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenising {name}",
        )
        filters = {}
        limit = args.max_length
        if limit is not None:
            filters[f"longer than max_length={limit} tokens"] = lambda row: length(row) <= limit
        if context is not None and (limit is None or limit > context):
            reason = f"longer than the model's context of {context} tokens"
            filters[reason] = lambda row: length(row) <= context
        return drop(dataset, name, filters | more, advice="raise max_length")


class _SameOrder(TrainerCallback):
    """Prompts in the same order after an interruption: TRL's sampler would begin anew."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sampler.shuffle:
            for _epoch in range(int(state.epoch or 0)):  # the draws of those before
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)


class _Rewarded(_Guarded):
    """RLOO or GRPO with any text reward, any reference, and the sequence KL in the log.

    The KL is between the distributions that are sampled: with another temperature than 1, both
    models' are tempered.

    Args:
        reference: a model to stay close to, or None: the base model with the adapter off under
            LoRA, nothing where `beta` is 0.
        reward_fn: text in, so the reward model may have another tokenizer, see
            `trainers.ppo.RewardFunction`. Its rewards are used as they are.
        watch_fn: the like; its rewards are logged and have weight 0.
    """

    def __init__(
        self,
        model: Any,
        reference: Any,
        args: Any,
        *,
        reward_fn: Any,
        tokenizer: Any,
        watch_fn: Any = None,
        **rest: Any,
    ) -> None:
        self.dropped = {}
        rewarders = [TextReward(reward_fn, tokenizer, args.chat_template_kwargs or {})]
        if watch_fn is not None:
            rewarders.append(TextReward(watch_fn, tokenizer, args.chat_template_kwargs or {}))
            rewarders[1].__name__ = GOLD_WORLD
            args.reward_weights = [1.0, 0.0]
        with _without_reference(args):
            super().__init__(  # type: ignore[call-arg]
                model, rewarders, args, processing_class=tokenizer, **rest
            )
        # TRL knows the generation config's, but not the token that closes a turn of the template.
        self.eos_token_ids = remember_stop_tokens(self.model, tokenizer)  # type: ignore[attr-defined]
        if not args.use_vllm:
            drawing: Any = self
            drawing.generation_config.eos_token_id = self.eos_token_ids
            drawing.generation_kwargs["eos_token_id"] = self.eos_token_ids
        for rewarder in rewarders:
            rewarder.stop = self.eos_token_ids
        self.beta = args.beta
        if reference is not None and self.beta != 0.0:
            if args.disable_dropout:
                switch_off_dropout(reference)
            add_fused_lm_head(reference, temperature=self.temperature)  # type: ignore[attr-defined]
            self.ref_model = self._placed(reference)
        if args.disable_dropout:
            switch_off_dropout(self.model)  # type: ignore[attr-defined]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        self.add_callback(_SameOrder(sampler))  # type: ignore[attr-defined]
        return sampler

    def _placed(self, reference: Any) -> Any:
        """On this process's device, sharded where the policy is."""
        from trl.models import prepare_deepspeed, prepare_fsdp

        accelerator = self.accelerator  # type: ignore[attr-defined]
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return prepare_deepspeed(reference, accelerator)
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            return prepare_fsdp(reference, accelerator)
        return accelerator.prepare_model(reference, evaluation_mode=True)

    def _log_sequence_kl(self, mask: Tensor) -> None:
        """Nats a sequence, from TRL's `kl`, which is a mean over tokens.

        Args:
            mask: of the tokens that the mean was taken over, shape [B, T].
        """
        metrics = self._metrics["train" if self.model.training else "eval"]  # type: ignore[attr-defined]
        local = torch.stack([mask.sum().float(), mask.any(dim=1).sum().float()])
        tokens, sequences = self.accelerator.reduce(local, reduction="sum")  # type: ignore[attr-defined]
        mean_tokens = float(tokens / sequences.clamp(min=1.0))
        metrics["sequence_kl"].append(metrics["kl"][-1] * mean_tokens)


@contextmanager
def _without_reference(args: Any) -> Iterator[None]:
    """Meanwhile beta is 0, with which TRL loads no reference of its own: it is given to us."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


class RLOOTrainer(_Rewarded, trl.RLOOTrainer):
    """`trl.RLOOTrainer`; `sequence_kl` is the mean of `sum_t log pi/pi_ref` over the samples."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.beta != 0.0:
            self._log_sequence_kl(output["completion_mask"])
        return output


class GRPOTrainer(_Rewarded, trl.GRPOTrainer):
    """`trl.GRPOTrainer`; `sequence_kl` is the mean of `sum_t (pi_ref/pi - 1 - log pi_ref/pi)`."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.beta != 0.0:
            self._log_sequence_kl(inputs["completion_mask"])
        return loss
