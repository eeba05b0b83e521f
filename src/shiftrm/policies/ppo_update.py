"""The gradient steps of PPO on one batch of roll-outs, in portions and over processes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_distributed import Processes
from shiftrm.policies.ppo_math import Rows, clipped_policy_loss, clipped_value_loss
from shiftrm.policies.ppo_models import activity, recomputed_layers
from shiftrm.trainers.memory import is_out_of_memory

STATISTICS = ("policy_loss", "value_loss", "gradient_norm", "clip_fraction")


@dataclass(frozen=True)
class Batch:
    """The rows of one step, their prompts, and the losses' constants, [B, A] each."""

    rows: Rows
    prompts: Sequence[Text]
    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class Updater:
    """Takes clipped gradient steps of policy and critic.

    Attributes:
        trained: parameters by model ("policy", "critic") and name.
        optimizers: by model.
        continues: whether there are checkpoints to continue from.
    """

    policy: Any
    critic: Any
    trained: Mapping[str, Mapping[str, nn.Parameter]]
    optimizers: Mapping[str, torch.optim.Optimizer]
    config: PPOConfig
    processes: Processes
    continues: bool = False

    def run(self, step: int, batch: Batch, orders: Sequence[Sequence[int]]) -> dict[str, float]:
        """All updates of one step; returns their mean statistics.

        Args:
            orders: row numbers, one order for each epoch.

        Raises:
            UserError: a loss or gradient is not finite; names step and prompt.
        """
        size, history = self.config.minibatch_size, []
        recomputing = self.config.gradient_checkpointing
        with recomputed_layers(self.policy, self.critic) if recomputing else nullcontext():
            for order in orders:
                for start in range(0, len(order), size):
                    history.append(self._update(step, batch, order[start : start + size]))
        columns = zip(*history, strict=True)
        return {n: sum(c) / len(c) for n, c in zip(STATISTICS, columns, strict=True)}

    def _update(self, step: int, batch: Batch, ix: Sequence[int]) -> list[float]:
        """One optimizer step of either model on the rows `ix`; returns `STATISTICS`."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        sums, error = torch.zeros(3, dtype=torch.float64), None
        try:
            with out_of_memory(step, "in an update", self._less_memory(), continues=self.continues):
                sums = self._accumulate(batch, ix)
        except Exception as caught:
            error = caught
        self.processes.fail_if_any(error)
        if self.processes.count > 1:
            sums = self.processes.sum_(sums.to(self.processes.device))
        policy_loss, value_loss, clip_fraction = sums.tolist()
        norms = {}
        for name, trained in self.trained.items():
            self.processes.sum_gradients(trained.values())
            norms[name] = float(
                nn.utils.clip_grad_norm_(trained.values(), self.config.max_grad_norm)
            )
        numbers = [policy_loss, value_loss, norms["policy"], clip_fraction]
        if not all(map(math.isfinite, (*numbers, norms["critic"]))):
            raise UserError(
                f"step {step}: the loss or its gradient is not finite; lower the learning "
                f"rates; the first prompt of the batch is {batch.prompts[ix[0]]!r}"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
        return numbers

    def _less_memory(self) -> str:
        now = self.config.micro_batch_size or f"all {self.config.minibatch_size}"
        more = "" if self.config.gradient_checkpointing else ", or set gradient_checkpointing=true"
        return f"lower micro_batch_size (now {now}){more}"

    def _accumulate(self, batch: Batch, ix: Sequence[int]) -> Tensor:
        """Gradients of this process's share of the minibatch, in portions; [3] sums of the losses.

        Every mean is over the tokens of the whole minibatch, so that portions and processes add
        up to it, whatever the lengths of their rows.
        """
        config, sums = self.config, torch.zeros(3, dtype=torch.float64)
        tokens = batch.rows.response_mask[ix].sum()
        own = self.processes.mine(ix)
        size = config.micro_batch_size or len(ix)
        for start in range(0, len(own), size):
            some = own[start : start + size]
            part = batch.rows.select(some)
            with autocast(config, batch.old.device):
                logprobs = part.logprobs(self.policy)
            policy_loss, clip_fraction = clipped_policy_loss(
                logprobs,
                batch.old[some],
                batch.advantages[some],
                part.response_mask,
                clip_ratio=config.clip_ratio,
                tokens=tokens,
            )
            policy_loss.backward()
            with activity(self.critic):
                with autocast(config, batch.old.device):
                    values = part.values(self.critic)
                value_loss = clipped_value_loss(
                    values,
                    batch.values[some],
                    batch.returns[some],
                    part.response_mask,
                    value_clip=config.value_clip,
                    tokens=tokens,
                )
                value_loss.backward()
            parts = (policy_loss, value_loss, clip_fraction)
            sums += torch.tensor([float(x.detach()) for x in parts], dtype=sums.dtype)
        return sums


def check_models(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, Mapping[str, nn.Parameter]],
    config: PPOConfig,
) -> None:
    """Refuse settings that do not fit the models (by name, with what is trained of them).

    Raises:
        UserError: nothing to train, layers that cannot be recomputed, bf16 weights under bf16.
    """
    for name, model in models.items():
        if not trained[name]:
            raise UserError(f"the {name} has no parameter that requires a gradient")
        low = {p.dtype for p in trained[name].values()} & {torch.bfloat16, torch.float16}
        if config.bf16 and low:
            raise UserError(
                f"bf16=true trains weights kept in float32, but the {name}'s are "
                f"{str(low.pop()).removeprefix('torch.')}; load it in float32"
            )
        if config.gradient_checkpointing:
            with recomputed_layers(model):
                pass


def autocast(config: PPOConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Passes in bf16, if the configuration says so; weights stay as they are.

    One context for one pass: it keeps the weights it has cast, which a step would leave behind.
    """
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()


@contextmanager
def out_of_memory(step: int, what: str, advice: str, *, continues: bool) -> Iterator[None]:
    """Say in one line which setting needs less memory, instead of torch's report.

    Args:
        what: was being done. advice: what to do about it.
        continues: whether there are checkpoints to continue from.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        again = "; the same command with that continues from the last checkpoint"
        raise UserError(
            f"step {step}: out of memory {what}; {advice}{again if continues else ''}"
        ) from error
