"""OODPL meta-training: train a reward model over many domains for an unlabelled one."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from shiftrm.core.hypergradient import (
    Hypergradient,
    InnerBatch,
    InnerProblem,
    InnerSettings,
    OuterBatch,
    adapted_policy,
    gradient_cosine,
    hypergradient,
    preference_margins,
)
from shiftrm.core.losses import effective_sample_size
from shiftrm.data.domains import DomainSplit
from shiftrm.errors import UserError
from shiftrm.models.rendering import pin_template
from shiftrm.models.rewards import sequence_rewards
from shiftrm.oodpl.batches import EncodedDomain, Encoder, encode_domains, outer_batch
from shiftrm.oodpl.meta_config import OODPLConfig
from shiftrm.oodpl.setup import (
    MEANS,
    check,
    domain_metrics,
    length_limit,
    pad_id,
    policy_of,
    reward_model_of,
    say_dropped,
    watched_domains,
)
from shiftrm.oodpl.statistics import StepStatistics
from shiftrm.oodpl.tasks import Task, TaskPlan

__all__ = ["OODPLConfig", "OODPLTrainer"]

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 64
"""Rows in one evaluation pass; a smaller micro_batch_size lowers it."""


class OODPLTrainer(Trainer):
    """Meta-trains a reward model over source domains (Jia, arXiv 2402.14760).

    Each outer step draws `domains_per_step` tasks, takes the hypergradient of each (inner loop from
    the reference policy on the task's fine-tuning rows, preference loss on its pairs) and passes
    their mean to the optimizer. `hypergradient` restores the policy after every task.

    From the paper: the two losses, D plain SGD steps inside, differentiation through all of them, a
    domain drawn at each of the K outer steps. Ours: everything else that `OODPLConfig` lists, and
    that the domains of one step are dealt without repetition.

    Every task is a pure function of (seed, step, index): a resumed run continues bit for bit, and
    processes share the tasks of a step. The trainer sums gradients itself, because DDP's hooks see
    no backward pass.

    Args:
        model: the reward model: a sequence classifier with one label, or the folder of one, or of
            a policy, whose backbone then gets a new head.
        policy: the reference policy, or its folder. Its trainable parameters are adapted: all, or
            those of LoRA.
        split: domains; held-out ones are never read.
        processing_class, policy_processing_class: tokenizers; needed if models are not folders.

    Logged: `loss` (outer), `accuracy` (A_PL on the query pairs at theta_D),
    `effective_sample_share` (of the weights: 1 if all are equal), `reward_mean`, `reward_std`,
    `inner_loss` (before the first inner step), `hypergradient_norm`, and with `log_cosine`
    `hypergradient_cosine`. `evaluate` gives A_PL and outer loss on each watched domain (validation
    domains, or else the sources' evaluation pairs) after adapting to its support, and A_PL of the
    reference as it is.

    Raises:
        UserError: domains too small, no held-out domain, no pairs to watch, watched domains whose
            names would give two metrics one name, models that do not fit or are adapters' folders;
            while training: weights or gradients that are not finite (names domain and example).
    """

    def __init__(
        self,
        model: Any,
        policy: Any,
        args: OODPLConfig | None = None,
        *,
        split: DomainSplit,
        processing_class: Any = None,
        policy_processing_class: Any = None,
        **trainer_options: Any,
    ) -> None:
        args = args if args is not None else OODPLConfig("oodpl-output")
        check(args, split)
        model, processing_class = reward_model_of(model, processing_class, args.seed)
        self.policy, self.policy_tokenizer = policy_of(policy, policy_processing_class)
        for tokenizer in (processing_class, self.policy_tokenizer):
            pin_template(tokenizer)
        encoder = Encoder(
            self.policy_tokenizer, processing_class, length_limit(args, self.policy, model)
        )
        self._sources = encode_domains(
            encoder,
            split.source,
            support_batch=args.support_batch_size,
            query_batch=args.query_batch_size,
        )
        say_dropped(self._sources, encoder.max_length)
        self._watched = watched_domains(encoder, split, args, self._sources)
        self._plan = TaskPlan(
            seed=args.seed if args.data_seed is None else args.data_seed,
            inner_steps=args.inner_steps,
            support_batch=args.support_batch_size,
            query_batch=args.query_batch_size,
            mixture=args.mixture,
            policy_pad_id=pad_id(self.policy_tokenizer),
            reward_pad_id=pad_id(processing_class),
        )
        self._seen: dict[str, list[float]] = {}
        super().__init__(
            model,
            args,
            data_collator=_nothing,
            train_dataset=_OuterSteps(args.max_steps * args.world_size * max(1, args.n_gpu)),
            eval_dataset=_OuterSteps(len(self._watched)) if self._watched else None,
            processing_class=processing_class,
            **trainer_options,
        )
        if args.domains_per_step < self.accelerator.num_processes:
            raise UserError(
                f"domains_per_step is {args.domains_per_step} on "
                f"{self.accelerator.num_processes} processes; each process needs a task"
            )
        if args.activation_checkpointing:  # Trainer handles the reward model
            kwargs = dict(args.activation_checkpointing_kwargs or {})
            layers = {k: kwargs.pop(k) for k in ("every_n_layers", "offload") if k in kwargs}
            self.policy.activation_checkpointing_enable(
                activation_checkpointing_kwargs=kwargs or None, **layers
            )
        self.policy.to(self.args.device)
        self._reference_margins: dict[str, Tensor] = {}

    # -- one outer step ----------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Write the mean hypergradient of the step's tasks to `.grad`; return the outer loss."""
        reward_model = self.accelerator.unwrap_model(model)
        parameters = {n: p for n, p in reward_model.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p, dtype=_at_least_fp32(p)) for n, p in parameters.items()}
        statistics = StepStatistics()
        tasks = self._tasks()
        failure = None
        try:
            for task in tasks:
                found = self._hypergradient(reward_model, task)
                for name, gradient in found.gradients.items():
                    total[name] += gradient
                statistics.add(found)
                if self._cosine_wanted() and task is tasks[0]:
                    statistics.add_cosine(self._cosine(reward_model, task, found))
        except ValueError as error:
            failure = self._failure(error, f"step {self._step() + 1}", task.rows)
        self._raise_together(failure)
        norm = 0.0
        for name, p in parameters.items():
            gradient = self._sum(total[name]) / self.args.domains_per_step
            norm += float(gradient.double().pow(2).sum())
            p.grad = gradient.to(p.dtype)
        numbers = StepStatistics(self._sum(statistics.sums)).means()
        loss = numbers.pop("loss")
        if not (math.isfinite(norm) and math.isfinite(loss)):
            reward_model.zero_grad(set_to_none=True)
            raise UserError(self._diverged(tasks))
        self._note({**numbers, "hypergradient_norm": norm**0.5})
        return torch.tensor(loss, device=self.args.device)

    def _tasks(self) -> list[Task]:
        """Return this process's tasks of the step."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [
            self._plan.draw(self._sources, step=self._step(), index=index)
            for index in range(rank, self.args.domains_per_step, world)
        ]

    def _hypergradient(self, reward_model: nn.Module, task: Task, **changed: Any) -> Hypergradient:
        problem = self._problem(reward_model, task.inner_batches)
        with self.compute_loss_context_manager():  # bf16, if it is asked for
            return hypergradient(problem, task.outer_batch, self._inner_settings(**changed))

    def _problem(self, reward_model: nn.Module, batches: Sequence[InnerBatch]) -> InnerProblem:
        return InnerProblem(self.policy, reward_model, batches, sequence_rewards)

    def _inner_settings(self, **changed: Any) -> InnerSettings:
        names = (
            "inner_learning_rate",
            "beta",
            "normalize_weights",
            "reduction",
            "curvature",
            "last_steps",
            "micro_batch_size",
        )
        return InnerSettings(**{**{name: getattr(self.args, name) for name in names}, **changed})

    def _cosine_wanted(self) -> bool:
        every = max(1, int(self.state.logging_steps or 1))
        step = self._step()
        return (
            bool(self.args.log_cosine)
            and self.accelerator.is_main_process
            and (step == 0 or (step + 1) % every == 0)
        )

    def _cosine(self, reward_model: nn.Module, task: Task, found: Hypergradient) -> float:
        """Return the cosine with the exact gradient, or if training is exact, with "none"."""
        exact = self.args.curvature == "exact" and self.args.last_steps is None
        changed = {"curvature": "none" if exact else "exact", "last_steps": None}
        other = self._hypergradient(reward_model, task, **changed)
        return gradient_cosine(found.gradients, other.gradients)

    # -- failures, the same on every process ---------------------------------------------------

    def _failure(
        self, error: ValueError, when: str, rows: Sequence[Sequence[tuple[str, int]]]
    ) -> str:
        """Return the message with domain and row instead of inner batch and example."""
        message = str(error)
        place = re.search(r"inner batch (\d+), example (\d+)", message)
        if place is None:
            return f"{when}: {message}"
        name, row = rows[int(place[1])][int(place[2])]
        rest = message[place.end() :].lstrip(": ")
        return f"{when}, domain {name!r}, fine-tuning row {row + 1}: {rest}"

    def _raise_together(self, failure: str | None) -> None:
        """Raise on every process if one failed, so that none waits for missing gradients."""
        failed = torch.tensor(float(failure is not None), device=self.args.device)
        if not float(self._sum(failed)):
            return
        said = [failure] if self.accelerator.num_processes == 1 else gather_object([failure])
        raise UserError(next(message for message in said if message))

    def _diverged(self, tasks: Sequence[Task]) -> str:
        names = ", ".join(sorted({name for task in tasks for name in task.domains}))
        checkpoint = get_last_checkpoint(self.args.output_dir) or "none was saved"
        return (
            f"step {self._step() + 1}: the outer loss or its gradient is not finite (domains "
            f"{names}); stopped before it reached the weights. Last good checkpoint: {checkpoint}. "
            "Lower inner_learning_rate or learning_rate, or raise beta"
        )

    # -- evaluation --------------------------------------------------------------------------

    @property
    def watched(self) -> list[str]:
        """Return the names of the domains that `evaluate` measures."""
        return [domain.name for domain in self._watched]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return A_PL and outer loss on every watched domain, after D inner steps on its support.

        The support batches are the same at every evaluation. `..._reference_accuracy` is A_PL of
        the policy before any step.
        """
        if not self._watched:
            raise UserError("no domain has evaluation pairs, so there is nothing to evaluate on")
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        table = torch.zeros(len(self._watched), 4, dtype=torch.float64)
        failure = None
        for row in range(rank, len(self._watched), world):
            batches, rows = self._plan.support_of(self._watched[row], role="evaluate")
            try:
                numbers = self._evaluate_domain(self._watched[row], batches)
                table[row] = torch.tensor(numbers, dtype=torch.float64)
            except ValueError as error:
                failure = self._failure(error, "evaluation", rows)
        self._raise_together(failure)
        table = self._sum(table)
        metrics = {
            f"{metric_key_prefix}_{name}": float(value)
            for name, value in zip(MEANS, table.mean(dim=0), strict=True)
        }
        for domain, values in zip(self._watched, table, strict=True):
            for name, value in zip(domain_metrics(domain.name), values[[0, 2]], strict=True):
                metrics[f"{metric_key_prefix}_{name}"] = float(value)
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_domain(
        self, domain: EncodedDomain, batches: list[InnerBatch]
    ) -> tuple[float, float, float, float]:
        reward_model = self.accelerator.unwrap_model(self.model)
        size = min(self.args.micro_batch_size or EVALUATION_BATCH, EVALUATION_BATCH)
        pairs = outer_batch(domain.eval_pairs, policy_pad_id=self._plan.policy_pad_id)
        with self.compute_loss_context_manager():
            if domain.name not in self._reference_margins:
                self._reference_margins[domain.name] = self._margins(pairs, size)
            with adapted_policy(
                self._problem(reward_model, batches), self._inner_settings(micro_batch_size=size)
            ) as run:
                margins = self._margins(pairs, size)
        shares = [effective_sample_size(w) / len(w) for w in run.weights]
        return (
            float((margins > 0).double().mean()),
            float(nn.functional.softplus(-margins.double()).mean()),
            float((self._reference_margins[domain.name] > 0).double().mean()),
            sum(shares) / len(shares),
        )

    def _margins(self, pairs: OuterBatch, size: int) -> Tensor:
        return preference_margins(
            self.policy, pairs, reduction=self.args.reduction, micro_batch_size=size
        )

    # -- logging -----------------------------------------------------------------------------

    def _note(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._seen.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the means since the last training log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._seen.items()}
            self._seen.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: operations are not counted, as passes depend on tasks, not on inputs."""
        return 0

    # -- small helpers -----------------------------------------------------------------------

    def _sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum").to(tensor)

    def _step(self) -> int:
        return int(self.state.global_step)


class _OuterSteps(Dataset):
    """A data set with one row per step; `TaskPlan` draws the step's data."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"step": index}


def _nothing(rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
    return {"step": torch.tensor([row["step"] for row in rows])}


def _at_least_fp32(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
