"""Several reward models trained alike and made one, or one reward model with a posterior.

Member 0 has the run's seed, so that it equals the model that one training makes. Member k > 0 has
the seed `member_seed(seed, k)`: another new head (if the start has none) and another order of the
pairs. For "warm" only the order differs, because weights that are averaged must share their head's
start (arXiv 2401.12187 takes it from linear probing; we take the seed's small draw).

Members are trained one after another, each in `member-K` of the work folder. A finished member is
kept there, the current one goes on from its checkpoint.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from shiftrm.core.ensembles import mean_weights
from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, iterate_jsonl, write_jsonl
from shiftrm.models.combined import Ensemble, Member
from shiftrm.models.laplace import fit_posterior
from shiftrm.models.rewards import find_head
from shiftrm.models.scoring import mean_and_spread
from shiftrm.progress import task
from shiftrm.trainers.model_card import Outcome
from shiftrm.trainers.reward_configs import RewardConfig
from shiftrm.trainers.scored_pairs import load_scorer, measure_pairs, score_pairs, tokens_of_pairs
from shiftrm.trainers.training_log import TRAINING_LOG
from shiftrm.trainers.work_folder import MARK, member_folder, resumable

if TYPE_CHECKING:
    from shiftrm.trainers.training import TrainingJob

__all__ = [
    "EnsembleConfig",
    "LaplaceConfig",
    "check_head",
    "combine",
    "member_job",
    "member_seed",
    "train_members",
]

Train = Callable[["TrainingJob", Path | None], Outcome]
"""Trains one model into `job.finished`, from a checkpoint if one is given."""


@dataclass
class EnsembleConfig(RewardConfig):
    """`RewardConfig` with the setting of an ensemble."""

    ensemble_penalty: float = field(
        default=1.0, metadata={"help": "weight of the variance over an ensemble's members"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ensemble_penalty >= 0:
            raise UserError(f"ensemble_penalty is {self.ensemble_penalty}; it must be at least 0")


@dataclass
class LaplaceConfig(RewardConfig):
    """`RewardConfig` with the settings of a Laplace approximation."""

    laplace_penalty: float = field(
        default=3.0, metadata={"help": "posterior standard deviations that a reward is lowered by"}
    )
    laplace_prior: float = field(
        default=1.0, metadata={"help": "precision of the prior of every weight of the head"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.laplace_penalty >= 0:
            raise UserError(f"laplace_penalty is {self.laplace_penalty}; it must be at least 0")
        if not self.laplace_prior > 0:
            raise UserError(f"laplace_prior is {self.laplace_prior}; it must be above 0")


def member_seed(seed: int, number: int) -> int:
    """Return the seed of a member: the run's own for the first."""
    return random.Random(f"member/{number}/{seed}").getrandbits(31) if number else seed


def member_job(job: "TrainingJob", number: int) -> "TrainingJob":
    """Return the training of one member, in a folder of its own."""
    chosen = copy.deepcopy(job.chosen)
    args, work = chosen.args, member_folder(job.work, number)
    args.output_dir = str(work)
    if number:
        seed = args.seed if args.data_seed is None else args.data_seed
        args.data_seed = member_seed(seed, number)
        if job.training.combine != "warm":
            args.seed = member_seed(args.seed, number)
    return replace(job, work=work, chosen=chosen)


def train_members(job: "TrainingJob", train: Train) -> Outcome:
    """Train what is left of the members. Return the last one's outcome, with the mean loss."""
    processes, losses = PartialState(), []
    for number in range(job.training.members):
        member = member_job(job, number)
        mark = member.finished / MARK
        last = number == job.training.members - 1
        if mark.exists() and not last:  # the last one, which is at its end, tells the outcome again
            losses.append(json.loads(mark.read_text(encoding="utf-8"))["loss"])
            continue
        if processes.is_main_process:
            print(f"Reward model {number + 1} of {job.training.members}", flush=True)
            member.work.mkdir(parents=True, exist_ok=True)
        processes.wait_for_everyone()
        outcome = train(member, resumable(member.work))
        if mark.exists():  # trained before the interruption: its steps are not made again
            outcome = replace(outcome, loss=json.loads(mark.read_text(encoding="utf-8"))["loss"])
        losses.append(outcome.loss)
        if processes.is_main_process:
            atomic_write_text(mark, json.dumps({"loss": outcome.loss}))
            if (member.work / "runs").is_dir():  # what report_to=tensorboard wrote
                shutil.copytree(
                    member.work / "runs", job.work / "runs" / member.work.name, dirs_exist_ok=True
                )
            if not last:
                for checkpoint in member.work.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
        processes.wait_for_everyone()
    known = [loss for loss in losses if loss is not None]
    mean = sum(known) / len(known) if known else None
    return replace(outcome, seed=job.chosen.args.seed, before=None, after={}, loss=mean)


def check_head(combine: str | None, model: Any) -> None:
    """Refuse, before it is trained, a model from which the reward could not be made afterwards.

    Raises:
        UserError: it is for a posterior, and its head is not one linear layer.
    """
    head = find_head(model)
    head = getattr(head, "base_layer", head)  # an adapter's, which is merged at the end
    if combine == "laplace" and not isinstance(head, nn.Linear):
        raise UserError(
            f"laplace: the score head of {type(model).__name__} is a {type(head).__name__}, and a "
            "posterior needs one linear layer; choose another method, or a decoder"
        )


