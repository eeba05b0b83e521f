"""The models of a PPO run and their gradient steps, in portions and over processes."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftrm.errors import UserError
from shiftrm.models.rendering import Text
from shiftrm.models.rewards import score_head
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_math import clipped_policy_loss, clipped_value_loss
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.ppo_runtime import Processes
from shiftrm.trainers.machine import is_out_of_memory

VALUE_ADAPTER = "value"
"""Name of the critic's adapter in a LoRA policy."""


def make_critic(policy: Any, *, seed: int = 0) -> Any:
    """Make a critic from the policy's backbone and a zero score head; its initial values are 0.

    For a policy without adapters, the critic is a copy and all of it is trained; transformers must
    have a sequence classifier of the policy's architecture. For a LoRA policy (a `PeftModel`) it is
    an `AdapterCritic`: a second adapter in the policy, so that the base weights are not duplicated.
    Call its `remove` before you save or merge the policy.

    Args:
        seed: for the random factors of the new adapter.

    Raises:
        UserError: transformers has no sequence classifier that takes the policy's weights.
    """
    from transformers import AutoModelForSequenceClassification

    if is_peft(policy):
        return AdapterCritic(policy, seed=seed)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if config.pad_token_id is None:  # required by its pooling, which we do not use
        config.pad_token_id = 0
    weight = next(policy.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            critic = AutoModelForSequenceClassification.from_config(config)
        critic.to(device=weight.device, dtype=weight.dtype)
        critic.base_model.load_state_dict(policy.base_model.state_dict())
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{policy.name_or_path or 'the policy'}: PPO's critic begins as a copy of the policy, "
            f"and transformers has no sequence classifier of a {config.model_type} policy that "
            "takes its weights; give a decoder such as Llama, or optimise it by rloo or dpo"
        ) from error
    for parameter in score_head(critic).parameters():
        nn.init.zeros_(parameter)
    return critic.eval()


