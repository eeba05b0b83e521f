"""Rewards from several models, or from one and a posterior: folders that `Scorer` reads, too.

An ensemble is a folder with `ensemble.json` and one reward model in each subfolder that it names.
A Laplace approximation is a reward model with `laplace.json` and `laplace.safetensors` beside its
weights (`models/laplace.py`).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.core.ensembles import KINDS, Kind, combined_rewards
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.models import laplace
from shiftrm.models.loading import ENSEMBLE, is_ensemble
from shiftrm.models.rewards import sequence_rewards
from shiftrm.models.scoring import Scorer

__all__ = ["Ensemble", "EnsembleScorer", "Member", "open_combined", "refuse_combined"]


@dataclass(frozen=True)
class Member:
    """A reward model of an ensemble.

    Attributes:
        folder: name of the subfolder.
        mean, std: of its rewards for the responses of the training pairs.
    """

    folder: str
    mean: float
    std: float


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble.json` says: see `core.ensembles.combined_rewards`."""

    kind: Kind
    members: tuple[Member, ...]
    penalty: float = 0.0

    def write(self, folder: Path) -> None:
        atomic_write_text(folder / ENSEMBLE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Ensemble":
        """Read and check the file; every member's folder must be there.

        Raises:
            UserError: it is broken, or a member is missing.
        """
        path = folder / ENSEMBLE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            members = tuple(
                Member(str(m["folder"]), float(m["mean"]), float(m["std"])) for m in data["members"]
            )
            found = cls(data["kind"], members, float(data["penalty"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            found = None
        if found is None or not found._is_valid():
            raise UserError(f"{path}: is broken; train the ensemble again")
        for member in found.members:
            inside = folder / member.folder
            if not any((inside / n).is_file() for n in ("config.json", "adapter_config.json")):
                raise UserError(
                    f"{folder}: is an ensemble without its member {member.folder!r}; copy the "
                    "whole folder, or train the ensemble again"
                )
        return found

    def _is_valid(self) -> bool:
        names = [member.folder for member in self.members]
        numbers = [self.penalty, *(n for m in self.members for n in (m.mean, m.std))]
        return (
            self.kind in KINDS
            and bool(names)
            and len(set(names)) == len(names)
            and all(name != ".." and Path(name).name == name for name in names)  # nowhere else
            and all(map(math.isfinite, numbers))
            and all(member.std > 0 for member in self.members)
        )


class EnsembleScorer(Scorer):
    """Several reward models as one; `model` holds all of them."""

    def __init__(self, members: Sequence[Scorer], ensemble: Ensemble, name: str) -> None:
        first = members[0]
        vocabulary = first.tokenizer.get_vocab()
        for member, said in zip(members, ensemble.members, strict=True):
            if member.tokenizer.get_vocab() != vocabulary:
                raise UserError(
                    f"{name}: {said.folder} has another tokenizer than {ensemble.members[0].folder}"
                    "; the members of an ensemble must share one"
                )
        self.model: Any = nn.ModuleList(member.model for member in members)
        self.model.config = first.model.config
        self._adopt(first)
        self.ensemble = ensemble
        self._means_E = torch.tensor([member.mean for member in ensemble.members])
        self._stds_E = torch.tensor([member.std for member in ensemble.members])

    def _rewards(
        self, input_ids: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]]
    ) -> Tensor:
        rewards_EB = torch.stack([sequence_rewards(m, input_ids, mask) for m in self.model])
        return combined_rewards(
            rewards_EB,
            self._means_E.to(rewards_EB),
            self._stds_E.to(rewards_EB),
            kind=self.ensemble.kind,
            penalty=self.ensemble.penalty,
        )


def refuse_combined(path: str | Path) -> None:
    """Refuse a folder of which training would continue a part only, and lose the rest.

    Raises:
        UserError: it is an ensemble, or has a posterior.
    """
    if is_ensemble(path):
        raise UserError(
            f"{path}: is an ensemble of reward models, and training starts from one model; give "
            f"one of its members, such as {Path(path) / 'member-0'}"
        )
    if laplace.has_posterior(path):
        raise UserError(
            f"{path}: lowers its rewards by a posterior (laplace.json), which training would "
            "neither keep nor fit anew; give a copy of the folder without laplace.json and "
            "laplace.safetensors, which is the plain reward model"
        )


def open_combined(path: str | Path, load: Callable[[str | Path], Scorer]) -> Scorer:
    """Return the scorer of a path: an ensemble, a Laplace approximation or an ordinary checkpoint.

    Args:
        load: loads an ordinary checkpoint.

    Raises:
        UserError: a file is broken, or a member is missing.
    """
    if is_ensemble(path):
        folder = Path(path)
        ensemble = Ensemble.read(folder)
        members = [load(folder / member.folder) for member in ensemble.members]
        return EnsembleScorer(members, ensemble, str(path))
    posterior = laplace.read_posterior(path)
    scorer = load(path)
    return scorer if posterior is None else laplace.LaplaceScorer(scorer, posterior, str(path))
