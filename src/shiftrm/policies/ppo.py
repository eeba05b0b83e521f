"""Compact PPO for language models: a policy, a frozen reference, a critic and any text reward.

One step: draw prompts, sample several responses to each, score their text, recompute the
log-probabilities of the unmodified policy, spread reward and KL penalty over the tokens, estimate
advantages, and take clipped gradient steps. The equations are in `ppo_math`.
"""

import random
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftrm.errors import UserError
from shiftrm.models.finite import require_finite_weights
from shiftrm.models.rope import require_fixed_frequencies
from shiftrm.models.sampling import encode_prompts
from shiftrm.policies import ppo_runtime
from shiftrm.policies.advantages import estimate, gae
from shiftrm.policies.ppo_before import Before, can_share, measure_before
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.policies.ppo_math import (
    KLController,
    clipped_policy_loss,
    clipped_value_loss,
    exact_token_kl,
    masked_mean,
    masked_variance,
    policy_logprobs,
    token_rewards,
    whiten,
)
from shiftrm.policies.ppo_rows import Rows
from shiftrm.policies.ppo_runtime import Processes
from shiftrm.policies.ppo_update import (
    Batch,
    Updater,
    adamw,
    check_models,
    frozen_parameters,
    is_peft,
    make_critic,
    out_of_memory,
    trained_parameters,
)
from shiftrm.policies.rollouts import (
    Problem,
    RewardFunction,
    Rollouts,
    StepLog,
    difference_variance,
    require_finite,
    sample_chunks,
)
from shiftrm.policies.shaping import shape

__all__ = [
    "KLController",
    "PPOConfig",
    "PPOTrainer",
    "Problem",
    "RewardFunction",
    "Rollouts",
    "StepLog",
    "clipped_policy_loss",
    "clipped_value_loss",
    "exact_token_kl",
    "gae",
    "make_critic",
    "policy_logprobs",
    "token_rewards",
    "whiten",
]


