"""`shiftrm optimise ppo`: reward scale, training, logs, progress, and the finished folder."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from shiftrm.errors import UserError, first_line
from shiftrm.files import Row, atomic_write_text
from shiftrm.models.rendering import Text
from shiftrm.models.sampling import remember_stop_tokens
from shiftrm.policies.loading import (
    Inputs,
    fitting_prompts,
    load,
    load_reference,
    same_model,
)
from shiftrm.policies.outcome import MeasuredKL, PolicyOutcome, measure_kl
from shiftrm.policies.ppo import PPOTrainer, StepLog, make_critic
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.rollouts import Problem, Rollouts
from shiftrm.policies.text_rewards import Watch, open_watch, reward_scale
from shiftrm.progress import task
from shiftrm.trainers.progress import say
from shiftrm.trainers.quantised import merged
from shiftrm.trainers.settings import command_defaults
from shiftrm.trainers.training import TrainingJob
from shiftrm.trainers.training_log import write_training_log

__all__ = ["log_row", "reporting", "reporting_arguments", "run_ppo"]

SCALE_FILE = "reward_scale.json"
"""In the work folder: mean and standard deviation of the rewards, measured once."""

RENAMED = {"kl": "sequence_kl", "kl_sampled": "sequence_kl_sampled", "score_mean": "reward"}
"""Fields of `StepLog` with the names that all methods use in their logs."""


def run_ppo(
    job: TrainingJob,
    inputs: Inputs,
    config: PPOConfig,
    prompts: Sequence[Text],
    report_as: TrainingArguments,
    checkpoint: Path | None,
) -> PolicyOutcome:
    """Train by PPO in the job's work folder; write model and log to `job.finished`.

    Args:
        report_as: see `reporting_arguments`.
        checkpoint: the one that `PPOTrainer` will resume from, for the message.

    Raises:
        UserError: as `PPOTrainer`; models that cannot be loaded; an integration that is not there.
    """
    processes = PartialState()
    with reporting(report_as) as report:
        problem = _load(job, inputs, config, prompts)
        kept, dropped = fitting_prompts(
            problem.policy,
            problem.tokenizer,
            prompts,
            room=config.sampling.max_new_tokens,
            limit=job.chosen.args.max_prompt_length,
        )
        problem = dataclasses.replace(problem, prompts=kept)
        config = _scaled(job, config, problem)
        if checkpoint is not None and processes.is_main_process:
            print(f"Continuing from {checkpoint}", flush=True)
        rows = _train(job, config, problem, report, _watch(job, inputs.watch))
        kl = _final_kl(job, config, problem)
        if kl is not None and rows:
            rows[-1]["final_sequence_kl"] = kl.kl
            report({"step": rows[-1]["step"], "final_sequence_kl": kl.kl})
    lora = hasattr(problem.policy, "peft_config")
    if processes.is_main_process:
        _write(problem.policy, problem.tokenizer, job.finished)
        write_training_log(job.finished, rows)
    processes.wait_for_everyone()
    return PolicyOutcome(
        method="ppo",
        **job.facts(),
        settings=_beyond_defaults(config, job.chosen.given),
        seed=config.seed,
        steps=len(rows),
        examples=len(kept),
        dropped=dropped,
        processes=processes.num_processes,
        lora=lora,
        log=rows,
        reference=inputs.reference_name,
        reward=inputs.reward,
        kl=kl,
    )


def _train(
    job: TrainingJob,
    config: PPOConfig,
    problem: Problem,
    report: Callable[[Row], None],
    watched: Watch | None,
) -> list[Row]:
    """Return the log of all steps, including those before an interruption; discard the critic."""
    critic = make_critic(problem.policy, seed=config.seed)

    def row_of(log: StepLog) -> Row:
        return log_row(log) if watched is None else watched.beside(log_row(log))

    with _progress(config.steps) as show:

        def on_step(log: StepLog, rollouts: Rollouts) -> None:
            if watched is not None:
                watched.see(log.step, rollouts)
            report(row_of(log))
            show(log)

        logs = PPOTrainer(problem, critic, config, on_step=on_step, checkpoints=job.work).train(
            save_last=False
        )  # the policy is saved at once; nothing else is needed
    if hasattr(critic, "remove"):  # its adapter lies in the policy
        critic.remove()
    return [row_of(log) for log in logs]


def log_row(log: StepLog) -> Row:
    """Return a row of training_log.jsonl, without the values that are None."""
    values = dataclasses.asdict(log)
    return {RENAMED.get(key, key): value for key, value in values.items() if value is not None}


def _watch(job: TrainingJob, name: str | None) -> Watch | None:
    """Return the watch on the main process, which sees all roll-outs."""
    if name is None or not PartialState().is_main_process:
        return None
    return Watch(open_watch(name), job.work)


def _load(job: TrainingJob, inputs: Inputs, config: PPOConfig, prompts: Sequence[Text]) -> Problem:
    """Load policy (with a new adapter if LoRA is on), reference and reward model."""
    reference = inputs.reference_name
    reward_fn = open_watch(str(inputs.reward), batch_size=min(64, config.forward_batch_size))
    policy, tokenizer = load(job.model, job.chosen)
    adapter = job.chosen.trainer_options.get("peft_config")
    if adapter is not None:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                policy = get_peft_model(policy, adapter).eval()
            except ValueError as error:  # PEFT does not know where this architecture takes them
                raise job.chosen.explain(job.model, error) from error
    device = PartialState().device
    beside = None
    if adapter is None or not same_model(reference, job.model):
        beside = load_reference(reference, job.chosen, tokenizer).to(device).requires_grad_(False)
    return Problem(policy.to(device), beside, tokenizer, prompts, reward_fn)


def _scaled(job: TrainingJob, config: PPOConfig, problem: Problem) -> PPOConfig:
    """Fill in mean and spread of the rewards of the reference's responses, unless given."""
    if config.reward_mean is not None and config.reward_std is not None:
        return config
    found: list[Any] = [None]
    if PartialState().is_main_process:
        path = job.work / SCALE_FILE
        if not path.exists():
            atomic_write_text(path, json.dumps(_measured_scale(config, problem)))
        found = [json.loads(path.read_text(encoding="utf-8"))]
    mean, spread = broadcast_object_list(found)[0]
    return dataclasses.replace(
        config,
        reward_mean=mean if config.reward_mean is None else config.reward_mean,
        reward_std=spread if config.reward_std is None else config.reward_std,
    )


