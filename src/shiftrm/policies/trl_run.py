"""Run a TRL policy trainer in its work folder: train, measure the KL, save."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from shiftrm.errors import UserError, first_line
from shiftrm.models.rendering import Text
from shiftrm.policies.outcome import (
    MeasuredKL,
    PolicyOutcome,
    measure_kl,
    policy_card,
    policy_summary,
)
from shiftrm.policies.rollouts import Problem
from shiftrm.policies.text_rewards import with_gold
from shiftrm.trainers.one_model import add_callbacks, write_model
from shiftrm.trainers.training import TrainingJob, open_work, publish
from shiftrm.trainers.training_log import training_log, write_training_log

__all__ = ["Plan", "run_in_work", "run_trl"]

SHOWN = ("loss", "reward", "sequence_kl", "accuracies")


@dataclass
class Plan:
    """What a method needs besides its job.

    Attributes:
        make: makes the trainer; called in the work folder after all checks.
        prompts: prompts to measure the KL on; if empty, it is not measured.
        reference, reward: names of models for the card.
        load_reference: loads the model to measure against if the trainer holds none and there is
            no adapter to switch off.
        max_new_tokens: longest response when the KL is measured.
    """

    method: str
    make: Callable[[], Any]
    prompts: Sequence[Text] = ()
    reference: str | None = None
    reward: str | None = None
    load_reference: Callable[[], Any] | None = None
    apart: bool = False
    kl_samples: int = 0
    max_new_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def run_in_work(
    job: TrainingJob,
    train: Callable[[Path | None], PolicyOutcome],
    *,
    more: dict[str, Any],
) -> str | None:
    """Lock the work folder, train in it, and publish the result.

    Args:
        train: writes the model to `job.finished`; takes the checkpoint to continue from.
        more: further values that must be equal for an interrupted run to be resumed.

    Returns:
        The summary; None except on the main process.

    Raises:
        UserError: out of memory, a full disk, numbers that are not finite, or as `train`.
    """
    processes = PartialState()
    with open_work(job, more) as checkpoint:
        outcome = train(checkpoint)
        if processes.is_main_process:
            publish(job, policy_card(outcome))
        processes.wait_for_everyone()
    return policy_summary(outcome) if processes.is_main_process else None


def run_trl(job: TrainingJob, plan: Plan, checkpoint: Path | None) -> PolicyOutcome:
    """Train with a TRL trainer; write model and log to `job.finished`."""
    used = job.chosen.beyond_defaults()
    trainer = _made(job, plan)
    _fit(job, trainer, checkpoint)
    kl = _final_kl(job, plan, trainer)
    log = [with_gold(row) for row in training_log(trainer.state.log_history)]
    if kl is not None and log:
        log[-1]["final_sequence_kl"] = kl.kl
    lora = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    write_model(trainer, job.finished)
    if trainer.accelerator.is_main_process:
        write_training_log(job.finished, log)
    return PolicyOutcome(
        method=plan.method,
        **job.facts(),
        settings=used,
        seed=job.chosen.args.seed,
        steps=trainer.state.global_step,
        examples=len(trainer.train_dataset),
        dropped={**plan.dropped, **trainer.dropped},
        processes=trainer.accelerator.num_processes,
        lora=lora,
        log=log,
        reference=plan.reference,
        reward=plan.reward,
        kl=kl,
    )


def _made(job: TrainingJob, plan: Plan) -> Any:
    """Make the trainer with callbacks; errors of libraries become one line."""
    args = job.chosen.args
    given, args.model_init_kwargs = getattr(args, "model_init_kwargs", None), None  # used up
    try:
        trainer = plan.make()
    except UserError:
        raise
    except Exception as error:
        raise job.chosen.explain(job.model, error) from error
    args.model_init_kwargs = given
    add_callbacks(trainer, SHOWN)
    return trainer


def _fit(job: TrainingJob, trainer: Any, checkpoint: Path | None) -> None:
    _require_prompts(trainer)
    if checkpoint is not None and trainer.accelerator.is_main_process:
        print(f"Continuing from {checkpoint}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (ImportError, NotImplementedError) as error:  # a missing optimizer or kernel
        raise job.chosen.explain(job.model, error) from error
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"step {trainer.state.global_step + 1}: the policy's probabilities are not finite "
            f"({first_line(error)}); lower learning_rate"
        ) from None


def _require_prompts(trainer: Any) -> None:
    """Refuse fewer prompts than one generation takes: TRL would make no step and say nothing."""
    args, prompts = trainer.args, len(trainer.train_dataset)
    size = getattr(args, "generation_batch_size", None)
    if size is not None and prompts < (needed := size // args.num_generations):
        raise UserError(
            f"{prompts} prompts are fewer than the {needed} that one generation takes "
            f"(generation_batch_size {size} / num_generations {args.num_generations}), so no step "
            "would be made; give more prompts, or a smaller per_device_train_batch_size or "
            "steps_per_generation"
        )


def _final_kl(job: TrainingJob, plan: Plan, trainer: Any) -> MeasuredKL | None:
    """Measured by the main process; skipped if weights are sharded."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not plan.kl_samples or not plan.prompts or sharded:
        return None
    found = None
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        found = measure_kl(
            Problem(
                policy,
                _reference(plan, trainer, policy),
                trainer.processing_class,
                plan.prompts,
            ),
            samples=plan.kl_samples,
            max_new_tokens=plan.max_new_tokens,
            batch_size=trainer.args.per_device_train_batch_size,
            seed=job.chosen.args.seed,
        )
    trainer.accelerator.wait_for_everyone()
    return found


def _reference(plan: Plan, trainer: Any, policy: Any) -> Any:
    held = getattr(trainer, "ref_model", None)
    if held is not None:
        return trainer.accelerator.unwrap_model(held).eval()
    if hasattr(policy, "disable_adapter") and not plan.apart:
        return None  # the policy with its adapter off
    if plan.load_reference is None:
        raise ValueError("a KL needs a reference")
    with torch.no_grad():
        return plan.load_reference().to(next(policy.parameters()).device)
