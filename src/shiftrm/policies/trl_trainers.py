"""TRL's policy trainers with our tokens and rewards.

Each is a thin subclass. In all of them, a gradient that is not finite stops the run before it
reaches the weights, dropout is off where TRL says so, telemetry is off, and TRL writes no model
card (the command writes its own).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head, use_adapter

from shiftrm.errors import UserError
from shiftrm.models.finite import require_finite_gradient
from shiftrm.models.rendering import encode_prompt, pin_template
from shiftrm.models.rope import LengthLimit, length_limit
from shiftrm.models.sampling import Sample, remember_stop_tokens
from shiftrm.policies.ppo_math import kl_and_entropy
from shiftrm.policies.ppo_passes import vocabulary_of
from shiftrm.policies.ppo_rows import LOGITS_AT_ONCE, Rows
from shiftrm.policies.text_rewards import GOLD_WORLD, TextReward
from shiftrm.policies.tokens import drop, encode_demonstration, encode_preference
from shiftrm.trainers.at_the_end import NoStepTooMany
from shiftrm.trainers.first_batch import switch_off_dropout
from shiftrm.trainers.pair_batches import without_added_nulls

__all__ = ["KL_ROWS", "DPOTrainer", "GRPOTrainer", "RLOOTrainer", "SFTTrainer"]

KL_ROWS = 32
"""Samples per process on which RLOO's and GRPO's KL is measured (two more passes)."""


class _Guarded(NoStepTooMany):
    """Behaviour shared by all policy trainers."""

    dropped: dict[str, int]
    """Number of dropped rows by reason."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm before an optimizer step; raise if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        require_finite_gradient(self, norm)
        return norm

    def _send_telemetry(self) -> None:
        """Do nothing: TRL would report that a trainer was made."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the command writes its own."""


class SFTTrainer(_Guarded, trl.SFTTrainer):
    """`trl.SFTTrainer` on `data.demonstrations` rows.

    The loss is on completions, or on every answer of the assistant. Rows longer than `max_length`
    are dropped and counted in `dropped`; nothing is truncated.
    """

    def __init__(self, model: Any, args: Any, **rest: Any) -> None:
        self.dropped, self._limit = {}, length_limit(model.config, args.max_length)
        if args.completion_only_loss is None:
            args.completion_only_loss = True  # not TRL's default for rows of messages
        super().__init__(model, args, **rest)
        remember_stop_tokens(self.model, self.processing_class)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, *rest: Any
    ) -> Dataset:
        rows = _Rows(
            "demonstrations",
            encode_demonstration,
            lambda row: len(row["input_ids"]),
            ("in which nothing is to be learnt", lambda row: any(row["completion_mask"])),
        )
        dataset, self.dropped = rows.encoded(dataset, processing_class, args, self._limit)
        return super()._prepare_dataset(dataset, processing_class, args, *rest)


class DPOTrainer(_Guarded, trl.DPOTrainer):
    """`trl.DPOTrainer` on `data.pairs` rows: drops and counts pairs longer than `max_length`.

    Args:
        reference: None for the policy as it is now.
    """

    def __init__(self, model: Any, reference: Any, args: Any, **rest: Any) -> None:
        self.dropped, self._limit = {}, length_limit(model.config, args.max_length)
        super().__init__(model, reference, args, **rest)
        remember_stop_tokens(self.model, self.processing_class)
        if args.disable_dropout:
            switch_off_dropout(self.model)
            if self.ref_model is not None:
                switch_off_dropout(self.ref_model)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        rows = _Rows(
            "pairs",
            encode_preference,
            lambda row: (
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            ),
            (
                "whose two sides are the same tokens",
                lambda row: row["chosen_ids"] != row["rejected_ids"],
            ),
        )
        dataset, self.dropped = rows.encoded(dataset, processing_class, args, self._limit)
        return dataset


@dataclass(frozen=True)
class _Rows:
    """How a trainer encodes its rows, and which it drops.

    Attributes:
        name: of the data, for messages.
        length: of an encoded row, in tokens.
        keep: a reason for dropping rows, and whether to keep an encoded row.
    """

    name: str
    encode: Callable[..., dict[str, list[int]]]
    length: Callable[[dict[str, Any]], int]
    keep: tuple[str, Callable[[dict[str, Any]], bool]]

    def encoded(
        self, dataset: Dataset, tokenizer: Any, args: Any, limit: LengthLimit
    ) -> tuple[Dataset, dict[str, int]]:
        """Encode rows and drop those that are too long; return the number dropped by reason."""
        pin_template(tokenizer)
        length, most = self.length, limit.tokens
        filters: dict[str, Any] = {}
        if most is not None:
            filters[limit.reason] = lambda row: length(row) <= most
        dataset = without_added_nulls(dataset)
        with PartialState().main_process_first():
            dataset = dataset.map(
                _encode_row,
                with_indices=True,
                fn_kwargs={"encode": self.encode, "tokenizer": tokenizer, "name": self.name},
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                desc=f"Tokenising {self.name}",
            ).with_format(None)  # what read the rows' columns has nothing left to read
            filters |= dict([self.keep])
            return drop(dataset, self.name, filters, advice=limit.advice)


def _encode_row(
    row: dict[str, Any], index: int, *, encode: Any, tokenizer: Any, name: str
) -> dict[str, list[int]]:
    try:
        return dict(encode(row, tokenizer))
    except UserError as error:
        raise UserError(f"{name}, row {index}: {error}") from None


