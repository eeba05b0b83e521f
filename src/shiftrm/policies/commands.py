"""The implementation of `shiftrm sft` and `shiftrm optimise`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.data.demonstrations import COLUMNS as DEMONSTRATION_COLUMNS
from shiftrm.data.demonstrations import read_demonstrations
from shiftrm.data.pairs import COLUMNS as PAIR_COLUMNS
from shiftrm.data.pairs import read_pairs
from shiftrm.data.prompts import read_prompts
from shiftrm.errors import UserError, suggest
from shiftrm.models.rendering import Text
from shiftrm.policies import configs
from shiftrm.policies.loading import (
    Inputs,
    check_policy,
    fitting_prompts,
    load,
    load_reference,
    same_model,
)
from shiftrm.policies.ppo_command import reporting_arguments, run_ppo
from shiftrm.policies.text_rewards import check_watch, open_watch
from shiftrm.policies.trl_run import Plan, run_in_work, run_trl
from shiftrm.policies.trl_trainers import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer
from shiftrm.trainers.pair_batches import table
from shiftrm.trainers.training import TrainingJob, begin

__all__ = ["METHODS", "Inputs", "elsewhere", "optimise", "sft"]

METHODS: dict[str, Any] = {
    "ppo": configs.PPOSettings,
    "rloo": configs.RLOOConfig,
    "grpo": configs.GRPOConfig,
    "dpo": configs.DPOConfig,
}
"""The configuration class of each optimisation method."""

TRAINERS = {"rloo": RLOOTrainer, "grpo": GRPOTrainer}


def sft(
    model: str,
    *,
    demonstrations: str,
    output: Path,
    settings: Mapping[str, Any],
    command: str | None = None,
) -> str | None:
    """Fine-tune a language model on demonstrations; the output folder appears when complete.

    Until then all files are in `.NAME.work` beside it. The same call resumes from the last complete
    checkpoint there.

    Args:
        model: checkpoint folder or hub name to start from.
        demonstrations: a source (`data.sources`) of `data.demonstrations` rows.
        output: folder to write: an ordinary causal language model.
        settings: values by field of `trl.SFTConfig` and `trl.ModelConfig`.
        command: the command that the model card gives to repeat the run.

    Returns:
        A summary text; None except on the main process.

    Raises:
        UserError: bad data or settings, an output that is not empty, out of memory, a gradient
            that is not finite, or a full disk. Nothing but complete checkpoints is left behind.
    """
    job = _begin("sft", model, "--model", output, settings, configs.SFTConfig, command)
    rows = read_demonstrations(demonstrations)
    job.tables["demonstrations"] = table(demonstrations, rows, DEMONSTRATION_COLUMNS)
    job.add_data("demonstrations", demonstrations, rows)

    def make() -> SFTTrainer:
        loaded, tokenizer = load(model, job.chosen)
        return SFTTrainer(
            loaded,
            job.chosen.args,
            train_dataset=job.tables["demonstrations"],
            processing_class=tokenizer,
            peft_config=job.chosen.trainer_options.get("peft_config"),
        )

    return run_in_work(
        job, lambda checkpoint: run_trl(job, Plan("sft", make), checkpoint), more={"method": "sft"}
    )


def optimise(
    method: str,
    inputs: Inputs,
    *,
    output: Path,
    settings: Mapping[str, Any],
    command: str | None = None,
) -> str | None:
    """Optimise a policy against a reward model or on pairs.

    Resumes and fails as `sft` does.

    Args:
        method: a key of `METHODS`.
        settings: values by field of the method's configuration class and `trl.ModelConfig`.

    Raises:
        UserError: as `sft`; an unknown method; or an input of the method is missing.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}{suggest(method, list(METHODS))}")
    inputs.check(method)
    job = _begin(method, inputs.policy, "--policy", output, settings, METHODS[method], command)
    if inputs.reference is not None:
        check_policy(inputs.reference, "--reference")
    more = {"method": method, "reference": inputs.reference, "reward": inputs.reward}
    more |= {"watch": inputs.watch} if inputs.watch is not None else {}
    if method == "dpo":
        plan = _dpo_plan(job, inputs)
        return run_in_work(job, lambda checkpoint: run_trl(job, plan, checkpoint), more=more)
    check_watch(str(inputs.reward), "--reward")
    if inputs.watch is not None:
        check_watch(inputs.watch)
    prompts = _prompts(job, str(inputs.prompts))
    if method == "ppo":
        config = configs.ppo_config(job.chosen.given)
        args = reporting_arguments(job)
        return run_in_work(
            job, lambda kept: run_ppo(job, inputs, config, prompts, args, kept), more=more
        )

    def train(checkpoint: Path | None) -> Any:
        return run_trl(job, _rewarded_plan(job, method, prompts, inputs), checkpoint)

    return run_in_work(job, train, more=more)