class AdapterCritic(nn.Module):
    """A value adapter and a score head on the base model of a LoRA policy.

    Adds an adapter, `VALUE_ADAPTER`, with the rank and target modules of the policy's own. It is
    active only inside `active`; `remove` deletes it. The parameters of this module are those of the
    adapter and the head, in fp32 or more. Ours: common in PPO with LoRA, but without one source.

    Raises:
        UserError: the policy has more than one adapter, or a prompt-learning adapter.
    """

    def __init__(self, policy: Any, *, seed: int = 0) -> None:
        super().__init__()
        own = policy.active_adapter
        if len(policy.peft_config) != 1 or policy.peft_config[own].is_prompt_learning:
            raise UserError(
                f"the policy has the adapters {', '.join(policy.peft_config)}; a critic can be "
                "made beside one LoRA adapter: merge or delete the others"
            )
        config = copy.deepcopy(policy.peft_config[own])
        config.modules_to_save = None  # replaced by the critic's head
        self._policy = (policy,)  # in a tuple, so that torch does not register its parameters here
        before = {n for n, _ in policy.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy.add_adapter(VALUE_ADAPTER, config)
        policy.set_adapter(own)
        # torch does not allow dots in names.
        self.adapter = nn.ParameterDict(
            {n.replace(".", "/"): p for n, p in policy.named_parameters() if n not in before}
        )
        weight = next(policy.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = policy.config.get_text_config().hidden_size
        self.score = nn.Linear(size, 1, bias=False, device=weight.device, dtype=dtype)
        nn.init.zeros_(self.score.weight)
        self.eval()

    @property
    def config(self) -> Any:
        return self._policy[0].config

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the value adapter is active; run the backward pass in it too."""
        policy = self._policy[0]
        own = policy.active_adapter
        policy.set_adapter(VALUE_ADAPTER)
        try:
            yield
        finally:
            policy.set_adapter(own)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Return the value at every token, shape [B, T, 1]."""
        backbone = self._policy[0].get_base_model().base_model
        with self.active():
            output = backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        return self.score(output.last_hidden_state.to(self.score.weight.dtype))

    def remove(self) -> None:
        """Delete the adapter from the policy; the critic cannot be used afterwards."""
        self._policy[0].delete_adapter(VALUE_ADAPTER)


def is_peft(model: Any) -> bool:
    """Whether PEFT wraps the model."""
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    if isinstance(model, AdapterCritic):  # they require gradients only while it is active
        return dict(model.named_parameters())
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_parameters(policy: nn.Module, reference: nn.Module | None) -> dict[str, Tensor]:
    """Return the parameters of the reference, which may be the policy's base model."""
    if reference is not None:
        return dict(reference.named_parameters())
    adapter = f".{VALUE_ADAPTER}"
    return {
        name: p
        for name, p in policy.named_parameters()
        if not p.requires_grad and not name.removesuffix(".weight").endswith(adapter)
    }


def activity(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the critic runs with its own adapter instead of the policy's."""
    return model.active() if isinstance(model, AdapterCritic) else nullcontext()


def reference_of(policy: Any, reference: Any) -> AbstractContextManager[Any]:
    """Return a context that yields the reference, or else the policy without its adapter."""
    return nullcontext(reference) if reference is not None else _without_adapter(policy)


@contextmanager
def _without_adapter(policy: Any) -> Iterator[Any]:
    with policy.disable_adapter():
        yield policy


@contextmanager
def recomputed_layers(*models: nn.Module) -> Iterator[None]:
    """Context in which layers keep only their inputs and recompute the rest when going backward.

    transformers does this in training mode only. Our models run in eval mode, so each layer's
    forward is wrapped here.

    Raises:
        UserError: the model has no layers that transformers can recompute.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    with ExitStack() as stack:
        for model in models:
            host = model._policy[0] if isinstance(model, AdapterCritic) else model
            layers = [m for m in host.modules() if isinstance(m, GradientCheckpointingLayer)]
            if not layers:
                raise UserError(
                    f"{type(model).__name__} has no layers that can be recomputed; leave "
                    "gradient_checkpointing out"
                )
            for layer in layers:
                # An AdapterCritic shares its layers with the policy; they may be wrapped already.
                if getattr(vars(layer).get("forward"), "func", None) is not checkpoint:
                    stack.enter_context(_recomputed(layer))
        yield


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    plain: Callable[..., Any] | None = vars(layer).get("forward")
    layer.forward = partial(
        checkpoint,
        layer.forward,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a layer is random
    )
    try:
        yield
    finally:
        del layer.forward
        if plain is not None:
            layer.forward = plain


STATISTICS = ("policy_loss", "value_loss", "gradient_norm", "clip_fraction")


@dataclass(frozen=True)
class Batch:
    """The rows of one step, their prompts, and the constants of the losses, [B, A] each."""

    rows: Rows
    prompts: Sequence[Text]
    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class Updater:
    """Takes clipped gradient steps on policy and critic.

    Attributes:
        trained: parameters by model ("policy", "critic") and name.
        optimizers: by model.
        continues: whether the run writes checkpoints.
    """

    policy: Any
    critic: Any
    trained: Mapping[str, Mapping[str, nn.Parameter]]
    optimizers: Mapping[str, torch.optim.Optimizer]
    config: PPOConfig
    processes: Processes
    continues: bool = False

    def run(self, step: int, batch: Batch, orders: Sequence[Sequence[int]]) -> dict[str, float]:
        """Take all updates of one step and return their mean statistics.

        Args:
            orders: row indices, one order per epoch.

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
        """Take one optimizer step per model on the rows `ix`; return `STATISTICS`."""
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
        """Accumulate gradients of this process's share of the minibatch; return [3] sums of losses.

        Each mean is over the tokens of the whole minibatch, so the parts add up to the whole
        whatever the lengths of their rows.
        """
        config, sums = self.config, torch.zeros(3, dtype=torch.float64)
        tokens = batch.rows.response_mask[ix].sum()
        own = self.processes.mine(ix)
        size = config.micro_batch_size or len(ix)
        for some in batch.rows.micro_batches(own, size, self.policy):
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


def adamw(trained: Mapping[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Return the optimizer of one model, without weight decay."""
    return torch.optim.AdamW(
        trained.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )


def check_models(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, Mapping[str, nn.Parameter]],
    config: PPOConfig,
) -> None:
    """Check that the settings fit the models.

    Args:
        models, trained: models and their trained parameters, by name.

    Raises:
        UserError: nothing to train, layers that cannot be recomputed, bf16 weights with bf16=true.
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
    """Return a context for forward passes in bf16 if `config.bf16` is set.

    Use one context per pass: it caches cast weights, which an optimizer step makes stale.
    """
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()


@contextmanager
def out_of_memory(step: int, what: str, advice: str, *, continues: bool) -> Iterator[None]:
    """Turn out-of-memory errors into a UserError that names the setting to change.

    Args:
        what: the activity that failed.
        advice: how to reduce its memory.
        continues: whether the run writes checkpoints.
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
