"""The implementation of `shiftrm meta-test`: resumable stages, two for each domain."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shiftrm.config import from_mapping
from shiftrm.data.domains import Domain, load_domain, load_split
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.models.sampling import load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.oodpl.fine_tuning import FineTuningConfig, FineTuningLog
from shiftrm.oodpl.meta_test import (
    EvaluationConfig,
    evaluate_policy,
    guide_by_ppo,
    guide_by_weights,
)
from shiftrm.oodpl.rloo import RLOOLog, RLOOSettings, guide_by_rloo
from shiftrm.pipeline.engine import RECORDS_FILE, Stage, StageContext, random_seed, run_stages
from shiftrm.pipeline.folder import progress
from shiftrm.pipeline.jobs import Input, MetaTest, from_plain, plain
from shiftrm.pipeline.launch import record_made
from shiftrm.pipeline.meta_jobs import WAYS
from shiftrm.policies.ppo import StepLog
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Record, Recorder, read_records, write_records
from shiftrm.world.build_domains import WEIGHTS, read_table
from shiftrm.world.domain_gold import gold_of

__all__ = ["MetaTestConfig", "measure_domain", "measure_stage", "meta_test"]

GUIDED = ("weighted", "ppo", "rloo")
"""The ways that need a reward model."""


@dataclass(frozen=True)
class MetaTestConfig:
    """The settings of a meta-test."""

    seed: int = 0
    weighted: FineTuningConfig = field(default_factory=FineTuningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rloo: RLOOSettings = field(default_factory=RLOOSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def meta_test(
    job: MetaTest, output: Path, *, names: Sequence[str] | None = None, workers: int = 1
) -> str:
    """Run a job for every held-out domain, after measuring the reference there.

    Writes `OUTPUT/<domain>/policy` and `responses.jsonl`, the same for the reference policy below
    `OUTPUT/reference`, and `OUTPUT/records.jsonl`. The same call continues an interrupted one.

    Args:
        job: its `domain` is not read.
        names: domains; None takes the held-out ones of `splits.json`.

    Returns:
        A table in words.

    Raises:
        UserError: bad folders or settings, a domain with nothing to measure on.
    """
    if job.way not in WAYS:
        raise UserError(f"--way is {job.way!r}; choose one of {', '.join(WAYS)}")
    if job.reward is None and job.way in GUIDED:
        raise UserError("--reward goes with --way weighted, ppo and rloo, which need it")
    if job.reward is not None and job.way == "plain":
        raise UserError("--reward goes with --way weighted, ppo and rloo, and not with plain")
    config = from_mapping(MetaTestConfig, dict(job.settings))
    folder = Path(str(job.domains))
    if names is None:
        names = [domain.name for domain in load_split(folder).held_out]
    as_it_is = job.way == "none" and job.reference is None
    methods = ["reference"] if as_it_is else ["reference", job.way]
    stages = []
    for name in names:
        domain = load_domain(folder / name, labelled=False)
        _check_rows(domain, folder, job.way, config)
        for method in methods:
            one = replace(job, domain=name)
            if method == "reference":
                one = replace(one, way="none", policy=job.reference or job.policy, reference=None)
            stages.append(
                Stage(
                    name if method != "reference" else f"reference/{name}",
                    "shiftrm.pipeline.meta_test_run:measure_stage",
                    {"data": fingerprint("", _read(domain))[:16], "job": plain(one)},
                    record_as={"stage": f"evaluate/{name}", "method": method, "round": 0},
                )
            )
    for path in (job.policy, job.reference, job.reward, job.judge):
        found = path is None or Path(str(path)).is_dir() or _is_gold(path)
        if not found and str(path).count("/") != 1:
            raise UserError(f"{path}: no such folder; give a checkpoint folder or a hub name")
    with progress(stages) as on_progress:
        run_stages(stages, output, seed=config.seed, workers=workers, on_progress=on_progress)
    return _table(read_records(output / RECORDS_FILE), list(names), methods, output)


def _check_rows(domain: Domain, folder: Path, way: str, config: MetaTestConfig) -> None:
    if not domain.eval_pairs and not domain.prompts:
        raise UserError(
            f"{folder / domain.name}: neither eval_pairs.jsonl nor prompts.jsonl to measure on"
        )
    if way in ("weighted", "plain") and len(domain.support) < config.weighted.batch_size:
        raise UserError(
            f"domain {domain.name!r}: {len(domain.support)} fine-tuning rows, but a batch takes "
            f"{config.weighted.batch_size}; set weighted.batch_size"
        )


def measure_stage(context: StageContext) -> None:
    """Run the job of a stage of `meta_test`; its files become the stage's."""
    measure_domain(from_plain(context.stage.settings["job"]), context.out)
    record_made(context, context.out)


