"""A monitor in trainers that call their reward function for one response at a time.

OpenRLHF (read at 3c3be62, August 2026): `--reward.remote_url` names a Python file whose
`reward_func(queries, prompts, labels)` is called in threads with lists of one text each; a query is
the prompt and the response, decoded with its special tokens. It returns `rewards`, `scores` and
`extra_logs`, whose names must be the same for all samples.

verl (read at b178a3c, January 2026): `custom_reward_function.path` names a Python file whose
`compute_score(data_source=, solution_str=, ground_truth=, extra_info=)` is awaited if it is a
coroutine function, else called in a thread. It returns a number, or a mapping with `score`.

These calls do not say where a step ends, so the number of responses in a step is given. Where
several workers load the file, one of them watches its share.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shiftrm.errors import UserError
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.rewards import Contexts, finished_call, prompt_name
from shiftrm.monitor.signals import Score

__all__ = ["openrlhf_reward", "verl_reward"]


def _check(step_size: int) -> None:
    if not isinstance(step_size, int) or step_size < 1:
        raise UserError(f"step_size is {step_size}; give the responses of a step, such as 128 * 8")


# -- OpenRLHF --------------------------------------------------------------------------------------


class _OpenRLHF:
    """A user's `reward_func`, as a `Reward` of a monitor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def batch(self, *_: Any) -> Any:
        raise UserError("this monitor wraps a reward function of OpenRLHF, and TRL called it")

    def score(self, contexts: Contexts) -> Score:
        def of(prompts: Sequence[str], responses: Sequence[str], *, finished: Any) -> list[float]:
            given = [contexts.get(prompt_name(prompt), {}) for prompt in prompts]
            ends = [one.get("end", "") for one in given]
            queries = [
                p + r + e * end
                for p, r, e, end in zip(prompts, responses, ends, finished, strict=True)
            ]
            labels = [one.get("label") for one in given]
            return [
                _first(self.function([q], [p], [label]))
                for q, p, label in zip(queries, prompts, labels, strict=True)
            ]

        return of


def _first(found: Any) -> float:
    """Return the single reward in what a `reward_func` gave."""
    value = found.get("rewards") if isinstance(found, Mapping) else found
    return float(torch.as_tensor(value, dtype=torch.float64).flatten()[0])


def openrlhf_reward(
    monitor: DriftMonitor, *, step_size: int, end_of_text: str = ""
) -> Callable[..., dict[str, Any]]:
    """Return a `reward_func` for OpenRLHF's file.

    The monitor wraps a reward model, or a `reward_func` of the user's given through
    `DriftMonitor(openrlhf(function), ...)`, whose mapping is passed on with four numbers more under
    `extra_logs`.

    Args:
        step_size: responses of a step over all prompts, such as rollout batch * samples a prompt.
        end_of_text: the policy's EOS token as text. A query that ends with it was finished, and the
            reward model does not see it; "": every response counts as finished.
    """
    _check(step_size)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Any]:
        split = [_split(q, p, end_of_text) for q, p in zip(queries, prompts, strict=True)]
        if isinstance(monitor.reward, _OpenRLHF):
            given = monitor.reward.function(queries, prompts, labels)
            found = dict(given) if isinstance(given, Mapping) else {"rewards": given}
        else:
            texts, ended = [text for text, _ in split], [end for _, end in split]
            score = monitor.reward.score({})
            rewards = torch.tensor(score(list(prompts), texts, finished=ended))
            found = {"rewards": rewards, "scores": rewards}
        with monitor.safely():
            values = torch.as_tensor(found["rewards"], dtype=torch.float64).flatten().tolist()
            for (text, end), prompt, label, r in zip(split, prompts, labels, values, strict=True):
                row = {"prompt": prompt, "response": text, "finished": end, "reward": r}
                context = {"label": label, "end": end_of_text}
                monitor.collect(row, context, step_size=step_size)
        return {**found, "extra_logs": {**(found.get("extra_logs") or {}), **_logs(monitor)}}

    return reward_func


def openrlhf(function: Callable[..., Any]) -> _OpenRLHF:
    """Mark a user's `reward_func` of OpenRLHF, to be wrapped by a `DriftMonitor`."""
    return _OpenRLHF(function)


