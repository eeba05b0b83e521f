"""`DriftMonitor`: a reward function that passes on another one's rewards, and watches the run.

    reward_funcs=[DriftMonitor("models/reward", "monitor")]          # TRL's RLOO and GRPO

Everything it knows lies in its folder, so that a run that is continued goes on with its labels:
`steps.jsonl` (free signals), `audits/` (queues and answers), `events.jsonl`, `probe.jsonl`,
`alarm.json`, and `groups.jsonl`, the last steps' responses.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row
from shiftrm.locks import exclusive
from shiftrm.measure.people.blinding import pair_id
from shiftrm.models.scoring import score_rows
from shiftrm.monitor.audits import ANSWERS, Answerer, Audit, answer
from shiftrm.monitor.evidence import Alarm, Evidence, evidence_of, sentence_of
from shiftrm.monitor.folder import MonitorFolder
from shiftrm.monitor.guard import Guard
from shiftrm.monitor.pool import Pool
from shiftrm.monitor.rewards import Reward, group_rows, is_model, name_of, open_reward, prompt_name
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import SIGNALS, Score, Step, measure_step
from shiftrm.monitor.trained_on import TrainingStates
from shiftrm.monitor.trends import flagged, trend

__all__ = ["DriftMonitor", "warn"]

Action = Callable[[Alarm], None]


def warn(alarm: Alarm) -> None:
    """Say the alarm's sentence as a Python warning."""
    warnings.warn(alarm.sentence, stacklevel=2)


