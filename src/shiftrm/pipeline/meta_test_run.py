"""The implementation of `shiftrm meta-test`: resumable stages, two for each domain."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shiftrm.config import from_mapping
from shiftrm.data.domains import Domain, load_domain
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError, printable
from shiftrm.files import file_hash, write_jsonl
from shiftrm.models.finite import require_finite_weights
from shiftrm.models.loading import checkpoint_fingerprint
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
from shiftrm.pipeline.engine import (
    RECORDS_FILE,
    STAGE_FILE,
    Stage,
    StageContext,
    random_seed,
    run_stages,
)
from shiftrm.pipeline.folder import claim, progress
from shiftrm.pipeline.jobs import Input, MetaTest, from_plain, plain
from shiftrm.pipeline.launch import record_made
from shiftrm.pipeline.meta_jobs import WAYS
from shiftrm.pipeline.meta_test_checks import asked_domains, check_models, check_rows, is_gold
from shiftrm.policies.ppo import StepLog
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Record, Recorder, read_records, write_records
from shiftrm.world.build_domains import read_table
from shiftrm.world.domain_gold import gold_of

__all__ = ["MetaTestConfig", "measure_domain", "measure_stage", "meta_test"]

GUIDED = ("weighted", "ppo", "rloo")
"""The ways that need a reward model."""

FOLDER_README = """Made by `shiftrm meta-test`.

DOMAIN/            policy/ made for the domain, responses.jsonl, records.jsonl, log.txt
reference/DOMAIN/  the same measurements of the reference policy
records.jsonl      the measurements of all domains
"""


@dataclass(frozen=True)
class MetaTestConfig:
    """The settings of a meta-test."""

    seed: int = 0
    weighted: FineTuningConfig = field(default_factory=FineTuningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rloo: RLOOSettings = field(default_factory=RLOOSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for section in (*GUIDED, "evaluation"):
            if own := getattr(self, section).seed:
                raise UserError(f"{section}.seed is {own}, but it follows from seed; set seed")


def meta_test(
    job: MetaTest, output: Path, *, names: Sequence[str] | None = None, workers: int = 1
) -> str:
    """Run a job for every held-out domain, after measuring the reference there.

    Writes `OUTPUT/<domain>/policy` and `responses.jsonl`, the same for the reference policy below
    `OUTPUT/reference`, and `OUTPUT/records.jsonl`. The same call continues an interrupted one; one
    for other domains adds these.

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
    domains = asked_domains(folder, names)
    batch_size = config.weighted.batch_size if job.way in ("weighted", "plain") else 0
    for domain in domains:
        check_rows(domain, folder, batch_size)
    check_models(job, [domain.name for domain in domains])
    as_it_is = job.way == "none" and job.reference is None
    methods = ["reference"] if as_it_is else ["reference", job.way]
    names = [domain.name for domain in domains]
    claim(output, {"command": "meta-test"}, FOLDER_README)
    made = _made(output)  # what is there stays in the plan, so that its records are kept
    earlier = sorted({name.removeprefix("reference/") for name in made} - set(names))
    domains += [load_domain(folder / name, labelled=False) for name in earlier]
    stages = [
        stage
        for stage in _stages(job, domains, methods)
        if stage.settings["job"]["domain"] in names or stage.name in made
    ]
    for name in sorted(made - {stage.name for stage in stages}):
        raise UserError(f"{output}: {name} is of another meta-test; choose another --output")
    with progress(stages) as on_progress:
        run_stages(stages, output, seed=config.seed, workers=workers, on_progress=on_progress)
    return _table(read_records(output / RECORDS_FILE), names, methods, output)


def _made(output: Path) -> set[str]:
    """Return the names of the stages that earlier calls have finished in this folder."""
    found = [*output.glob(f"*/{STAGE_FILE}"), *output.glob(f"reference/*/{STAGE_FILE}")]
    return {path.parent.relative_to(output).as_posix() for path in found}


def _stages(job: MetaTest, domains: Sequence[Domain], methods: Sequence[str]) -> list[Stage]:
    models = {path: _contents(path) for path in (job.policy, job.reference, job.reward, job.judge)}
    stages = []
    for domain in domains:
        for method in methods:
            one = replace(job, domain=domain.name)
            if method == "reference":
                one = replace(one, way="none", policy=job.reference or job.policy, reference=None)
            settings = {
                "data": fingerprint("", _read(domain))[:16],
                "models": {
                    option: models[getattr(one, option)][:16]
                    for option in ("policy", "reference", "reward", "judge")
                    if getattr(one, option) is not None
                },
                "job": plain(one),
            }
            stages.append(
                Stage(
                    domain.name if method != "reference" else f"reference/{domain.name}",
                    "shiftrm.pipeline.meta_test_run:measure_stage",
                    settings,
                    record_as={"stage": f"evaluate/{domain.name}", "method": method, "round": 0},
                )
            )
    return stages


def _contents(path: Input | None) -> str:
    """Return a hash of a checkpoint or a table of weights; "" for a name on the hub."""
    if path is None:
        return ""
    if Path(str(path)).is_file():
        return file_hash(str(path))
    return checkpoint_fingerprint(str(path))


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
    require_finite_weights(policy, str(job.policy))
    policy = to_accelerator(policy)
    reference = policy
    if job.reference is not None:
        reference = load_policy(str(job.reference))[0]
        require_finite_weights(reference, str(job.reference))
        reference = to_accelerator(reference)
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
        metric = "gold_mean" if name == "judged" and is_gold(job.judge) else name
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
    require_finite_weights(scorer.model, str(path))
    scorer.model = to_accelerator(scorer.model)
    return scorer


def _judge(path: Input | None, domain: str) -> Any:
    """Return what judges: a reward model, or the domain's gold reward."""
    if not is_gold(path):
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
    width = 2 + max(18, *(len(printable(name)) for name in names))
    lines = [f"{'domain':<{width}}{'policy':<12}" + "".join(f"{c:>9}" for c in columns.values())]
    for name in names:
        for method in methods:
            values = [numbers.get((f"evaluate/{name}", method, c), math.nan) for c in columns]
            cells = ["-" if math.isnan(v) else f"{v:.3f}" for v in values]  # type: ignore[arg-type]
            start = f"{printable(name):<{width}}{method:<12}"
            lines.append(start + "".join(f"{cell:>9}" for cell in cells))
    lines.append(f"Policies and responses: {output}/DOMAIN; numbers: {output / RECORDS_FILE}")
    return "\n".join(lines)