def _begin(
    method: str,
    model: str,
    option: str,
    output: Path,
    settings: Mapping[str, Any],
    config: type,
    command: str | None,
) -> TrainingJob:
    job = begin(
        model,
        output=output,
        settings=settings,
        config=config,
        command=command,
        command_name="sft" if method == "sft" else "optimise",
        task_type="CAUSAL_LM",
        refused=configs.refused(method),
        elsewhere=elsewhere(method),
    )
    check_policy(model, option)
    return job


def elsewhere(method: str) -> dict[str, str]:
    """Return settings of other methods, each with a message that names the method."""
    return {
        key: f"{method} has none; it is a setting of {other}"
        for other, cls in METHODS.items()
        if method != "sft" and other != method
        for key in (option.name for option in dataclasses.fields(cls))
    }


def _prompts(job: TrainingJob, source: str) -> list[Text]:
    _, found = read_prompts(source)
    rows = [{"prompt": prompt} for prompt in found]
    job.tables["prompts"] = table(source, rows, ("prompt",))
    job.add_data("prompts", source, rows)
    return found


def _dpo_plan(job: TrainingJob, inputs: Inputs) -> Plan:
    source, name = str(inputs.pairs), inputs.reference_name
    rows = read_pairs(source)
    job.tables["pairs"] = table(source, rows, PAIR_COLUMNS)
    job.add_data("pairs", source, rows)
    args, apart = job.chosen.args, not same_model(name, job.model)
    lora = job.chosen.model.use_peft

    def make() -> DPOTrainer:
        model, tokenizer = load(job.model, job.chosen)
        beside = apart or not (lora or args.precompute_ref_log_probs)
        return DPOTrainer(
            model,
            load_reference(name, job.chosen, tokenizer) if beside else None,
            args,
            train_dataset=job.tables["pairs"],
            processing_class=tokenizer,
            peft_config=job.chosen.trainer_options.get("peft_config"),
        )

    return Plan(
        "dpo",
        make,
        prompts=[row["prompt"] for row in rows if row.get("prompt") is not None],
        reference=name,
        load_reference=lambda: load(name, job.chosen)[0],
        apart=apart,
        kl_samples=args.kl_samples,
        max_new_tokens=args.max_completion_length,
    )


def _rewarded_plan(job: TrainingJob, method: str, prompts: Sequence[Text], inputs: Inputs) -> Plan:
    args, name = job.chosen.args, inputs.reference_name
    apart = not same_model(name, job.model)
    scorer = open_watch(str(inputs.reward), batch_size=args.per_device_train_batch_size)
    model, tokenizer = load(job.model, job.chosen)
    kept, dropped = fitting_prompts(
        model,
        tokenizer,
        prompts,
        room=args.max_completion_length,
        limit=args.max_prompt_length,
        template_options=args.chat_template_kwargs,
    )

    def make() -> Any:
        beside = args.beta != 0.0 and (apart or not job.chosen.model.use_peft)
        return TRAINERS[method](
            model,
            load_reference(name, job.chosen, tokenizer) if beside else None,
            args,
            reward_fn=scorer,
            watch_fn=None if inputs.watch is None else open_watch(inputs.watch),
            tokenizer=tokenizer,
            train_dataset=table("prompts", [{"prompt": p} for p in kept], ("prompt",)),
            peft_config=job.chosen.trainer_options.get("peft_config"),
        )

    return Plan(
        method,
        make,
        prompts=kept,
        reference=name,
        reward=inputs.reward,
        load_reference=lambda: load(name, job.chosen)[0],
        apart=apart,
        kl_samples=args.kl_samples,
        max_new_tokens=args.max_completion_length,
        dropped=dropped,
    )
