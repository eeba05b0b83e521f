"""Reward-model training: TRL's trainer, with shared prefixes, explicit positions and our losses."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor, nn
from transformers.trainer_utils import set_seed
from trl import RewardTrainer as TRLRewardTrainer
from trl.data_utils import get_dataset_column_names

from shiftrm.core.losses import reward_model_loss
from shiftrm.data.pairs import COLUMNS, WEIGHT, read_pairs
from shiftrm.errors import UserError
from shiftrm.models.finite import require_finite_gradient
from shiftrm.models.loading import (
    keep_pad_apart,
    known_tokens,
    load_reward_model,
    require_known_ids,
    require_words,
)
from shiftrm.models.rendering import end_at_closing, pin_template
from shiftrm.models.rewards import model_config, sequence_rewards
from shiftrm.models.rope import length_limit
from shiftrm.trainers.at_the_end import NoStepTooMany
from shiftrm.trainers.first_batch import inspect_model, switch_off_dropout
from shiftrm.trainers.machine import FitsMemory
from shiftrm.trainers.pair_batches import (
    COUNTED,
    PROMPT,
    ROW,
    CountsPairs,
    PairCollator,
    encode_pair,
    length_filters,
    shared_rows,
    table,
    without_added_nulls,
)
from shiftrm.trainers.pair_metrics import PairStatistics, like_trl
from shiftrm.trainers.quantised import restore_, trained_weights
from shiftrm.trainers.reward_configs import RewardConfig
from shiftrm.trainers.row_passes import RowPasses
from shiftrm.trainers.sharding import refuse_deepspeed, set_up_fsdp

__all__ = ["RewardConfig", "RewardTrainer", "read_dataset"]

logger = logging.getLogger(__name__)


class RewardTrainer(NoStepTooMany, RowPasses, CountsPairs, FitsMemory, TRLRewardTrainer):
    """`trl.RewardTrainer` with these differences; every argument keeps its meaning.

    - The common prefix of a pair's two sides is computed once (`shared_prefixes`). The first batch
      is also computed without sharing; if the states differ, sharing is off.
    - Rewards are read in fp32 at each sequence's last token, not at the last one that is not pad.
    - Text is tokenised by `shiftrm.models.rendering`, as in scoring. A chat template that asks for
      today's date gets a fixed day. A template that writes more after the token that closes an
      answer (ChatML's line break) is cut there. The template is saved in this form.
    - Pairs that are too long, or identical once tokenised, are dropped and counted in the log and
      in `dropped_pairs`. A row may say that a side was cut off by a length limit
      (`chosen_finished`, `rejected_finished`: false); it is then not closed with EOS.
    - `disable_dropout` (on by default) also covers the rates of attention modules.
    - A model given by name keeps its score head; one without gets a small one, seeded by `seed`.
    - Non-finite gradients stop the run before they reach the weights, and the message says where.
    - Additional metrics: std_reward, auc, ece, length_correlation. Aggregates are over all pairs
      and processes, also in evaluation, whatever the size of the last batch.
    - FSDP2 also runs on CPUs and saves complete models (`trainers/sharding.py`).
    - `predict` returns rewards of shape [B, 2], chosen and rejected, and
      `preprocess_logits_for_metrics` gets this shape; `compute_metrics` gets TRL's [2B, 1].
    - `train_dataset` and `eval_dataset` may also be names of files or hub data sets.
    - Every pair of an optimizer step counts once (`trainers/pair_batches.py`). If the data has a
      column `weight`, it is a factor of the pair's loss, in training and in evaluation.
    - Activation checkpointing is on if activations would not fit the memory (`RewardConfig`).
    """

    compute_metrics: Any

    @staticmethod
    def check_start(model: str) -> None:
        """Refuse early, before anything is loaded, a folder that this trainer cannot start from."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        *rest: Any,
        **keywords: Any,
    ) -> None:
        self.dropped_pairs: dict[str, dict[str, int]] = {}
        self._statistics = PairStatistics()
        self._inspected = False  # the model, on the first batch that is trained on
        self._suspects: list[Tensor] = []
        if args is None:
            name = model if isinstance(model, str) else model_config(model)._name_or_path
            args = RewardConfig(f"{name.rstrip('/').split('/')[-1]}-Reward")
        refuse_deepspeed(args)
        lora = keywords.get("peft_config") is not None or hasattr(model, "peft_config")
        if isinstance(args, RewardConfig) and lora:
            args.fit_lora()
        if isinstance(model, str):
            model = _load(model, args, keywords.pop("quantization_config", None))
        model_init_kwargs = args.model_init_kwargs
        args.model_init_kwargs = None  # already used; TRL would warn that it ignores them
        if args.torch_compile:
            raise UserError(
                "torch_compile=True: rewards are read by a hook, which torch.compile does not "
                "trace; leave it out, or compile the layers of the model before it is given here "
                "(docs/benchmarks.md has the gain)"
            )
        rest = tuple(map(read_dataset, rest))
        for name in ("train_dataset", "eval_dataset"):
            keywords |= {name: read_dataset(keywords[name])} if name in keywords else {}
        self._embeddings = known_tokens(model)
        self._limit = length_limit(model_config(model), args.max_length)
        before = trained_weights(model, lora=lora)
        super().__init__(model, args, data_collator, *rest, **keywords)
        restore_(self.model, before, sharded=self.is_fsdp_enabled)
        self._require_one_process()
        self.args.model_init_kwargs = model_init_kwargs
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError(
                "prompt tuning puts tokens of its own before the text, which moves the place where "
                "a reward is read; use LoRA"
            )
        self._keep_pad_apart_from_eos()
        if data_collator is None:
            multiple = self.args.pad_to_multiple_of
            self.data_collator = PairCollator(
                self.processing_class.pad_token_id, int(multiple) if multiple else None
            )
        if self.args.disable_dropout:
            switch_off_dropout(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Also set up FSDP2 on CPUs, where accelerate would run DDP instead."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_fsdp(self.accelerator, self.args.fsdp_plugin_args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary checkpoint folder with complete weights, even if they are sharded.

        Under FSDP2 with SHARDED_STATE_DICT, accelerate's default, transformers would save nothing.
        """
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
                weights = self.accelerator.get_state_dict(self.model)  # every process takes part
                self._save(output_dir or self.args.output_dir, state_dict=weights)
        super().save_model(output_dir, _internal_call)

    def _keep_pad_apart_from_eos(self) -> None:
        """Choose a pad token other than EOS, for users of the saved model.

        Our positions are explicit, but transformers' pooling would read the token before the one
        that was trained (`keep_pad_apart`). pad == EOS is TRL's choice for a tokenizer without pad.
        """
        tokenizer = self.processing_class
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            return
        if not self.args.pad_token and keep_pad_apart(tokenizer):
            config = self.accelerator.unwrap_model(self.model).config
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
            return
        logger.warning(
            "pad and EOS are the same token (%s): libraries that pool by themselves will read the "
            "reward before it, where nothing was trained; give pad_token=... another token",
            tokenizer.eos_token,
        )

    def _send_telemetry(self) -> None:
        """Do nothing; TRL's method reports the use of a trainer to its makers."""

    # -- loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        losses, rewards, lengths = self._pair_losses(model, inputs)
        counted = inputs.get(COUNTED)
        gather = self.accelerator.gather
        if counted is None:  # evaluation: its batches are not fetched ahead, so accelerate knows
            counted, gather = torch.ones_like(losses), self.accelerator.gather_for_metrics
        if self.model.training:
            tokens = self.accelerator.gather((lengths * counted[:, None]).sum()).sum()
            self._total_train_tokens += int(tokens) // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            if ROW in inputs:
                self._suspects.append(torch.where(losses.detach().isfinite(), -1, inputs[ROW]))
        prompts = inputs.get(PROMPT, torch.full_like(losses, -1))
        self._statistics.add(rewards, lengths, losses, prompts, counted, gather)
        loss = self._share_of_step(losses, inputs)
        return (loss, {"logits": rewards}) if return_outputs else loss

    def _pair_losses(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each pair's loss [B], and rewards and token lengths of its sequences, [B, 2]."""
        self._inspect_once(model, inputs)
        rewards, lengths = self._pair_rewards(model, inputs)
        chosen, rejected = rewards.unbind(1)
        losses = self._reward_losses(chosen, rejected, inputs)
        return losses, rewards, lengths

    def _reward_losses(
        self, chosen: Tensor, rejected: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss of each pair from its rewards, [B]."""
        return reward_model_loss(
            chosen,
            rejected,
            margin=inputs.get("margin"),
            weight=inputs.get(WEIGHT),
            centring=self.args.center_rewards_coefficient,
        )

    def _inspect_once(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Check the model on the first batch that is trained on."""
        if self.model.training and not self._inspected:
            args = self.args
            quiet = args.disable_dropout and not args.neftune_noise_alpha
            inspect_model(model, inputs, quiet=quiet)
            self._inspected = True

    def _pair_rewards(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the rewards and token lengths of the pairs' sequences, [B, 2]."""
        if "segment_ids" in inputs:
            rows = shared_rows(inputs)
            return self._group_rewards(model, rows), rows.sequence_lengths
        # a user's collator: TRL's batches, the chosen sequences and then the rejected
        mask = inputs["attention_mask"]
        rewards = sequence_rewards(model, inputs["input_ids"], mask).view(2, -1).T
        return rewards, mask.sum(1).view(2, -1).T

    # -- stopping before the weights are spoiled -----------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stop at a non-finite gradient norm; called before every optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        suspects, self._suspects = self._suspects, []

        def culprits() -> str:
            rows = [int(i) for part in suspects for i in part if i >= 0]
            named = ", ".join(map(str, rows[:8])) + (" and others" if len(rows) > 8 else "")
            return f" (the loss of train rows {named} is not)" if rows else ""

        require_finite_gradient(
            self,
            norm,
            found=culprits,
            advice="Look at these rows, lower learning_rate or set max_grad_norm",
        )
        return norm

    # -- logging -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            seen = self._statistics.take()
            if "loss" not in logs:  # the summary of a run
                seen.pop("loss", None)
            logs.update(seen)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in Trainer, with aggregates over all pairs instead of means of batches."""
        held, self._statistics = self._statistics, PairStatistics()
        theirs = self.compute_metrics
        if theirs is not None:
            self.compute_metrics = like_trl(theirs, self.args.per_device_eval_batch_size)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = {"num_tokens": self._total_train_tokens}
            found |= self._statistics.take(intervals=True)
            output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in found.items()})
        finally:
            self._statistics, self.compute_metrics = held, theirs
        return output

    # -- data --------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = [name for name in (ROW, PROMPT, WEIGHT) if name not in self._signature_columns]
        self._signature_columns += own

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        pin_template(processing_class)
        end_at_closing(processing_class)
        require_words(processing_class, processing_class.name_or_path or "the model")
        in_memory = isinstance(dataset, Dataset)  # a stream takes neither num_proc nor desc
        if in_memory and len(dataset) == 0:
            raise UserError(f"the {dataset_name} data set is empty; there is nothing to learn from")

        def options(what: str) -> dict[str, Any]:
            if not in_memory:
                return {}
            return {"num_proc": args.dataset_num_proc, "desc": f"{what} {dataset_name} pairs"}

        with PartialState().main_process_first():
            columns = get_dataset_column_names(dataset)
            if "chosen_ids" not in columns and "chosen_input_ids" in columns:  # TRL's former names
                for side in ("chosen", "rejected"):
                    dataset = dataset.rename_column(f"{side}_input_ids", f"{side}_ids")
            elif "chosen_ids" not in columns:
                dataset = dataset.map(
                    encode_pair,
                    with_indices=True,
                    fn_kwargs={"tokenizer": processing_class, "name": dataset_name},
                    **options("Tokenising"),
                )
            self._require_known_ids(dataset, dataset_name, in_memory=in_memory)
            counts = {}
            for reason, keep in length_filters(self._limit).items():
                before = len(dataset) if in_memory else 0
                dataset = dataset.filter(keep, **options("Filtering"))
                counts[reason] = before - len(dataset) if in_memory else 0
        left = len(dataset) if in_memory else None
        self._report_dropped(dataset_name, counts, left)
        return dataset

    def _require_known_ids(self, dataset: Any, name: str, *, in_memory: bool) -> None:
        """Refuse tokens without an embedding; in a stream the model itself will fail."""
        if in_memory:
            for side in ("chosen_ids", "rejected_ids"):
                for ids in dataset.with_format("arrow", columns=[side]).iter(1000):
                    flat = ids[side].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                    ends = (flat.min(), flat.max()) if len(flat) else ()
                    require_known_ids(ends, self._embeddings, name=f"{name} data: {side}")

    def _report_dropped(self, name: str, counts: dict[str, int], left: int | None) -> None:
        self.dropped_pairs[name] = counts
        for reason, count in counts.items():
            if count:
                logger.warning("%s data: dropped %d pairs %s; %s left", name, count, reason, left)
        if left == 0:
            raise UserError(
                f"no pair of the {name} data is left after dropping "
                f"{', '.join(f'{c} {r}' for r, c in counts.items())}; {self._limit.advice}"
            )


def read_dataset(given: Any) -> Any:
    """Return the pairs of a source (`data.sources`) or data set, or of several by name."""
    if isinstance(given, Mapping):
        read = {name: read_dataset(value) for name, value in given.items()}
        return DatasetDict(read) if isinstance(given, DatasetDict) else read
    if isinstance(given, str | Path):
        return table(str(given), read_pairs(given), COLUMNS)
    return without_added_nulls(given)


def _load(path: str, args: Any, quantization_config: Any) -> Any:
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    set_seed(args.seed)  # as in TRL, for any other weights missing from the checkpoint
    return load_reward_model(path, seed=args.seed, **options)
