"""The reward functions that a monitor wraps: text rewards of ours, and those of TRL."""

import asyncio
import inspect
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.models.reward_functions import TokenReward
from shiftrm.models.scoring import Scorer
from shiftrm.monitor.signals import Score

__all__ = ["Reward", "TextReward", "TrlReward", "group_rows", "open_reward", "prompt_name"]

Contexts = Mapping[str, Mapping[str, Any]]
"""What a reward function also needs for a prompt (further columns), by `prompt_name`."""


class Reward(Protocol):
    """A wrapped reward function."""

    def batch(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Any, columns: Row
    ) -> Any:
        """Return what the function gives for a batch of TRL's, untouched."""

    def score(self, contexts: Contexts) -> Score:
        """Return a text reward, for texts that the policy did not write."""


class TextReward:
    """`(prompts, responses, *, finished)`: a `Scorer`, or a function like it.

    TRL does not say whether a response ended by itself, so all are scored as finished.
    """

    def __init__(self, function: Score) -> None:
        self.function = function

    def batch(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Any, columns: Row
    ) -> Any:
        ended = [True] * len(completions)
        return self.function(list(prompts), list(completions), finished=ended)

    def score(self, contexts: Contexts) -> Score:
        return self.function


class TrlReward:
    """A reward function of TRL: `(prompts, completions, completion_ids, **columns)`.

    One that is a coroutine function is run to its end. Texts that the policy did not write are
    scored by its method `score`, if it is a `TokenReward`; else with the columns of their prompt
    and None for `completion_ids`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._shared: Row = {}

    def batch(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Any, columns: Row
    ) -> Any:
        known = {"trainer_state": columns.get("trainer_state")}
        self._shared = {name: value for name, value in known.items() if value is not None}
        return finished_call(
            self.function, prompts=prompts, completions=completions, completion_ids=ids, **columns
        )

    def score(self, contexts: Contexts) -> Score:
        if isinstance(self.function, TokenReward):  # such as a client of `shiftrm serve`
            return self.function

        def of(prompts: Sequence[Any], responses: Sequence[Any], *, finished: Any) -> list[float]:
            given = [contexts.get(prompt_name(prompt), {}) for prompt in prompts]
            if not given:
                return []
            names = set.intersection(*map(set, given))
            columns = {name: [one[name] for one in given] for name in sorted(names)}
            silent = {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
            found = finished_call(
                self.function,
                prompts=list(prompts),
                completions=list(responses),
                completion_ids=None,
                **self._shared,
                **silent,
                **columns,
            )
            return [math.nan if reward is None else float(reward) for reward in found]

        return of


def finished_call(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a function, and wait for what it gives if that is a coroutine.

    All coroutines run in one event loop, in a thread of its own, as TRL runs them: clients that
    keep connections open belong to the loop in which they began.
    """
    found = function(*args, **settings)
    if not inspect.isawaitable(found):
        return found
    later = asyncio.run_coroutine_threadsafe(_awaited(found), _loop(os.getpid()))
    try:
        return later.result()
    except BaseException:
        later.cancel()
        raise


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of this process; a fork has none of its parent's threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="shiftrm-rewards", daemon=True).start()
    return loop


async def _awaited(found: Any) -> Any:
    return await found


def open_reward(reward: Any) -> Reward:
    """Return the reward function to wrap.

    Args:
        reward: see `DriftMonitor`. A function with a parameter `finished` and none called
            `completions` is a text reward, any other one of TRL's.

    Raises:
        UserError: a folder without a reward model, or an object that cannot be called.
    """
    if isinstance(reward, str | Path):
        return TextReward(Scorer.from_pretrained(reward).to_accelerator())
    if callable(getattr(reward, "batch", None)) and callable(getattr(reward, "score", None)):
        found: Reward = reward
        return found
    if isinstance(reward, Scorer):
        return TextReward(reward)
    if isinstance(reward, nn.Module):
        raise UserError(
            f"the monitor cannot wrap a {type(reward).__name__} without its tokenizer; give the "
            "model's folder, or Scorer(model, tokenizer)"
        )
    if not callable(reward):
        raise UserError(
            f"the monitor cannot wrap a {type(reward).__name__}; give a reward model's folder, a "
            "Scorer, or a reward function"
        )
    try:
        names = set(inspect.signature(reward).parameters)
    except (TypeError, ValueError):
        names = set()
    if "finished" in names and "completions" not in names:
        return TextReward(reward)
    return TrlReward(reward)


def name_of(reward: Any) -> str:
    """Return the name that TRL would give a reward function in its logs."""
    if isinstance(reward, str | Path):
        return str(reward).rstrip("/").split("/")[-1]
    if isinstance(reward, Scorer):
        name = getattr(reward.model.config, "name_or_path", "") or ""
        return str(name).rstrip("/").split("/")[-1] or "Scorer"
    reward = getattr(reward, "function", reward)
    while isinstance(reward, partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def is_model(reward: Reward) -> bool:
    """Whether this is a reward model, here or on a server, and no function of the user's."""
    return isinstance(getattr(reward, "function", None), Scorer | TokenReward)


def prompt_name(prompt: Any) -> str:
    """Return a text that is equal for equal prompts."""
    return json.dumps(prompt, sort_keys=True, default=repr)


def group_rows(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    rewards: Sequence[Any],
    columns: Mapping[str, Any],
    finished: Sequence[bool] | None = None,
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Return the groups of a batch, one for each prompt, and each prompt's further columns.

    Rewards that are None or not finite are left out with their responses: TRL uses None for a
    reward function that does not apply.

    Args:
        columns: those that hold one value for each response are kept.
    """
    size = len(prompts)
    kept = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list | tuple) and len(values) == size and name != "environments"
    }
    groups: dict[str, Row] = {}
    contexts: dict[str, dict[str, Any]] = {}
    ended = [True] * size if finished is None else finished
    for at, (prompt, response, reward, end) in enumerate(
        zip(prompts, responses, rewards, ended, strict=True)
    ):
        if reward is None or not math.isfinite(float(reward)):
            continue
        name = prompt_name(prompt)
        row = groups.setdefault(
            name, {"prompt": prompt, "responses": [], "finished": [], "rewards": []}
        )
        row["responses"].append(response)
        row["finished"].append(bool(end))
        row["rewards"].append(float(reward))
        contexts.setdefault(name, {key: values[at] for key, values in kept.items()})
    return list(groups.values()), contexts