def combine(job: "TrainingJob", outcome: Outcome, *, evaluate: bool) -> Outcome:
    """Make one reward of what was trained, in `job.finished`; the main process does it.

    Args:
        evaluate: whether to measure the result on the held-out pairs.
    """
    if PartialState().is_main_process:
        with task("combining the reward models", None):
            words = COMBINATIONS[str(job.training.combine)](job)
        outcome = replace(outcome, combined=words)
        if evaluate:
            outcome = replace(outcome, before=None, after=measure_pairs(job))
    PartialState().wait_for_everyone()
    return outcome


# -- ways to combine -------------------------------------------------------------------------------


def _ensemble(job: "TrainingJob", kind: Any) -> str:
    """Put the members into the result, with the scale of each on the training pairs."""
    members = []
    for number in range(job.training.members):
        source = member_job(job, number).finished
        folder = job.finished / member_folder(job.work, number).name
        _copy(source, folder)
        mean, std = mean_and_spread(score_pairs(job, load_scorer(folder), "pairs")[1])
        members.append(Member(folder.name, mean, std))
    penalty = getattr(job.chosen.args, "ensemble_penalty", 1.0) if kind == "variance" else 0.0
    Ensemble(kind, tuple(members), penalty).write(job.finished)
    _mean_log(job)
    how = {
        "mean": "their mean",
        "min": "their minimum",
        "variance": f"their mean minus {penalty:g} times their variance",
    }[kind]
    return (
        f"An ensemble of {len(members)} reward models, with seeds of their own. Each is "
        f"standardised on the training pairs, and the reward is {how} (arXiv 2310.02743). "
        "shiftrm's commands read this folder; other libraries read the members."
    )


def _warm(job: "TrainingJob") -> str:
    """Write a checkpoint with the mean of the members' weights."""
    sources = [member_job(job, number).finished for number in range(job.training.members)]
    files = sorted(path.name for path in sources[0].glob("*.safetensors"))
    if not files or "adapter_model.safetensors" in files:
        raise UserError(
            "warm averages whole weights, and an adapter alone was saved (FSDP2 with LoRA); leave "
            "out use_peft, or train with one process or DDP"
        )
    _copy(sources[0], job.finished, leave_out=[*files, "adapter"])
    for name in files:
        averaged = mean_weights([load_file(source / name) for source in sources])
        save_file(averaged, job.finished / name, metadata={"format": "pt"})
    _mean_log(job)
    return (
        f"Its weights are the mean of those of {len(sources)} reward models with the same first "
        "head and other orders of the pairs (WARM, arXiv 2401.12187). The folder is an ordinary "
        "sequence-classification checkpoint: the logit is the reward."
    )


def _laplace(job: "TrainingJob") -> str:
    """Put the posterior of the head beside the model."""
    args = job.chosen.args
    scorer = load_scorer(job.finished)
    posterior = fit_posterior(
        scorer,
        tokens_of_pairs(job.tables["pairs"], scorer, name="pairs", max_length=args.max_length),
        prior=getattr(args, "laplace_prior", 1.0),
        penalty=getattr(args, "laplace_penalty", 3.0),
        batch_size=args.per_device_eval_batch_size,
    )
    posterior.write(job.finished)
    return (
        f"The reward is the logit minus {posterior.penalty:g} posterior standard deviations of a "
        f"Bayesian last layer (Laplace, {posterior.pairs} pairs, prior precision "
        f"{posterior.prior:g}). shiftrm's commands subtract them; other libraries read the logit."
    )


COMBINATIONS: dict[str, Callable[["TrainingJob"], str]] = {
    "mean": lambda job: _ensemble(job, "mean"),
    "min": lambda job: _ensemble(job, "min"),
    "variance": lambda job: _ensemble(job, "variance"),
    "warm": _warm,
    "laplace": _laplace,
}
"""By `kinds.COMBINE`: writes `job.finished` and returns what it is, for the card."""


def _copy(source: Path, target: Path, leave_out: Iterable[str] = ()) -> None:
    """Copy a member's folder by hard links where possible: the member stays until the end."""
    ignore = shutil.ignore_patterns(MARK, *leave_out)
    shutil.copytree(source, target, ignore=ignore, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _mean_log(job: "TrainingJob") -> None:
    """Write a training log with the means over the members, which log at the same steps."""
    logs = [  # empty where training ends before the first log
        [row for _, row in iterate_jsonl(member_job(job, number).finished / TRAINING_LOG)]
        for number in range(job.training.members)
    ]
    rows: list[Row] = []
    for entries in zip(*logs, strict=True):
        shared = [key for key in entries[0] if all(key in entry for entry in entries)]
        rows.append({key: sum(e[key] for e in entries) / len(entries) for key in shared})
    for row in rows:
        row["step"] = int(row["step"])
    (job.finished / TRAINING_LOG).unlink(missing_ok=True)  # it may be a member's, by a hard link
    write_jsonl(job.finished / TRAINING_LOG, rows)