def measure_domain(job: MetaTest, out: Path) -> None:
    """Make a policy for a domain and measure it; write policy, responses and records to `out`.

    A policy that was given (way "none") is not written again.
    """
    from shiftrm.models.loading import to_accelerator

    config = from_mapping(MetaTestConfig, dict(job.settings))
    domain = load_domain(Path(str(job.domains)) / job.domain, labelled=False)
    policy, tokenizer = load_policy(str(job.policy))
    policy = to_accelerator(policy)
    reference = policy
    if job.reference is not None:
        reference = to_accelerator(load_policy(str(job.reference))[0])
    elif job.way != "none":
        reference = copy.deepcopy(policy)
    reward, judge = _scorer(job.reward), _judge(job.judge, domain.name)
    recorder = Recorder(stage=f"evaluate/{domain.name}", method=job.way, round=0, seed=config.seed)
    _Case(policy, reference, tokenizer, domain, reward, config, recorder).train(job.way)
    found = evaluate_policy(
        policy,
        reference,
        tokenizer,
        domain,
        replace(config.evaluation, seed=random_seed(config.seed, "evaluation")),
        judge=judge,
        proxy=reward,
    )
    for name, value in found.numbers.items():
        of_pairs = name.startswith(("accuracy", "pl_loss"))
        metric = "gold_mean" if name == "judged" and _is_gold(job.judge) else name
        recorder.add(metric, value, n=found.pairs if of_pairs else found.responses)
    if job.way != "none":
        policy.save_pretrained(out / "policy")
        tokenizer.save_pretrained(out / "policy")
    if found.rows:
        write_jsonl(out / "responses.jsonl", found.rows)
    write_records(out / RECORDS_FILE, recorder.records)


@dataclass(frozen=True)
class _Case:
    """A policy to train in a domain, and what training it needs."""

    policy: Any
    reference: Any
    tokenizer: Any
    domain: Domain
    reward: Scorer | None
    config: MetaTestConfig
    recorder: Recorder

    def train(self, way: str) -> None:
        """Train the policy in one of `WAYS`, and record how that went."""
        if way == "none":
            return
        seed = random_seed(self.config.seed, f"policy/{self.domain.name}")
        if way in ("weighted", "plain"):
            self._by_weights(replace(self.config.weighted, seed=seed))
            return
        guide: Any = guide_by_ppo if way == "ppo" else guide_by_rloo
        guide(
            self.policy,
            self.reference,
            self.tokenizer,
            self.domain,
            replace(getattr(self.config, way), seed=seed),
            reward_fn=self.reward,
            on_step=self._note_ppo if way == "ppo" else self._note_rloo,
        )

    def _by_weights(self, config: FineTuningConfig) -> None:
        logs: list[FineTuningLog] = []
        guide_by_weights(
            self.policy,
            self.tokenizer,
            self.domain,
            config,
            reward_fn=self.reward,
            on_step=logs.append,
        )
        for log in logs:
            self.recorder.add("loss", log.loss, step=log.step)
        share = sum(log.effective_sample_share for log in logs) / len(logs)
        self.recorder.add("effective_sample_share", share)

    def _note_ppo(self, log: StepLog) -> None:
        self.recorder.add("ppo_kl", log.kl, step=log.step)
        self.recorder.add("ppo_score", log.standardised_mean, step=log.step)

    def _note_rloo(self, log: RLOOLog) -> None:
        self.recorder.add("rloo_score", log.score_mean, step=log.step)
        self.recorder.add("rloo_kl", log.kl, step=log.step)


def _read(domain: Domain) -> list[Any]:
    """Return the rows of a domain that a meta-test reads; a stage depends on them."""
    prompts = [{"prompt": prompt} for prompt in domain.prompts]
    return [*domain.support, *domain.eval_pairs, *prompts]


def _scorer(path: Input | None) -> Scorer | None:
    from shiftrm.models.loading import to_accelerator

    if path is None:
        return None
    scorer = Scorer.from_pretrained(str(path))
    scorer.model = to_accelerator(scorer.model)
    return scorer


def _is_gold(judge: Input | None) -> bool:
    return judge is not None and Path(str(judge)).name == WEIGHTS


def _judge(path: Input | None, domain: str) -> Any:
    """Return what judges: a reward model, or the domain's gold reward."""
    if not _is_gold(path):
        return _scorer(path)
    one = gold_of(domain, read_table(Path(str(path)).parent))

    def reward(prompts: Any, responses: Any, *, finished: Any) -> list[float]:
        return [one(p, r, finished=f) for p, r, f in zip(prompts, responses, finished, strict=True)]

    return reward


def _table(
    records: Sequence[Record], names: Sequence[str], methods: Sequence[str], output: Path
) -> str:
    """Return a line for every domain and method."""
    columns = {"accuracy_sum": "A_PL", "judged": "judge", "proxy": "guide", "kl": "KL"}
    as_judge = {"gold_mean": "judged"}
    numbers = {
        (r.stage, r.method, as_judge.get(r.metric, r.metric)): r.value
        for r in records
        if r.step is None
    }
    lines = [f"{'domain':<20}{'policy':<12}" + "".join(f"{c:>9}" for c in columns.values())]
    for name in names:
        for method in methods:
            values = [numbers.get((f"evaluate/{name}", method, c), math.nan) for c in columns]
            cells = ["-" if math.isnan(v) else f"{v:.3f}" for v in values]  # type: ignore[arg-type]
            lines.append(f"{name:<20}{method:<12}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(f"Policies and responses: {output}/DOMAIN; numbers: {output / RECORDS_FILE}")
    return "\n".join(lines)