class DriftMonitor:
    """Watches a reward function while a policy is trained with it.

    The rewards that it returns are those of the reward function, untouched. An error of that
    function is raised as ever. An error of the monitor's own does not stop the run: it is warned of
    once, written to `errors.log` in the folder, and counted in the metric `drift/errors`; the
    rewards go on, and the next step is watched again.

    One process watches: the first that locks the folder. Others (further ranks, reward workers)
    only pass rewards on; the monitor then sees one process's share of the samples.

    Args:
        reward: folder or hub name of a reward model; a `Scorer`; a function
            `(prompts, responses, *, finished)`; or a reward function of TRL. For OpenRLHF and verl
            see `adapters`.
        output: the monitor's folder; created if missing, continued if there.
        config: see `MonitorConfig`.
        answers: answers audits at once: a judge (`measure.judges`), or a function of comparisons.
            None: they wait in the folder until somebody answers them.
        second: a second reward model, as `reward`, for the signal "disagreement".
        trained_on: the reward model's training pairs, for "distance" and "expected_errors".
        actions: called with an `Alarm`, once for each reward model; to stop a trainer, give it
            `callback.StopOnDrift` too. A hook may adapt the model and call `model_changed`.
        score: rewards texts that the policy did not write, for the sight tests. A function of the
            user's is not called for them without it, unless `config.signals` names them: it may
            have a state, or a price. A reward model is.
        name: for several monitors in one run: metrics are `drift/NAME/...`, and the reward has this
            name in TRL's logs (by default that of the wrapped function or model).

    Raises:
        UserError: a reward that cannot be used, or a folder of something else.
    """

    def __init__(
        self,
        reward: Any,
        output: str | Path,
        config: MonitorConfig | None = None,
        *,
        answers: Answerer | None = None,
        second: Any = None,
        trained_on: TrainingStates | None = None,
        actions: Sequence[Action] = (warn,),
        score: Score | None = None,
        name: str | None = None,
    ) -> None:
        self.config = config or MonitorConfig()
        self.__name__ = name or name_of(reward)  # in TRL's logs
        self.prefix = f"drift/{name}/" if name else "drift/"
        self.reward: Reward = open_reward(reward)
        self.folder = MonitorFolder(Path(output))
        self.answers, self.actions = answers, list(actions)
        self._score = score
        self._second = None if second is None else open_reward(second)
        self.trained_on = trained_on
        self._names = list(self.config.names)
        if not (self.config.signals or score or is_model(self.reward)):
            self._names = [name for name in self._names if not SIGNALS.get(name).scores]
        self._mutex = threading.RLock()
        self._waiting: list[Row] = []
        self._contexts: dict[str, Mapping[str, Any]] = {}
        self._probe_contexts: dict[str, Mapping[str, Any]] = {}
        self._recent: list[list[Row]] = []
        self._pool, self._waited = Pool(self.config), False
        # of an audit: the step in which to ask again, and the pause after that
        self._retries: dict[int, tuple[int, int]] = {}
        self._watches: bool | None = None
        self._stack = contextlib.ExitStack()
        weakref.finalize(self, self._stack.close)
        self.safely = Guard(self.folder)
        self._told: set[str] = set()
        self.folder.check(self.config)
        self._state = self.folder.state()
        self.evidence = Evidence(needed=1 / self.config.alpha)
        self._stale = True

    # -- as a reward function of TRL -------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """Return the rewards of a batch, and watch it as one step; called by TRL's trainers."""
        given = dict(columns) if log_metric is None else {**columns, "log_metric": log_metric}
        rewards = self.reward.batch(prompts, completions, completion_ids, given)
        with self._mutex, self.safely():
            if self.watches:
                rows, contexts = group_rows(prompts, completions, rewards, columns)
                self._contexts = dict(contexts)
                metrics = self.see(rows)
                if log_metric is not None:
                    for name, value in metrics.items():
                        log_metric(f"{self.prefix}{name}", value)
        return rewards

    # -- for adapters ----------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """Whether this process is the one that watches; takes the folder's lock when first read."""
        if self._watches is None:
            try:
                self._stack.enter_context(exclusive(self.folder.path / ".lock", self.folder.path))
                self._watches = True
            except UserError as error:
                self._watches = False
                warnings.warn(f"this process only passes rewards on: {error}", stacklevel=2)
        return self._watches

    def collect(self, row: Row, context: Mapping[str, Any], *, step_size: int) -> bool:
        """Add one response with its reward; watch a step when there are `step_size` of them.

        Args:
            row: `{"prompt", "response", "finished", "reward"}`.
            context: what the reward function needs for other responses to this prompt.

        Returns:
            Whether a step was complete.
        """
        with self._mutex, self.safely():
            if not self.watches:
                return False
            self._waiting.append(row)
            self._contexts[prompt_name(row["prompt"])] = context
            if len(self._waiting) < step_size:
                return False
            waiting, self._waiting = self._waiting, []
            columns = [[one[key] for one in waiting] for key in ("prompt", "response", "reward")]
            ended = [one["finished"] for one in waiting]
            self.see(group_rows(columns[0], columns[1], columns[2], {}, ended)[0])
            self._contexts = {}
            return True
        return False

    def close(self) -> None:
        """Release the folder, for another monitor in this process."""
        self._stack.close()
        self._watches = None

    # -- a step ----------------------------------------------------------------------------------

    def see(self, groups: Sequence[Row]) -> dict[str, float]:
        """Watch one step: measure signals, read answers, audit if due, act on an alarm.

        Args:
            groups: `{"prompt", "responses", "finished", "rewards"}` of today's policy.

        Returns:
            The numbers of the step, for a tracker.
        """
        state, config = self._state, self.config
        state.step += 1
        self._recent = [*self._recent, list(groups)][-max(config.pool_steps, config.window) :]
        if len(state.audits) < config.audits:
            self._pool.add(groups)
        metrics: dict[str, float] = {}
        flags: list[str] = []
        with self.safely():
            self._keep_probe(groups)
        with self.safely():
            if (state.step - 1) % config.every == 0:
                metrics = self._measure(groups)
                flags = self._flags(metrics)
        with self.safely():
            if self._audit_due(flags):
                self._audit(flags)
        self._ask()
        with self.safely():
            self._look()
        said = {
            "evidence": self.evidence.value,
            "accuracy_bound": self.evidence.bound,
            "labels": float(self.labels),
            "alarm": float(self.alarmed),
            "flags": float(len(flags)),
            "errors": float(self.errors),
        }
        if self.evidence.accuracy is not None:
            said["accuracy"] = self.evidence.accuracy
        row = {"step": state.step, "episode": state.episode, "signals": metrics, "flags": flags}
        with self.safely():
            self.folder.add_step({**row, "test": said})
        return {**metrics, **said}

    def _measure(self, groups: Sequence[Row]) -> dict[str, float]:
        state = self._state
        step = Step(
            state.step,
            groups,
            self.score,
            state.probe,
            None if self._second is None else self._second.score(self._contexts),
            self.config.sight_pairs,
            self.trained_on,
        )
        found: dict[str, float] = {}
        for name in list(self._names):
            try:
                found |= measure_step(step, [name])
            except Exception as error:
                self._names.remove(name)
                self.safely.failed(f"the signal {name!r} is left out from now on: {error}")
        for name, value in found.items():
            state.series.setdefault(name, []).append(value)
        return found

    @property
    def score(self) -> Score:
        """Scores texts that the policy did not write."""
        return self._score or self.reward.score(self._contexts)

    def _keep_probe(self, groups: Sequence[Row]) -> None:
        """Freeze groups of the first steps, until there are enough."""
        state, config = self._state, self.config
        missing = config.probe_groups - len(state.probe)
        if missing > 0 and state.step <= config.baseline:
            state.probe += list(groups[:missing])
            self._probe_contexts |= self._contexts
            self.folder.write_probe(state.probe)

    def _flags(self, metrics: Mapping[str, float]) -> list[str]:
        config = self.config
        flags = []
        for name in metrics:
            values = self._state.series[name]
            found = trend(values, baseline=config.baseline, window=config.window)
            if found is not None and flagged(name, found, limit=config.flag):
                flags.append(name)
        return flags

    # -- audits and the alarm --------------------------------------------------------------------

    @property
    def errors(self) -> int:
        """Errors of the monitor's own so far."""
        return self.safely.count

    @property
    def labels(self) -> int:
        """Labels asked for so far."""
        return sum(audit.labels for audit in self._state.audits)

    @property
    def alarmed(self) -> bool:
        """Whether there was an alarm about the present reward model."""
        return self._state.alarmed

    def _audit_due(self, flags: Sequence[str]) -> bool:
        state, config = self._state, self.config
        if state.alarmed or len(state.audits) >= config.audits:
            return False
        if state.step < config.audit_from:
            return False
        since = state.step - (state.audits[-1].step if state.audits else 0)
        sooner = min(config.audit_flagged, config.audit_every)
        return since >= (sooner if flags else config.audit_every)

    def _audit(self, flags: Sequence[str]) -> None:
        state = self._state
        number = len(state.audits) + 1
        drawn = self._pool.draw(
            number, {pair_id(one.pair) for audit in state.audits for one in audit.drawn}
        )
        if not drawn:
            self._say_waiting()
            return
        audit = Audit(number, state.step, tuple(drawn), state.episode)
        self.folder.write_audit(audit)
        state.audits.append(audit)
        self._pool.clear()
        self.folder.event("audit", state.step, number=number, labels=audit.labels, flags=[*flags])

    def _ask(self) -> None:
        """Have audits without answers answered; after an error again, ever more steps later."""
        state = self._state
        if self.answers is None or state.alarmed:
            return
        for audit in state.audits:
            due, pause = self._retries.get(audit.number, (0, 1))
            folder = self.folder.audit(audit.number)
            if audit.episode != state.episode or audit.answered or state.step < due:
                continue
            if (folder / ANSWERS).exists():  # somebody's, even if it cannot be read
                continue
            self._retries[audit.number] = (state.step + pause, min(2 * pause, 32))
            with self.safely("an audit could not be answered"):
                answer(folder, audit, self.answers)
                continue
            return  # not the others now: each may wait long for a judge that is away

    def _say_waiting(self) -> None:
        """Warn once, if audits wait for pairs for as long again as they wait for their turn."""
        state, config = self._state, self.config
        last = state.audits[-1].step if state.audits else config.audit_from - 1
        since = state.step - last
        if since >= 2 * config.audit_every + 10 and not self._waited:
            self._waited = True
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"{self.folder.path}: no audit for {since} steps. One needs "
                    f"{self._pool.needed} prompts with responses of different text and reward, and "
                    f"there are {self._pool.prompts}; the signals 'ties' and 'same' tell more",
                    stacklevel=4,
                )

    def _look(self) -> None:
        """Read the answers that are there, and act if the test is decided."""
        state = self._state
        before, state.audits = state.audits, [self._read(audit) for audit in state.audits]
        if state.audits != before or self._stale:
            self.evidence = evidence_of(state.audits, self.config, state.episode)
            self._stale = False
        if not self.evidence.alarm or state.alarmed:
            return
        groups = self.folder.groups
        with self.safely("the groups of an alarm could not be written"):
            self.folder.write_groups([row for step in self._recent for row in step])
        said = sentence_of(self.evidence, self.config, state.step, groups)
        alarm = Alarm(
            state.step,
            self.evidence,
            self.config.threshold,
            self.config.alpha,
            said,
            groups,
            self.folder.path,
        )
        state.alarmed, episode = True, state.episode
        for action in self.actions:
            with self.safely(f"the action {action!r} failed"):
                action(alarm)
        with self.safely("the alarm could not be written"):
            self.folder.write_alarm(alarm, episode)
        with self.safely("the alarm could not be written"):
            self.folder.event("alarm", alarm.step, episode=episode, sentence=said)

    def _read(self, audit: Audit) -> Audit:
        problems: list[str] = []
        found = self.folder.read_audit(audit, problems)
        for what in problems:  # somebody's file of answers; it can still be corrected
            if what not in self._told:
                self._told.add(what)
                self.safely.failed(f"the answers of an audit cannot be read: {what}")
        return found

    def model_changed(self, reward: Any = None, trained_on: TrainingStates | None = None) -> None:
        """Say that the reward function is another from now on, as after `shiftrm adapt`.

        The test begins anew with its whole alpha, and the signals with a new baseline; the frozen
        responses are scored again.

        Args:
            reward: the new one; None: the same object gives other rewards now.
            trained_on: the new one's training pairs; None: their two signals end.
        """
        with self._mutex:
            self.trained_on = trained_on
            if reward is not None:
                self.reward = open_reward(reward)
            state = self._state
            state.episode += 1
            state.alarmed, state.series = False, {}
            self._pool.clear()  # rewards of the model before
            self.evidence, self._stale = Evidence(needed=1 / self.config.alpha), True
            self.folder.event("model_changed", state.step, episode=state.episode)
            probe, state.probe = state.probe, []
            with self.safely():
                score = self._score or self.reward.score(self._probe_contexts)
                rewards = score_rows(score, probe)
                state.probe = [
                    {**row, "rewards": list(found)}
                    for row, found in zip(probe, rewards, strict=True)
                ]
            self.folder.write_probe(state.probe)
