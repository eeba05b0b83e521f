"""Reward-model training: TRL's trainer, with rewards read where they stand and our losses."""

import json
import logging
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from trl import RewardConfig
from trl import RewardTrainer as TRLRewardTrainer

from shiftrm.data.pairs import check_pair
from shiftrm.errors import UserError
from shiftrm.losses import bradley_terry_loss
from shiftrm.rendering import encode
from shiftrm.scoring import sequence_rewards
from shiftrm.trainers.sharding import set_up_fsdp

logger = logging.getLogger(__name__)


class RewardTrainer(TRLRewardTrainer):
    """`trl.RewardTrainer` with four differences; every argument keeps its meaning.

    - Rewards are read in fp32 at the last token the attention mask marks, not at the last token
      that differs from pad.
    - Text becomes tokens through `shiftrm.rendering`, the same function that scoring uses.
    - Pairs that are too long, or identical once tokenised, are dropped and counted in the log and
      in `dropped_pairs`. A row may say that a side was cut off by a length limit
      (`chosen_finished`, `rejected_finished`: false); it is then not closed with EOS.
    - `disable_dropout` (on by default) reaches the attention modules' own rates, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.dropped_pairs: dict[str, dict[str, int]] = {}
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            switch_off_dropout(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """With FSDP2 on CPUs, too, where accelerate would run DDP instead."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_fsdp(self.accelerator, self.args.fsdp_plugin_args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """One ordinary checkpoint folder, whole also where parameters are sharded.

        Under FSDP2 with SHARDED_STATE_DICT, accelerate's default, transformers would write none.
        """
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
                weights = self.accelerator.get_state_dict(self.model)  # every process takes part
                self._save(output_dir or self.args.output_dir, state_dict=weights)
        super().save_model(output_dir, _internal_call)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, rewards = self._pair_loss(model, inputs)
        self._record_pair_metrics(inputs, rewards)
        return (loss, {"logits": rewards}) if return_outputs else loss

    def _pair_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss of a micro-batch, and its rewards: the chosen's, then the rejected's, [2B]."""
        rewards = sequence_rewards(model, inputs["input_ids"], inputs["attention_mask"])
        chosen, rejected = rewards.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, margin=inputs.get("margin")).mean()  # Eq. 1
        if self.args.center_rewards_coefficient is not None:
            # Eisenstein et al., arXiv 2312.09244, Eq. 2, as in TRL.
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected).pow(2).mean()
        return loss, rewards

    @torch.no_grad()
    def _record_pair_metrics(self, inputs: dict[str, Tensor], rewards: Tensor) -> None:
        """TRL's training metrics under TRL's names."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = rewards.detach().chunk(2)
        everything = self.accelerator.gather(rewards.detach())
        metrics["min_reward"].append(everything.min().item())
        metrics["mean_reward"].append(everything.mean().item())
        metrics["max_reward"].append(everything.max().item())
        difference = self.accelerator.gather_for_metrics(chosen - rejected)
        metrics["accuracy"].append((difference > 0).float().mean().item())
        metrics["margin"].append(difference.mean().item())

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = dataset.column_names or []
        if "chosen_ids" in columns or "chosen_input_ids" in columns:  # tokenised: TRL's filter
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise UserError(f"the {dataset_name} data set is empty; there is nothing to learn from")
        in_memory = isinstance(dataset, Dataset)  # a stream takes neither num_proc nor desc

        def options(what: str) -> dict[str, Any]:
            if not in_memory:
                return {}
            return {"num_proc": args.dataset_num_proc, "desc": f"{what} {dataset_name} pairs"}

        with PartialState().main_process_first():
            dataset = dataset.map(
                _encode_pair,
                with_indices=True,
                fn_kwargs={"tokenizer": processing_class, "name": dataset_name},
                **options("Tokenising"),
            )
            counts = {}
            for reason, keep in _filters(args.max_length).items():
                before = len(dataset) if in_memory else 0
                dataset = dataset.filter(keep, **options("Filtering"))
                counts[reason] = before - len(dataset) if in_memory else 0
        self._report_dropped(dataset_name, counts, len(dataset) if in_memory else None)
        return dataset

    def _report_dropped(self, name: str, counts: dict[str, int], left: int | None) -> None:
        self.dropped_pairs[name] = counts
        for reason, count in counts.items():
            if count:
                logger.warning("%s data: dropped %d pairs %s; %s left", name, count, reason, left)
        if left == 0:
            raise UserError(
                f"no pair of the {name} data is left after dropping "
                f"{', '.join(f'{c} {r}' for r, c in counts.items())}; raise max_length"
            )


def _encode_pair(row: dict[str, Any], index: int, tokenizer: Any, name: str) -> dict[str, Any]:
    check_pair(row, f"{name} data, row {index}")
    tools = row.get("tools")
    template_options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    return {
        f"{side}_ids": encode(
            tokenizer,
            row.get("prompt"),
            row[side],
            finished=row.get(f"{side}_finished", True),
            template_options=template_options,
        )
        for side in ("chosen", "rejected")
    }


def _filters(max_length: int | None) -> dict[str, Any]:
    """Which pairs stay, by the reason for dropping the others."""
    filters = {}
    if max_length is not None:
        filters[f"longer than max_length={max_length} tokens"] = lambda row: (
            max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
        )
    filters["whose two sides are the same tokens"] = lambda row: (
        row["chosen_ids"] != row["rejected_ids"]
    )
    return filters


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, also those that attention layers keep as plain numbers.

    TRL's `disable_dropout` reaches `nn.Dropout` modules only; `attention_dropout` of Llama-like
    models is a float passed to the attention function whenever the module is in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
