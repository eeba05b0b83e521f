"""Check settings that transformers judges only when training begins, after the data is read."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import trainer_log_levels

from shiftrm.errors import UserError, first_line, suggest

__all__ = ["check_late_settings"]

_STEPS = 1000
"""Steps of the schedule that is made to see whether it can be."""

_OF_LAYERS = ("galore", "apollo", "lomo", "grokadamw")
"""Optimizers that need the model itself."""


def check_late_settings(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Reject settings of which no optimizer or schedule can be made.

    Args:
        given: what the user set, as it is named in messages.

    Raises:
        UserError: names the setting.
    """
    for key in ("log_level", "log_level_replica"):
        value = given.get(key)
        if value is not None and value not in trainer_log_levels:
            raise UserError(f"{key} is {value!r}{suggest(str(value), list(trainer_log_levels))}")
    if args.optim_args and not all("=" in part for part in args.optim_args.split(",")):
        raise UserError(f"optim_args is {args.optim_args!r}; give NAME=VALUE,NAME=VALUE")
    _check_optimizer(args)
    _check_schedule(args)


def _check_optimizer(args: TrainingArguments) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    if any(word in name for word in _OF_LAYERS):
        return
    said = f"optim={name}" + (f" with optim_args={args.optim_args}" if args.optim_args else "")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(1, 1))
    except Exception as error:  # the user's words are all that it depends on
        raise UserError(f"{said}: cannot be used: {first_line(error).rstrip('.')}") from error


def _check_schedule(args: TrainingArguments) -> None:
    kwargs: Any = args.lr_scheduler_kwargs
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=args.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_scheduler(
                name,
                optimizer,
                num_warmup_steps=min(args.get_warmup_steps(_STEPS), _STEPS),
                num_training_steps=_STEPS,
                scheduler_specific_kwargs=kwargs,
            )
    except Exception as error:
        if kwargs:
            raise UserError(f"lr_scheduler_kwargs: {first_line(error).rstrip('.')}") from error
        raise UserError(
            f"lr_scheduler_type={name}: {first_line(error).rstrip('.')}; see lr_scheduler_kwargs"
        ) from error