class PPOTrainer:
    """Trains `policy` in place to increase its reward while staying close to `reference`.

    All models run in eval mode, so dropout is off. The global random state is neither read nor
    changed. Only parameters that require gradients are trained and saved in checkpoints.

    Under `accelerate launch`, every process makes the same call with whole models on its device.
    The processes share the work of each step; results equal those of one process up to the order of
    sums (see `ppo_runtime`). Samples are drawn in chunks of `config.forward_batch_size`; there
    should be at least as many chunks as processes.

    Args:
        problem: the models, the prompts (drawn in shuffled order, repeatedly) and the reward. Every
            process that sampled calls the reward function once per step with its own samples.
        critic: sequence classifier with the same vocabulary, also trained; see `make_critic`.
        on_step: called by the main process with the log and roll-outs of each step, for further
            measurements or an experiment tracker (`asdict(log)` is plain numbers).
        checkpoints: folder for the run's state, saved every `config.save_steps` steps and after
            the last. The same call resumes from it with the results of an uninterrupted run:
            `train` returns all logs; `on_step` is called for the steps after the checkpoint only
            (again for steps lost in the interruption). Use a folder for one run and delete it
            afterwards.

    Raises:
        UserError: no prompts, an empty prompt, a prompt too long for the context, a tokenizer
            without pad or EOS, no reference, weights that are not finite, a setting that does not
            fit the models.
    """

    def __init__(
        self,
        problem: Problem,
        critic: Any,
        config: PPOConfig,
        on_step: Callable[[StepLog, Rollouts], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> None:
        policy, reference, room = problem.policy, problem.reference, config.sampling.max_new_tokens
        if not problem.prompts:
            raise UserError("there are no prompts to run PPO on")
        if problem.tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token; PPO needs one to sample")
        if reference is None and not is_peft(policy):
            raise UserError("the policy has no adapter to switch off; also give a reference model")
        models = {"policy": policy, "reference": reference, "critic": critic}
        for name, model in models.items():
            if model is not None:
                require_finite_weights(model.eval(), f"the {name}")
        self.problem, self.policy, self.critic = problem, policy, critic
        self.config, self.on_step = config, on_step
        self.checkpoints = None if checkpoints is None else Path(checkpoints)
        self.encoded = encode_prompts(policy, problem.tokenizer, problem.prompts, room=room)
        require_fixed_frequencies(policy.config, max(map(len, self.encoded)) + room)
        self.controller = KLController(
            config.kl_coefficient, config.kl_target, config.kl_rate, config.kl_damping
        )
        self._random = random.Random(config.seed)
        self._order: list[int] = []
        self._shares: bool | None = None  # unknown until a step has long prompts
        trained = {"policy": trained_parameters(policy), "critic": trained_parameters(critic)}
        check_models({"policy": policy, "critic": critic}, trained, config)
        self.processes = Processes(next(policy.parameters()).device)
        self._warn_of_idle_processes()
        for parameters in trained.values():  # a new head or adapter may be random
            self.processes.same_as_main(parameters.values())
        rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
        self._updater = Updater(
            policy,
            critic,
            trained,
            {name: adamw(trained[name], rate) for name, rate in rates.items()},
            config,
            self.processes,
            continues=checkpoints is not None,
        )

    def _warn_of_idle_processes(self) -> None:
        config, count = self.config, self.processes.count
        size = max(1, config.forward_batch_size // config.rollouts_per_prompt)
        if self.processes.is_main and -(-config.prompts_per_step // size) < count:
            best = max(1, config.prompts_per_step // count) * config.rollouts_per_prompt
            warnings.warn(
                f"forward_batch_size={config.forward_batch_size} makes fewer chunks to sample than "
                f"there are processes ({count}); {best} gives each its share",
                stacklevel=3,
            )

    def train(self, *, save_last: bool = True) -> list[StepLog]:
        """Run the steps after the last checkpoint, or all, and return the logs of all steps.

        Args:
            save_last: write a checkpoint after the last step, from which a longer run can continue.
                If False, a run that is killed before its policy is saved repeats the steps since
                the previous checkpoint, with the same result.

        Raises:
            UserError: a reward, KL or loss is not finite (the message names step and prompt); the
                checkpoint is from another run or has more steps than requested.
        """
        logs = self._resume()
        for step in range(len(logs) + 1, self.config.steps + 1):
            log, rollouts = self.step(step)
            logs.append(log)
            with self.processes.together():
                if self.on_step is not None and self.processes.is_main:
                    self.on_step(log, rollouts)
            last = step == self.config.steps
            if save_last if last else step % self.config.save_steps == 0:
                self._save(logs)
        return logs

    def _resume(self) -> list[StepLog]:
        """Load the newest checkpoint, if there is one, and return the logs of its steps."""
        if self.checkpoints is None:
            return []
        with self.processes.together():
            if self.processes.is_main:
                ppo_runtime.remove_half_written(self.checkpoints)
            found = ppo_runtime.load(self.checkpoints, self._description())
        steps = self.processes.gather([0 if found is None else found[0]["step"]])
        if len(set(steps)) > 1:
            raise UserError(
                f"{self.checkpoints}: the processes see checkpoints of different steps; the folder "
                "must be on a disk that all machines share"
            )
        if found is None:
            return []
        state, tensors = found
        if state["step"] > self.config.steps:
            raise UserError(
                f"{self.checkpoints}: the checkpoint is of step {state['step']}, but steps is "
                f"{self.config.steps}; ask for as many, or delete the folder to start anew"
            )
        for name, optimizer in self._updater.optimizers.items():
            trained = self._updater.trained[name]
            ppo_runtime.restore(trained, optimizer, tensors[name], tensors[f"{name}_optimizer"])
        self.controller = KLController(**state["controller"])
        ppo_runtime.set_random_state(self._random, state["random"])
        self._order = list(state["order"])
        try:
            return [StepLog(**log) for log in state["logs"]]
        except TypeError:
            raise UserError(
                f"{self.checkpoints}: the checkpoint's log was written by another version of "
                "shiftrm; continue with that version, or delete the folder to start anew"
            ) from None

    def _save(self, logs: list[StepLog]) -> None:
        if self.checkpoints is None:
            return
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for name, optimizer in self._updater.optimizers.items():
            trained = self._updater.trained[name]
            tensors[name] = trained
            tensors[f"{name}_optimizer"] = ppo_runtime.optimizer_tensors(optimizer, trained)
        state = {
            "run": self._description(),
            "step": len(logs),
            "logs": [asdict(log) for log in logs],
            "controller": asdict(self.controller),
            "random": ppo_runtime.random_state(self._random),
            "order": self._order,
        }
        with self.processes.together():
            if self.processes.is_main:
                ppo_runtime.save(self.checkpoints, len(logs), state, tensors)

    def _description(self) -> dict[str, Any]:
        frozen = frozen_parameters(self.policy, self.problem.reference)
        return ppo_runtime.describe(self.config, self.problem.prompts, frozen.items())

    def step(self, step: int) -> tuple[StepLog, Rollouts]:
        """Sample one batch and update on it; `step` only labels the log."""
        config = self.config
        rollouts = self._sample(step)
        device = next(self.policy.parameters()).device
        rows = self._sharing(step, Rows.pack(rollouts.samples, device=device))
        raw = torch.tensor(rollouts.rewards, dtype=torch.float64)
        standardised = (raw - (config.reward_mean or 0.0)) / (config.reward_std or 1.0)
        shaped = None
        if config.reward_shaping != "none":
            references = torch.tensor(rollouts.references, dtype=raw.dtype)
            shaped = shape(config.reward_shaping, raw, references)
            require_finite(shaped, "the shaped reward", step, rollouts.prompts)

        old, reference, values, kl_BA, entropy = self._before(step, rows)
        mask = rows.response_mask
        sampled_B, kl_B = (old - reference).sum(dim=1), kl_BA.sum(dim=1)
        for numbers in (sampled_B, kl_B):
            require_finite(numbers, "the KL to the reference", step, rollouts.prompts)
        coefficient = self.controller.coefficient
        rewards = token_rewards(
            self._scores(standardised if shaped is None else shaped, rollouts.finished).to(old),
            old,
            reference,
            mask,
            kl_coefficient=coefficient,
        )
        advantages, returns = estimate(
            config.advantage,
            rewards,
            values,
            mask,
            gamma=config.gamma,
            lam=config.gae_lambda,
            group_size=config.rollouts_per_prompt,
        )
        spread = float(masked_variance(returns, mask))
        unexplained = float(masked_variance(returns - values, mask))
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        orders = []
        for _ in range(config.epochs):
            orders.append(list(range(len(rows))))
            self._random.shuffle(orders[-1])
        batch = Batch(rows, rollouts.prompts, old, values, advantages, returns)
        updates = self._updater.run(step, batch, orders)
        kl = float(kl_B.mean())
        self.controller.update(kl)
        log = StepLog(
            step=step,
            score_mean=float(raw.mean()),
            standardised_mean=float(standardised.mean()),
            shaped_mean=None if shaped is None else float(shaped.mean()),
            kl=kl,
            kl_sampled=float(sampled_B.mean()),
            kl_coefficient=coefficient,
            entropy=float(masked_mean(entropy, mask)),
            explained_variance=1 - unexplained / spread if spread > 0 else None,
            length_mean=float(mask.sum()) / len(rows),
            truncated_share=1 - sum(rollouts.finished) / len(rows),
            difference_variance=difference_variance(raw.view(-1, config.rollouts_per_prompt)),
            **updates,
        )
        return log, rollouts

    def _sample(self, step: int) -> Rollouts:
        """Return the roll-outs of all processes; each samples every count-th chunk of prompts."""
        config = self.config
        drawn = [self._next_prompt() for _ in range(config.prompts_per_step)]
        size = max(1, config.forward_batch_size // config.rollouts_per_prompt)
        # Draw the seeds of all chunks, also of those that other processes sample.
        chunks = [
            (start, drawn[start : start + size], self._random.getrandbits(32))
            for start in range(0, len(drawn), size)
        ]
        with self.processes.together(), self._out_of_memory(step, "sampling"):
            own = sample_chunks(self.processes.mine(chunks), self.problem, self.encoded, config)
        rollouts = Rollouts.join(self.processes.gather(own), self.problem.tokenizer)
        require_finite(torch.tensor(rollouts.rewards), "the reward", step, rollouts.prompts)
        return rollouts

    def _next_prompt(self) -> int:
        if not self._order:
            self._order = list(range(len(self.encoded)))
            self._random.shuffle(self._order)
        return self._order.pop()

    def _scores(self, scores: Tensor, finished: list[bool]) -> Tensor:
        """Return the score of the last token: whitened, clipped, minus the truncation penalty."""
        config = self.config
        if config.reward_whitening == "batch":
            scores = whiten(scores, torch.ones_like(scores, dtype=torch.bool))
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        # After the clip, which would remove the penalty from low rewards.
        return scores - config.truncation_penalty * (~torch.tensor(finished)).to(scores.dtype)

    def _before(self, step: int, rows: Rows) -> Before:
        """Return the quantities of all rows, of which each process computes a share."""
        models = (self.policy, self.problem.reference, self.critic)
        with self.processes.together(), self._out_of_memory(step, "in a pass without gradient"):
            own = measure_before(*models, rows.select(self._mine(rows)), self.config)
        dtype = torch.promote_types(next(self.policy.parameters()).dtype, torch.float32)
        return Before(*(self._whole(part, rows, dtype) for part in own))

    def _sharing(self, step: int, rows: Rows) -> Rows:
        """Let the roll-outs of long prompts share them, if all models can."""
        shared = rows.sharing()
        if shared.packed is not None and self._shares is None:
            models = (self.policy, self.problem.reference, self.critic)
            with self.processes.together(), self._out_of_memory(step, "in a pass without gradient"):
                self._shares = can_share(*models, rows, self.config)
        return shared if shared.packed is not None and self._shares else rows

    def _mine(self, rows: Rows) -> list[int]:
        return self.processes.mine(range(len(rows)))

    def _whole(self, own: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Collect all rows on every process, from those of this one."""
        if self.processes.count == 1:
            return own
        whole = torch.zeros(rows.response_mask.shape, dtype=dtype, device=self.processes.device)
        whole[self._mine(rows)] = own.to(dtype)
        return self.processes.sum_(whole)

    def _out_of_memory(self, step: int, what: str) -> AbstractContextManager[None]:
        advice = f"lower forward_batch_size (now {self.config.forward_batch_size})"
        return out_of_memory(step, what, advice, continues=self.checkpoints is not None)
