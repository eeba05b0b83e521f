"""One run of a reward trainer, from a checked job to the folder of the finished model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import PrinterCallback

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.progress import task
from shiftrm.trainers import work_folder
from shiftrm.trainers.members import check_head
from shiftrm.trainers.model_card import Outcome, measurements
from shiftrm.trainers.progress import SHOWN, ProgressInWords
from shiftrm.trainers.quantised import count, merged
from shiftrm.trainers.reward import RewardTrainer
from shiftrm.trainers.training_log import write_training_log

if TYPE_CHECKING:
    from shiftrm.trainers.training import TrainingJob

__all__ = ["add_callbacks", "train_model", "write_model"]


def train_model(
    job: "TrainingJob", groups: list[Row] | None, checkpoint: Path | None, *, evaluate: bool
) -> Outcome:
    """Train one model and write it to `job.finished`."""
    used = job.chosen.beyond_defaults()
    with task("loading the model and the data", None):
        trainer = _trainer(job, groups)
    check_head(job.training.combine, trainer.model)
    trainer.choose_checkpointing()
    if trainer.accelerator.is_main_process:
        print(_opening(trainer), flush=True)
    try:
        before, result, after = _run(trainer, checkpoint, evaluate=evaluate)
    except (ImportError, NotImplementedError) as error:  # a missing optimizer or kernel
        raise job.chosen.explain(job.model, error) from error
    outcome = Outcome(
        **job.facts(),
        settings=used,
        seed=job.chosen.args.seed,
        before=before,
        after=after,
        **measurements(trainer, result),
    )
    write_model(trainer, job.finished)
    if trainer.accelerator.is_main_process:
        start: Row = {"step": 0}  # the trainer's log begins with training
        for name, metrics in (before or {}).items():
            prefix = f"eval_{name}_" if name else "eval_"
            start |= {f"{prefix}{key}": value for key, value in metrics.items()}
        history = [*([start] if before else []), *trainer.state.log_history]
        write_training_log(job.finished, history)
    return outcome


def _trainer(job: "TrainingJob", groups: list[Row] | None) -> RewardTrainer:
    model, chosen = job.model, job.chosen
    heldout = {
        name.removeprefix("eval").strip(): t for name, t in job.tables.items() if name != "pairs"
    }
    args = chosen.args
    args.model_init_kwargs = chosen.model_options
    data = {
        "train_dataset": job.tables["pairs"],
        "eval_dataset": heldout.get("", heldout or None),
        **chosen.trainer_options,
    }
    data |= job.models
    try:
        if job.training.takes_groups:
            data["meta_dataset"] = groups
        trainer: RewardTrainer = job.training.trainer(model, args, **data)
    except UserError:
        raise
    except Exception as error:
        raise chosen.explain(model, error) from error
    add_callbacks(trainer)
    return trainer


def _opening(trainer: RewardTrainer) -> str:
    """Return one line on what is trained and how."""
    args, parameters = trainer.args, list(trainer.model.parameters())
    total = sum(map(count, parameters))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    what = f"all {total:,} weights" if trained == total else f"{trained:,} of {total:,} weights"
    default = "" if args.learning_rate_given else ", the default for this"
    checkpointing = "on" if args.activation_checkpointing else "off"
    return (
        f"Training {what}: learning_rate {args.learning_rate:g}{default}; gradient checkpointing "
        f"{checkpointing}."
    )


def add_callbacks(trainer: Any, shown: Sequence[str] = SHOWN) -> None:
    """Add callbacks that print progress without a bar and mark complete checkpoints.

    Args:
        shown: metrics to include in progress lines.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressInWords(shown, speaks=trainer.args.disable_tqdm))
    trainer.add_callback(work_folder.MarkCompleteCheckpoints())


def _run(
    trainer: RewardTrainer, checkpoint: Path | None, *, evaluate: bool
) -> tuple[dict[str, Any] | None, Any, dict[str, Any]]:
    """Evaluate, train (from the checkpoint, if given) and evaluate again."""
    before = None
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # by train() only
    if evaluate and not sharded:
        before = _evaluations(trainer)
    if checkpoint is not None and trainer.accelerator.is_main_process:
        print(f"Continuing from {checkpoint}", flush=True)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return before, result, _evaluations(trainer) if evaluate else {}


def _evaluations(trainer: RewardTrainer) -> dict[str, Any]:
    """Return the metrics of each held-out set by name, without prefix."""
    sets = trainer.eval_dataset
    if sets is None:
        return {}
    names = list(sets) if isinstance(sets, dict) else [""]
    found = {}
    for name in names:
        prefix = f"eval_{name}" if name else "eval"
        with task(f"measuring {name or 'the held-out pairs'}", None):
            metrics = trainer.evaluate(name or None, metric_key_prefix=prefix)
        found[name] = {
            key.removeprefix(f"{prefix}_").removeprefix("eval_"): value
            for key, value in metrics.items()
        }
    return found


def write_model(trainer: Any, finished: Path) -> None:
    """Write the complete model and its tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if hasattr(model, "merge_and_unload") and not sharded:
        # The adapter's head alone does not fit a policy, whose configuration has two labels.
        adapter = finished / "adapter"
        trainer.save_model(str(adapter))
        if trainer.args.should_save:
            merged(model, adapter).save_pretrained(finished)
            trainer.processing_class.save_pretrained(finished)
    else:
        trainer.save_model(str(finished))
    trainer.accelerator.wait_for_everyone()