def _measured_scale(config: PPOConfig, problem: Problem) -> tuple[float, float]:
    policy, reference = problem.policy, problem.reference
    with policy.disable_adapter() if reference is None else nullcontext():
        return reward_scale(
            policy if reference is None else reference,
            problem.tokenizer,
            problem.prompts,
            reward_fn=problem.reward_fn,
            sampling=config.sampling,
            batch_size=config.forward_batch_size,
            seed=config.seed,
        )


def _final_kl(job: TrainingJob, config: PPOConfig, problem: Problem) -> MeasuredKL | None:
    """Measured by the main process."""
    if not job.chosen.args.kl_samples or not PartialState().is_main_process:
        return None
    return measure_kl(
        problem,
        samples=job.chosen.args.kl_samples,
        max_new_tokens=config.sampling.max_new_tokens,
        batch_size=config.forward_batch_size,
        seed=config.seed,
    )


def _write(policy: Any, tokenizer: Any, finished: Path) -> None:
    """Save model and tokenizer; for LoRA, the merged model and the adapter in a subfolder."""
    remember_stop_tokens(policy, tokenizer)
    if hasattr(policy, "merge_and_unload"):
        adapter = finished / "adapter"
        policy.save_pretrained(adapter)
        policy = merged(policy, adapter)
    policy.save_pretrained(finished)
    tokenizer.save_pretrained(finished)


def _beyond_defaults(config: PPOConfig, given: Mapping[str, Any]) -> Row:
    """Return the settings that differ from the defaults, including preset and reward scale."""
    found: Row = {}
    default = PPOConfig()
    for key, value in dataclasses.asdict(config).items():
        if key != "sampling" and value != getattr(default, key):
            found[key] = value
    for key, value in dataclasses.asdict(config.sampling).items():
        if value != getattr(default.sampling, key):
            found[key] = value
    return found | {key: value for key, value in given.items() if key not in found}


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[StepLog], None]]:
    """Show a bar on a terminal, else one line per step from the main process."""
    with (
        task("PPO step", steps) as advance,
        tqdm(total=steps, desc="PPO", disable=not sys.stderr.isatty()) as shown,
    ):

        def show(log: StepLog) -> None:
            advance(log.step, steps)
            if not shown.disable:
                shown.update(log.step - shown.n)
            elif PartialState().is_main_process:
                words = f"reward {log.score_mean:.4g}, sequence_kl {log.kl:.4g}"
                say(f"step {log.step} of {steps}: {words}")

        yield show


def reporting_arguments(job: TrainingJob) -> TrainingArguments:
    """Return arguments for transformers' integrations; joins the processes of `accelerate launch`.

    Call this before other code uses the processes, because it sets them up again.

    Raises:
        UserError: `report_to` names an unknown integration.
    """
    chosen = job.chosen.args
    given = {"report_to": chosen.report_to, "run_name": chosen.run_name}
    try:
        args = TrainingArguments(**(command_defaults(job.work) | given))
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, ImportError) as error:
        raise UserError(f"report_to={chosen.report_to}: {first_line(error)}") from None
    return args


@contextmanager
def reporting(args: TrainingArguments) -> Iterator[Callable[[Row], None]]:
    """Yield a function that reports a row (`{"step": n, metric: value}`) as `report_to` says.

    Uses transformers' integrations, so `report_to` works as for every trainer.

    Raises:
        UserError: an integration is not installed.
    """
    try:
        callbacks = [cls() for cls in get_reporting_integration_callbacks(args.report_to)]
    except (RuntimeError, ImportError) as error:
        names = ", ".join(args.report_to)
        raise UserError(f"report_to={names}: {first_line(error)}") from None
    handler = CallbackHandler(callbacks, None, None, None, None)
    state, control = TrainerState(), TrainerControl()
    main = PartialState().is_main_process
    state.is_world_process_zero = state.is_local_process_zero = main
    begun = False

    def report(row: Row) -> None:
        nonlocal begun
        if not begun:
            handler.on_train_begin(args, state, control)
            begun = True
        state.global_step = row["step"]
        handler.on_log(args, state, control, {k: v for k, v in row.items() if k != "step"})

    yield report
    if begun:
        handler.on_train_end(args, state, control)
