"""Training from files to a folder: what `shiftrm train` does."""

import dataclasses
import math
import os
import shutil
import typing
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml
from datasets import Dataset
from trl import RewardConfig

from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import COLUMNS, read_pairs
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, replace_directory
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer

OURS = ("output_dir", "save_strategy", "eval_strategy", "report_to")
"""Training arguments this command sets itself."""

LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_length": 1,
    "pad_to_multiple_of": 1,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "adam_epsilon": 0.0,
    "num_train_epochs": 0.0,
    "dataloader_num_workers": 0,
    "meta_batch_size": 1,
    "warmup_steps": 0.0,
    "max_grad_norm": 0.0,
    "center_rewards_coefficient": 0.0,
}
"""The smallest value of settings that transformers checks late or not at all."""

BELOW_ONE = ("adam_beta1", "adam_beta2")

NULL = ("", "~", "null", "none", "None")


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
    train_pairs = _table(pairs)
    heldout = _table(eval_pairs) if eval_pairs else None
    meta = read_groups(groups) if groups else None
    target = Path(os.path.abspath(output))  # which has a name, even where "." is given
    work = target.with_name(f".{target.name}.work")
    args = _arguments(settings, MetaRMConfig if meta else RewardConfig, work)
    if not _exists(model):
        raise UserError(f"{model}: no such folder; give a checkpoint folder or a hub name")
    try:
        trainer = _trainer(model, args, train_pairs, heldout, meta)
        result = trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"] if heldout else None
        finished = work / "finished"
        trainer.save_model(str(finished))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        replace_directory(finished, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    dropped = sum(sum(c.values()) for c in trainer.dropped_pairs.values())
    parts = [
        f"Trained on {len(trainer.train_dataset)} pairs ({dropped} dropped) for "
        f"{trainer.state.global_step} steps, mean loss {result.training_loss:.4f}.",
        f"Accuracy on {len(heldout)} held-out pairs: {accuracy:.3f}." if heldout else "",
        _meta_words(trainer),
        f"Reward model: {output}",
    ]
    return "\n".join(part for part in parts if part)


def _table(path: Path) -> Dataset:
    """The columns of a file of pairs that training reads, as one table."""
    rows = [{c: row[c] for c in COLUMNS if c in row} for row in read_pairs(path)]
    try:
        return Dataset.from_list(rows)
    except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's: say, mixed messages
        raise UserError(f"{path}: the rows do not fit one table ({_line(error)})") from None


def _trainer(
    model: str, args: Any, pairs: Dataset, heldout: Dataset | None, meta: list[Row] | None
) -> RewardTrainer:
    data = {"train_dataset": pairs, "eval_dataset": heldout}
    try:
        if meta is None:
            return RewardTrainer(model, args, **data)
        return MetaRMTrainer(model, args, meta_dataset=meta, **data)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{model}: cannot be loaded ({_line(error)})") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{model}: its weights do not fit a reward model of one label; give a policy, or a "
            "checkpoint with num_labels=1"
        ) from None
    except ValueError as error:  # how TRL says that settings do not fit the model
        if "`pad_token` ('None')" in str(error):
            raise UserError(
                f"{model}: the tokenizer has neither a pad nor an EOS token; set them and save it "
                "again, or give eos_token=..."
            ) from None
        raise UserError(f"{model}: cannot be trained with these settings: {error}") from None


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _arguments(settings: list[str], cls: type, work: Path) -> Any:
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    hints = typing.get_type_hints(cls)
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
        values[key] = _value(key, text, hints[key])
    try:
        return cls(**values)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"training settings: {error}") from None


def _value(key: str, text: str, hint: Any) -> Any:
    """The value of a setting, read as YAML; numbers and switches are checked against its type."""
    kinds = set(typing.get_args(hint)) or {hint}
    if NoneType in kinds and text in NULL:
        return None
    if kinds <= {str, NoneType}:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text}: the value is not valid YAML") from None
    number = _number(value)
    if number is not None and number < LEAST.get(key, -math.inf):
        raise UserError(f"{key} is {text}; it must be at least {LEAST[key]:g}")
    if not kinds <= {bool, int, float, NoneType}:  # choices, lists: transformers judges them
        return value
    if bool in kinds:
        number, expected = value if isinstance(value, bool) else None, "true or false"
    elif float in kinds:
        expected = "a number"
    else:
        number, expected = _whole(number), "a whole number"
    if number is None:
        null = ", or null" if NoneType in kinds else ""
        raise UserError(f"{key} is {text!r}; expected {expected}{null}")
    if key in BELOW_ONE and number >= 1:
        raise UserError(f"{key} is {text}; it must be below 1")
    return number


def _whole(number: float | None) -> int | None:
    return int(number) if number is not None and number.is_integer() else None


def _number(value: Any) -> float | None:
    """The finite number this is; YAML reads 5e-6 as text."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


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
