"""Stops a trainer of transformers after the monitor's alarm."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shiftrm.monitor.monitor import DriftMonitor

__all__ = ["StopOnDrift"]


class StopOnDrift(TrainerCallback):
    """Ends training, with a checkpoint, at the end of the step in which the alarm came.

    With several processes, all stop in the same step.

        trainer = GRPOTrainer(..., reward_funcs=[monitor], callbacks=[StopOnDrift(monitor)])
    """

    def __init__(self, monitor: DriftMonitor) -> None:
        self.monitor = monitor

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        stop = self.monitor.alarmed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor([float(stop)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            stop = bool(flag.item())
        if stop:
            control.should_save = True
            control.should_training_stop = True
        return control