def _split(query: str, prompt: str, end: str) -> tuple[str, bool]:
    """Return the response in a query, and whether it was finished."""
    text = query[len(prompt) :] if query.startswith(prompt) else query
    if not end:
        return text, True
    return text.removesuffix(end), text.endswith(end)


def _logs(monitor: DriftMonitor) -> dict[str, float]:
    evidence, prefix = monitor.evidence, monitor.prefix.replace("/", "_")
    return {
        f"{prefix}evidence": evidence.value,
        f"{prefix}accuracy_bound": evidence.bound,
        f"{prefix}labels": float(monitor.labels),
        f"{prefix}alarm": float(monitor.alarmed),
    }


# -- verl ------------------------------------------------------------------------------------------

PROMPTS = ("prompt", "question", "raw_prompt", "problem")
"""Where the prompt stands in verl's `extra_info`, in this order."""


class _Verl:
    """A user's `compute_score`, as a `Reward` of a monitor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def batch(self, *_: Any) -> Any:
        raise UserError("this monitor wraps a reward function of verl, and TRL called it")

    def score(self, contexts: Contexts) -> Score:
        def of(prompts: Sequence[Any], responses: Sequence[Any], *, finished: Any) -> list[float]:
            return [
                _verl_score(
                    finished_call(
                        self.function,
                        solution_str=response,
                        **contexts.get(prompt_name(prompt), {}),
                    )
                )
                for prompt, response in zip(prompts, responses, strict=True)
            ]

        return of


def _verl_score(found: Any) -> float:
    value = found["score"] if isinstance(found, Mapping) else found
    return math.nan if value is None else float(value)


def verl(function: Callable[..., Any]) -> _Verl:
    """Mark a user's `compute_score` of verl, to be wrapped by a `DriftMonitor`."""
    return _Verl(function)


def verl_reward(
    monitor: DriftMonitor,
    *,
    step_size: int,
    prompt_of: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Callable[..., Any]:
    """Return a `compute_score` for verl's file; a coroutine function if the wrapped one is.

    What it returns is exactly what the wrapped function returns, so verl's own logs have nothing of
    the monitor: see its folder.

    Args:
        step_size: responses of a step that this process scores.
        prompt_of: returns the prompt from `extra_info`. By default the first of `PROMPTS` that is
            there. Responses are grouped by it, and a reward model needs it.

    Raises:
        UserError: in the first call, if a reward model is wrapped and there is no prompt.
    """
    _check(step_size)
    find = prompt_of or _prompt

    def collect(given: dict[str, Any], found: Any) -> None:
        with monitor.safely():
            row = {
                "prompt": find(given["extra_info"] or {}),
                "response": given["solution_str"],
                "finished": True,
                "reward": _verl_score(found),
            }
            context = {name: value for name, value in given.items() if name != "solution_str"}
            monitor.collect(row, context, step_size=step_size)

    def scored(given: dict[str, Any]) -> float:
        prompt = find(given["extra_info"] or {})
        score = monitor.reward.score({})
        return float(score([prompt], [given["solution_str"]], finished=[True])[0])

    wrapped = monitor.reward.function if isinstance(monitor.reward, _Verl) else None

    if wrapped is not None and inspect.iscoroutinefunction(wrapped):

        async def compute_score_later(*words: Any, **named: Any) -> Any:
            given = _given(*words, **named)
            found = await wrapped(**given)
            await asyncio.to_thread(collect, given, found)
            return found

        return compute_score_later

    def compute_score(*words: Any, **named: Any) -> Any:
        given = _given(*words, **named)
        found = scored(given) if wrapped is None else wrapped(**given)
        collect(given, found)
        return found

    return compute_score


def _given(
    data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **more: Any
) -> dict[str, Any]:
    named = {"data_source": data_source, "solution_str": solution_str}
    return {**named, "ground_truth": ground_truth, "extra_info": extra_info, **more}


def _prompt(extra_info: Mapping[str, Any]) -> Any:
    for name in PROMPTS:
        if extra_info.get(name):
            return extra_info[name]
    raise UserError(
        f"verl: extra_info has no prompt under {', '.join(PROMPTS)}; add it to the data, or give "
        "prompt_of"
    )
