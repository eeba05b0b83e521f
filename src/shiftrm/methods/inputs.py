"""What `shiftrm adapt` gives a method: the checkpoint to start from, and models that it uses."""

from dataclasses import replace
from typing import TypeVar

from shiftrm.errors import UserError
from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import Training
from shiftrm.trainers.training import TrainingRequest

R = TypeVar("R", bound=TrainingRequest)


def adaptable(name: str) -> tuple[Method, Training]:
    """Return the method and its classes; refuse one that cannot adapt to unlabelled groups."""
    method = METHODS.get(name)
    if "gold" in method.needs:
        raise UserError(
            f"--method {name}: there is no model to adapt; in recipes it stands for the gold "
            "world's own reward"
        )
    if method.training is None:
        raise UserError(f"--method {name}: keeps the reward model as it is; nothing to adapt")
    if "labels" in method.needs:
        raise UserError(
            f"--method {name}: needs new labels; have people compare responses (`shiftrm evaluate "
            "sheet` writes the questions), add them to --pairs and give --method retrained"
        )
    return method, method.classes()


def policy_note(name: str) -> str | None:
    """Return what training a reward model by this method leaves to the policy's training."""
    method = METHODS.get(name)
    settings = " ".join(f"{key}={value}" for key, value in method.policy_settings.items())
    left = []
    if settings:
        left.append(f"give `shiftrm optimise ppo` {settings}")
    if method.reference_reset:
        left.append("give `shiftrm optimise` the round's first policy as --reference")
    if not left:
        return None
    return f"Method {name} also concerns the policy's training: {', and '.join(left)}"


def with_models(
    request: R, name: str, method: Method, training: Training, *, sampled: str | None
) -> R:
    """Return the request with the start and the models that the method uses, and no others.

    The reward model that is adapted is the last round's.

    Args:
        name: the method's, for errors.
        sampled: the policy that the groups are sampled from, which is today's; None if they are
            given.

    Raises:
        UserError: says which flag is missing, or given and not used.
    """
    today = request.policy or sampled
    if method.start == "policy" and today is None:
        raise UserError(f"method {name}: starts from today's policy; give --policy")
    unused = method.start == "policy" or sampled is not None  # then --policy has another use
    policy = today if "policy" in training.takes or not unused else None
    reward = request.model if "reward" in training.takes else None
    groups = (request.groups or sampled) if training.takes_groups else None
    given = {"groups": groups, "policy": policy, "reference": request.reference, "reward": reward}
    training.check(name, given)
    model = today if method.start == "policy" else request.model
    return replace(request, model=model or request.model, policy=policy, reward=reward)
