"""Load the models and prompts of a policy training, checking their configuration first."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from shiftrm.data.prompts import warn_of_joined_ends
from shiftrm.errors import UserError
from shiftrm.models.combined import Ensemble
from shiftrm.models.finite import require_finite_weights
from shiftrm.models.loading import is_ensemble
from shiftrm.models.rendering import Text, encode_prompt
from shiftrm.models.rope import context_limit
from shiftrm.models.sampling import load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.quantised import stay_differentiable_
from shiftrm.trainers.settings import Settings
from shiftrm.trainers.training import exists

__all__ = [
    "Inputs",
    "check_policy",
    "check_reward_model",
    "fitting_prompts",
    "load",
    "load_reference",
    "load_scorer",
    "same_model",
]

CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Inputs:
    """What a policy is optimised on: paths and names as given on the command line.

    Attributes:
        policy: checkpoint folder or hub name to start from.
        reference: the model to stay close to; None for the policy as it is.
        reward: a reward model; it may have another tokenizer and template than the policy.
        prompts, pairs: sources (`data.sources`).
        watch: a second reward model, or "gold": scores the roll-outs and trains nothing.
    """

    policy: str
    reference: str | None = None
    reward: str | None = None
    prompts: str | None = None
    pairs: str | None = None
    watch: str | None = None

    def check(self, method: str) -> None:
        """Check that these are the inputs of the method: pairs for dpo, else reward and prompts.

        Raises:
            UserError: names the option.
        """
        if method == "dpo":
            if self.pairs is None:
                raise UserError("dpo learns from preference pairs; give --pairs")
            for option in ("prompts", "reward", "watch"):
                if getattr(self, option) is not None:
                    raise UserError(f"dpo learns from --pairs alone; leave out --{option}")
            return
        if self.pairs is not None:
            raise UserError(f"{method} answers prompts; give --prompts, not --pairs")
        for option in ("reward", "prompts"):
            if getattr(self, option) is None:
                raise UserError(f"--{option} is missing; {method} needs a reward model and prompts")

    @property
    def reference_name(self) -> str:
        return self.policy if self.reference is None else self.reference


def check_policy(path: str, option: str) -> None:
    """Reject a path that is not a policy, before weights are loaded.

    Raises:
        UserError: no such folder, or a reward model.
    """
    if not exists(path):
        raise UserError(f"{path}: no such folder; give {option} a checkpoint folder or a hub name")
    if _architecture(path).endswith(CLASSIFIER):
        raise UserError(
            f"{path}: is a reward model ({_architecture(path)}); {option} takes a causal language "
            "model"
        )


def check_reward_model(path: str, option: str = "--reward") -> None:
    """Reject a path that is not a reward model, before weights are loaded.

    Raises:
        UserError: no such folder, a causal language model, or a broken ensemble.
    """
    if not exists(path):
        raise UserError(f"{path}: no such folder; give {option} a checkpoint folder or a hub name")
    if is_ensemble(path):
        Ensemble.read(Path(path))
    found = _architecture(path)
    if found and not found.endswith(CLASSIFIER):
        raise UserError(
            f"{path}: is not a reward model ({found}); make one with `shiftrm train --model {path}`"
        )


def _architecture(path: str) -> str:
    """Return the class named in a local folder's config.json; "" if there is none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return str((config.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""  # loading will report the error


def same_model(first: str, second: str) -> bool:
    """Whether two names refer to one folder or hub model."""
    return first == second or (
        os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second)
    )


def load(path: str, chosen: Settings) -> tuple[Any, Any]:
    """Call `load_policy` with the options of the settings, including quantisation.

    Raises:
        UserError: as `load_policy`, or weights that are not finite.
    """
    options = dict(chosen.model_options)
    if getattr(chosen.args, "trust_remote_code", False):
        options["trust_remote_code"] = True
    quantization = chosen.trainer_options.get("quantization_config")
    if quantization is not None:
        options["quantization_config"] = quantization
    model, tokenizer = load_policy(path, **options)
    stay_differentiable_(model)
    require_finite_weights(model, path)
    return model, tokenizer


def load_reference(path: str, chosen: Settings, tokenizer: Any) -> Any:
    """Load the model that the policy must stay close to.

    Raises:
        UserError: its vocabulary differs from the policy's, so no KL is defined.
    """
    model, theirs = load(path, chosen)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{path}: has another vocabulary than the policy, so there is no KL between them; give "
            "--reference a model that the policy was made from"
        )
    return model


def load_scorer(path: str, *, batch_size: int) -> Scorer:
    """Load a reward model as a text reward on this process's device.

    Args:
        batch_size: responses per pass; changes memory, not the rewards.

    Raises:
        UserError: as `Scorer.from_pretrained`, or weights that are not finite.
    """
    scorer = Scorer.from_pretrained(path)
    require_finite_weights(scorer.model, path)
    scorer.model.to(PartialState().device)
    scorer.batch_size = batch_size
    return scorer


def fitting_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    room: int,
    limit: int | None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """Keep prompts of at most `limit` tokens that leave `room` tokens in the context.

    The main process warns of prompt ends that the tokenizer merges with a response.

    Returns:
        The prompts, and the number of dropped ones by reason.

    Raises:
        UserError: none is left, or the tokenizer or its chat template cannot encode one.
    """
    context = context_limit(model.config)
    most = None if context is None else context - room
    options = dict(template_options or {})
    lengths = []
    for row, prompt in enumerate(prompts):
        try:
            lengths.append(len(encode_prompt(tokenizer, prompt, template_options=options)))
        except UserError as error:
            raise UserError(f"prompts, row {row}: {error}") from None
    reasons = {}
    if limit is not None:
        reasons[f"longer than max_prompt_length={limit} tokens"] = limit
    if most is not None:
        reasons[f"that leave less than {room} of the {context} tokens of the context"] = most
    kept = list(zip(prompts, lengths, strict=True))
    dropped = {"without tokens": sum(length == 0 for length in lengths)}
    kept = [(prompt, length) for prompt, length in kept if length]
    for reason, longest in reasons.items():
        before = len(kept)
        kept = [(prompt, length) for prompt, length in kept if length <= longest]
        dropped[reason] = before - len(kept)
    if not kept:
        words = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(f"no prompt is left after dropping {words}")
    if PartialState().is_main_process:
        warn_of_joined_ends(tokenizer, [prompt for prompt, _ in kept], source="--prompts")
    return [prompt for prompt, _ in kept], {r: n for r, n in dropped.items() if n}
