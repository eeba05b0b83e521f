"""Training from files to a folder: what `shiftrm train` does."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from trl import RewardConfig

from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import read_pairs
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, replace_directory
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer

OURS = ("output_dir", "save_strategy", "eval_strategy", "report_to")
"""Training arguments this command sets itself."""


def train(
    model: str,
    *,
    pairs: Path,
    output: Path,
    eval_pairs: Path | None = None,
    groups: Path | None = None,
    settings: list[str],
) -> str:
    """Train a reward model from files; the folder appears when training has ended well.

    Args:
        model: checkpoint folder or hub name to start from; a head it lacks is made anew.
        pairs, eval_pairs: preference pairs, JSONL.
        groups: unlabelled responses of the policy, JSONL; given, every step is a MetaRM step.
        output: folder to write: an ordinary sequence-classification checkpoint.
        settings: `key=value` training arguments.

    Returns:
        A summary in words.

    Raises:
        UserError: bad files, unknown settings, or an output folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already there and not empty; choose another --output")
    rows = read_pairs(pairs)
    evaluation = read_pairs(eval_pairs) if eval_pairs else None
    meta = read_groups(groups) if groups else None
    work = output.with_name(f".{output.name}.work")
    args = _arguments(settings, MetaRMConfig if meta else RewardConfig, work)
    if not _exists(model):
        raise UserError(f"{model}: no such folder; give a checkpoint folder or a hub name")
    try:
        trainer = _trainer(model, args, rows, evaluation, meta)
        result = trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"] if evaluation else None
        finished = work / "finished"
        trainer.save_model(str(finished))
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        replace_directory(finished, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    dropped = sum(sum(c.values()) for c in trainer.dropped_pairs.values())
    parts = [
        f"Trained on {len(trainer.train_dataset)} pairs ({dropped} dropped) for "
        f"{trainer.state.global_step} steps, mean loss {result.training_loss:.4f}.",
        f"Accuracy on {len(evaluation)} held-out pairs: {accuracy:.3f}." if evaluation else "",
        _meta_words(trainer),
        f"Reward model: {output}",
    ]
    return "\n".join(part for part in parts if part)


def _trainer(
    model: str, args: Any, rows: list[Row], evaluation: list[Row] | None, meta: list[Row] | None
) -> RewardTrainer:
    data: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "eval_dataset": None if evaluation is None else Dataset.from_list(evaluation),
    }
    try:
        if meta is None:
            return RewardTrainer(model, args, **data)
        return MetaRMTrainer(model, args, meta_dataset=meta, **data)
    except OSError as error:
        raise UserError(f"{model}: cannot be loaded ({str(error).splitlines()[0]})") from None


def _arguments(settings: list[str], cls: type, work: Path) -> Any:
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    values: dict[str, Any] = {"output_dir": str(work), "save_strategy": "no", "report_to": "none"}
    if torch.accelerator.current_accelerator() is None:  # TRL's bf16 default needs one
        values |= {"use_cpu": True, "bf16": False}
    for word in settings:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not a setting; write key=value, as learning_rate=5e-6")
        if key in OURS or key not in known:
            hint = "; this command sets it" if key in OURS else suggest(key, known)
            raise UserError(f"unknown setting {key!r}{hint}")
        values[key] = _number(yaml.safe_load(text))
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"training settings: {error}") from None


def _number(value: Any) -> Any:
    """YAML reads 5e-6 as text; training arguments want the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _exists(model: str) -> bool:
    """A local folder, or a name that only the hub can judge (`owner/name`)."""
    return Path(model).is_dir() or (model.count("/") == 1 and not model.startswith((".", "/")))


def _meta_words(trainer: RewardTrainer) -> str:
    logs = [log for log in trainer.state.log_history if "meta_influence" in log]
    if not logs:
        return ""
    influence = sum(log["meta_influence"] for log in logs) / len(logs)
    advice = (
        " That is too small to matter: raise meta_learning_rate, or use preset=scale_free."
        if influence < 1e-3
        else ""
    )
    return f"The meta step changed the gradient by {influence:.1e} of its length.{advice}"