class _SameOrder(TrainerCallback):
    """Keeps the order of prompts after an interruption; TRL's sampler would start over."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sampler.shuffle:
            for _epoch in range(int(state.epoch or 0)):  # the draws of earlier epochs
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)


class _Rewarded(_Guarded):
    """RLOO or GRPO with any text reward, any reference, and the sequence KL in the log.

    `sequence_kl` is `ppo_math.exact_token_kl` of at most `KL_ROWS` of the samples that a process
    draws at once, between the unmodified models. `sequence_kl_sampled` is the KL that TRL's loss
    penalises, in nats per response (TRL logs it per token, as `kl`). It is estimated from the
    sampled tokens with the sampling temperature applied to both models; top-p and penalties bias
    it, and it can be negative.

    Args:
        reference: the model to stay close to. None: with LoRA, the policy with its adapter off; no
            reference if `beta` is 0.
        reward_fn: a `rollouts.RewardFunction`: takes text, so the reward model may have another
            tokenizer. Its rewards are used unchanged.
        watch_fn: a second reward function; its rewards are logged with weight 0.
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
        rest |= {key: without_added_nulls(rest[key]) for key in rest if key.endswith("_dataset")}
        with _without_reference(args):
            super().__init__(model, rewarders, args, processing_class=tokenizer, **rest)
        # TRL knows the generation config's, but not the token that closes a turn of the template.
        self.eos_token_ids = remember_stop_tokens(self.model, tokenizer)
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
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self._placed(reference)
        if args.disable_dropout:
            switch_off_dropout(self.model)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return prompt tokens as `encode_prompt` makes them.

        TRL closes an answer that the prompt begins, and keeps the EOS that some tokenizers append
        to every text.
        """
        trained: Any = self
        tokenizer, options = trained.processing_class, trained.args.chat_template_kwargs or {}
        ids = [encode_prompt(tokenizer, prompt, template_options=options) for prompt in prompts]
        return ids, None, {}

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        self.add_callback(_SameOrder(sampler))
        return sampler

    def _placed(self, reference: Any) -> Any:
        """Place the reference on this process's device, sharded if the policy is."""
        from trl.models import prepare_deepspeed, prepare_fsdp

        accelerator = self.accelerator
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, accelerator)
        return accelerator.prepare_model(reference, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.beta != 0.0:
            self._log_sequence_kl(output)
        return output

    @torch.no_grad()
    def _log_sequence_kl(self, output: dict[str, Any]) -> None:
        model, accelerator = self.model, self.accelerator
        samples, counted = _samples(output, most=KL_ROWS)
        rows = Rows.pack(samples, device=accelerator.device)
        # The same on all processes: with sharded weights every pass is collective.
        fitting = torch.tensor([rows.within(LOGITS_AT_ONCE, vocabulary_of(model))])
        size = int(accelerator.gather(fitting.to(accelerator.device)).min())
        training, kl = model.training, []
        model.eval()
        try:
            for chunk in rows.chunks(size):
                with accelerator.autocast():
                    logits = chunk.logits(model)
                    with self._reference() as reference:
                        theirs = chunk.logits(reference)
                kl.append(chunk.spread(kl_and_entropy(logits, theirs)[0]).sum(dim=1))
        finally:
            model.train(training)
        weight = torch.tensor(counted, device=accelerator.device, dtype=torch.float32)
        local = torch.stack([(torch.cat(kl) * weight).sum(), weight.sum()])
        total, count = accelerator.reduce(local, reduction="sum")
        self._logged()["sequence_kl"].append(float(total / count.clamp(min=1.0)))

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """Context with TRL's reference: a model, or the policy with another adapter or none."""
        held, model = self.ref_model, self.model
        if held is not None:
            yield held
            return
        inner = self.accelerator.unwrap_model(model)
        with use_adapter(inner, adapter_name="ref" if "ref" in inner.peft_config else None):
            yield model

    def _log_sampled_kl(self, mask: Tensor) -> None:
        """Log TRL's `kl`, a mean over tokens, as `sequence_kl_sampled` in nats per sequence.

        Args:
            mask: tokens that the mean was taken over, shape [B, T].
        """
        local = torch.stack([mask.sum().float(), mask.any(dim=1).sum().float()])
        tokens, sequences = self.accelerator.reduce(local, reduction="sum")
        mean_tokens = float(tokens / sequences.clamp(min=1.0))
        metrics = self._logged()
        metrics["sequence_kl_sampled"].append(metrics.pop("kl")[-1] * mean_tokens)

    def _logged(self) -> dict[str, list[float]]:
        return self._metrics["train" if self.model.training else "eval"]


def _samples(output: dict[str, Any], *, most: int) -> tuple[list[Sample], list[bool]]:
    """Return at most `most` of TRL's rows, evenly spread, and whether TRL trains on each."""
    count = output["completion_ids"].shape[0]
    samples, counted = [], []
    for row in range(0, count, -(-count // most)):
        prompt, response = (
            output[f"{part}_ids"][row][output[f"{part}_mask"][row].bool()].tolist()
            for part in ("prompt", "completion")
        )
        counted.append(bool(response))
        # A fully masked row keeps its place, so that all processes make the same passes.
        samples.append(Sample(prompt, response or output["completion_ids"][row, :1].tolist(), True))
    return samples, counted


@contextmanager
def _without_reference(args: Any) -> Iterator[None]:
    """Context in which beta is 0, so that TRL does not load a reference of its own."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


class RLOOTrainer(_Rewarded, trl.RLOOTrainer):
    """`trl.RLOOTrainer`; its sampled KL is the mean of `sum_t log pi/pi_ref`."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.beta != 0.0:
            self._log_sampled_kl(output["completion_mask"])
        return output


class GRPOTrainer(_Rewarded, trl.GRPOTrainer):
    """`trl.GRPOTrainer`; its sampled KL is the mean of `sum_t (pi_ref/pi - 1 - log pi_ref/pi)`."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.beta != 0.0:
            self._log_sampled_kl(inputs["completion_mask"])
        return loss
