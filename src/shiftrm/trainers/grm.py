"""Generalizable reward models: the backbone must also stay able to write the chosen response."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from shiftrm.core.losses import response_log_likelihood, text_regularisation
from shiftrm.data.pairs import WEIGHT
from shiftrm.errors import UserError
from shiftrm.models.filled import load_filled
from shiftrm.models.likelihoods import encode_side
from shiftrm.models.loading import A_LANGUAGE_HEAD, explain_loading, is_head
from shiftrm.models.prefix import separate
from shiftrm.models.rewards import rewards_and_states
from shiftrm.progress import task
from shiftrm.trainers.pair_batches import ROW, PairCollator, shared_rows
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

__all__ = ["GRMConfig", "GRMTrainer", "LanguageHead"]

START = "answer_start"
"""The column with the place of the chosen response's first token."""


@dataclass
class GRMConfig(RewardConfig):
    """`RewardConfig` with the settings of the text loss (`core.losses.text_regularisation`)."""

    grm_alpha: float = field(default=0.01, metadata={"help": "weight of the text loss"})
    grm_beta: float = field(
        default=0.1, metadata={"help": "factor of the log-likelihood in the text loss"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.grm_alpha <= 1:
            raise UserError(f"grm_alpha is {self.grm_alpha}; it must lie in [0, 1]")
        if not 0 < self.grm_beta < float("inf"):
            raise UserError(f"grm_beta is {self.grm_beta}; it must be above 0")


@dataclass
class LanguageHead:
    """A checkpoint's language-model head, for the hidden states of a reward model.

    Attributes:
        weight, bias: of a linear layer of its own, kept as they are; no weight if the head is tied
            to the input embeddings, which then are the reward model's, trained with it.
        softcap: Gemma 2's limit c, `c tanh(logits / c)`.
    """

    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None

    def __call__(self, model: Any, states: Tensor) -> Tensor:
        """Return logits of hidden states [..., H]."""
        weight = model.get_input_embeddings().weight if self.weight is None else self.weight
        device, bias = states.device, self.bias
        bias = None if bias is None else bias.to(device, states.dtype)
        logits = F.linear(states, weight.to(device, states.dtype), bias)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device) -> None:
        """Move the head's own weights."""
        self.weight = None if self.weight is None else self.weight.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)

    @classmethod
    def load(cls, path: str, **options: Any) -> "LanguageHead":
        """Read the head of a checkpoint.

        Raises:
            UserError: there is none, or it is more than one linear layer.
        """
        from transformers import AutoModelForCausalLM

        with explain_loading(path, "a causal language model"):
            model, missing, _ = load_filled(
                AutoModelForCausalLM, path, quiet=True, dtype=torch.float32, **options
            )
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"{path}: has no language-model head of one linear layer")
        name = next(name for name, module in model.named_modules() if module is head)
        if f"{name}.weight" in missing:
            raise _no_language_head(path, name)
        tied = head.weight is model.get_input_embeddings().weight
        config = model.config.get_text_config()
        found = cls(
            None if tied else head.weight.detach(),
            None if head.bias is None else head.bias.detach(),
            getattr(config, "final_logit_softcapping", None),
        )
        ids = torch.arange(min(8, config.vocab_size))[None]
        with torch.no_grad():
            output = model.eval()(input_ids=ids, output_hidden_states=True, use_cache=False)
            same = torch.allclose(
                found(model, output.hidden_states[-1]), output.logits, rtol=1e-3, atol=1e-3
            )
        if not same:
            raise UserError(
                f"{path}: its logits are not one linear layer of its hidden states, which the "
                "method grm needs"
            )
        return found


def _no_language_head(path: str, name: str) -> UserError:
    return UserError(
        f"{path}: has no language-model head ({name}.weight), which the method grm needs: a reward "
        "model keeps one only if it is tied to the embeddings; start from a policy, `shiftrm train "
        "--method grm --model POLICY`"
    )


class GRMTrainer(RewardTrainer):
    """`RewardTrainer` with the loss of GRM in training (Yang et al., arXiv 2406.10216).

    The language-model head is the start checkpoint's own: tied to the embeddings, and then trained
    with them, or else kept as it is. (Their code trains an untied one if all weights are trained,
    and drops it at the end; with LoRA it keeps it, as we do.) It reads the hidden states that the
    score head reads. Their reward head has a hidden layer; ours stays linear, so that other
    libraries load the result. Prefixes are not shared in training, and FSDP is not supported.
    """

    _never_shares = True

    @staticmethod
    def check_start(model: str) -> None:
        """Refuse a reward model without a language-model head, by the names of its weights.

        Others are refused when they are loaded.
        """
        files = sorted(Path(model).glob("*.safetensors"))
        names = [name for file in files for name in _names(file)]
        if not any(map(is_head, names)) or any(map(A_LANGUAGE_HEAD.search, names)):
            return
        with explain_loading(model, "a causal language model"):
            config = AutoConfig.from_pretrained(model)
        if not config.get_text_config().tie_word_embeddings:
            raise _no_language_head(model, "lm_head")

    def __init__(self, model: Any, args: Any, **keywords: Any) -> None:
        if not isinstance(model, str):
            raise UserError(
                "grm: give the model as a folder or hub name; its language-model head is read "
                "from there"
            )
        given = args.model_init_kwargs or {}
        options = {"trust_remote_code": args.trust_remote_code}
        options |= {"revision": given["revision"]} if "revision" in given else {}
        with task("reading the language-model head", None):
            self._language_head = LanguageHead.load(model, **options)
        super().__init__(model, args, **keywords)
        if self.is_fsdp_enabled:
            raise UserError("grm does not run with FSDP: it reads the embeddings' weights; use DDP")
        self._language_head.to(self.args.device)
        if isinstance(self.data_collator, PairCollator):
            self.data_collator.more = (START,)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if START not in self._signature_columns:
            self._signature_columns.append(START)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        found = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if dataset_name != "train":
            return found

        def start(row: dict[str, Any]) -> dict[str, int]:
            if "chosen" not in row:
                raise UserError("grm needs pairs as text; they are given as tokens")
            try:
                return {START: encode_side(processing_class, row, "chosen").start}
            except UserError as error:
                raise UserError(f"train data, row {row[ROW]}: {error}") from None

        options = {"desc": "Finding the responses"} if isinstance(found, Dataset) else {}
        return found.map(start, **options)

    def _pair_losses(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.model.training or START not in inputs:
            return super()._pair_losses(model, inputs)
        self._inspect_once(model, inputs)
        rows = shared_rows(inputs)
        ids, mask = separate(rows, pad_token_id=self.processing_class.pad_token_id)  # [2B, T]
        rewards, states = rewards_and_states(model, ids, mask)
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        losses = self._reward_losses(chosen, rejected, inputs)
        likelihood = self._log_likelihood(states[::2], ids[::2], mask[::2], inputs[START])
        losses = text_regularisation(
            losses,
            likelihood,
            alpha=self.args.grm_alpha,
            beta=self.args.grm_beta,
            weight=inputs.get(WEIGHT, 1.0),
        )
        return losses, rewards.view(-1, 2), rows.sequence_lengths

    def _log_likelihood(self, states: Tensor, ids: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        """Return log pi of the responses that begin at `start` [B], shape [B]."""
        first = max(int(start.min()) - 1, 0)  # prompts need no logits
        places = torch.arange(ids.shape[1], device=ids.device)
        response = (places >= start[:, None]) & mask.bool()
        inner = self.accelerator.unwrap_model(self.model)
        logits = self._language_head(inner, states[:, first:])
        return response_log_likelihood(logits, ids[:, first:], response[:, first:])


def _names(file: Path) -> list[str]:
    """Return the names of a file's tensors; none of a broken file, which is refused when loaded."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):
        return []
