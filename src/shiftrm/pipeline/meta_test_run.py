"""Meta-test from folders to a folder: what `shiftrm meta-test` does, a resumable stage a domain."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shiftrm.config import apply_overrides, from_mapping, to_mapping
from shiftrm.data.domains import Domain, load_domain, load_split
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.models.sampling import load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.oodpl.fine_tuning import FineTuningConfig
from shiftrm.oodpl.meta_test import (
    Evaluation,
    EvaluationConfig,
    evaluate_policy,
    guide_by_ppo,
    guide_by_weights,
)
from shiftrm.oodpl.rloo import RLOOLog, RLOOSettings, guide_by_rloo
from shiftrm.pipeline.engine import RECORDS_FILE, Stage, StageContext, run_stages
from shiftrm.pipeline.folder import progress
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Record, Recorder, read_records

__all__ = ["WAYS", "MetaTestConfig", "meta_test", "meta_test_domain"]

WAYS = ("weighted", "ppo", "rloo", "plain")
"""How the policy is made: weighted by the reward model, by PPO or RLOO against it, or without."""


@dataclass(frozen=True)
class MetaTestConfig:
    """The settings of a meta-test."""

    seed: int = 0
    weighted: FineTuningConfig = field(default_factory=FineTuningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rloo: RLOOSettings = field(default_factory=RLOOSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def meta_test(
    policy: str,
    *,
    reward: str | None,
    domains: str,
    output: Path,
    way: str = "weighted",
    names: Sequence[str] | None = None,
    judge: str | None = None,
    settings: Sequence[str] = (),
    workers: int = 1,
) -> str:
    """Make a policy for every held-out domain under a frozen reward model, and measure it.

    Writes `OUTPUT/<domain>/policy` and `responses.jsonl`, and `OUTPUT/records.jsonl`. The same call
    continues an interrupted one.

    Args:
        policy: the reference policy.
        reward: the reward model's folder; None for way "plain".
        domains: a folder in the layout of `shiftrm.data.domains`.
        way: one of `WAYS`.
        names: domains; None takes the held-out ones of `splits.json`.
        judge: an evaluation reward model that guides nothing.
        settings: `key=value` words by field of `MetaTestConfig`, as `weighted.updates=50`.

    Returns:
        A table in words.

    Raises:
        UserError: bad folders or settings, a domain with nothing to measure on.
    """
    if way not in WAYS:
        raise UserError(f"--way is {way!r}; choose one of {', '.join(WAYS)}")
    if (reward is None) != (way == "plain"):
        raise UserError(
            "--reward goes with --way weighted, ppo and rloo, which need it, and not with plain"
        )
    config = from_mapping(
        MetaTestConfig, apply_overrides(to_mapping(MetaTestConfig()), list(settings))
    )
    folder = Path(domains)
    if names is None:
        names = [domain.name for domain in load_split(folder).held_out]
    stages = []
    for name in names:
        domain = load_domain(folder / name, labelled=False)
        if not domain.eval_pairs and not domain.prompts:
            raise UserError(
                f"{folder / name}: neither eval_pairs.jsonl nor prompts.jsonl to measure on"
            )
        if way in ("weighted", "plain") and len(domain.support) < config.weighted.batch_size:
            raise UserError(
                f"domain {name!r}: {len(domain.support)} fine-tuning rows, but a batch takes "
                f"{config.weighted.batch_size}; set weighted.batch_size"
            )
        stages.append(
            Stage(
                name,
                "shiftrm.pipeline.meta_test_run:meta_test_domain",
                {
                    "policy": policy,
                    "reward": reward,
                    "judge": judge,
                    "way": way,
                    "folder": str(folder / name),
                    "data": fingerprint("", _read(domain))[:16],
                    "config": to_mapping(config),
                },
                record_as={"stage": f"evaluate/{name}", "method": way, "round": 0},
            )
        )
    for path in (policy, reward, judge):
        if path is not None and not Path(path).is_dir() and path.count("/") != 1:
            raise UserError(f"{path}: no such folder; give a checkpoint folder or a hub name")
    with progress(stages) as on_progress:
        run_stages(stages, output, seed=config.seed, workers=workers, on_progress=on_progress)
    return _table(read_records(output / RECORDS_FILE), list(names), way, output)


def meta_test_domain(context: StageContext) -> None:
    """One domain: the reference measured, the policy made, measured and saved."""
    from shiftrm.models.loading import to_accelerator

    settings = context.stage.settings
    config = from_mapping(MetaTestConfig, settings["config"])
    domain = load_domain(settings["folder"], labelled=False)
    reference, tokenizer = load_policy(settings["policy"])
    reference = to_accelerator(reference)
    reward, judge = (_scorer(settings[name]) for name in ("reward", "judge"))
    evaluation = replace(config.evaluation, seed=context.random_seed("evaluation"))
    found = evaluate_policy(
        reference, reference, tokenizer, domain, evaluation, judge=judge, proxy=reward
    )
    base = Recorder(stage=f"evaluate/{domain.name}", method="reference", round=0, seed=context.seed)
    _note(base, found)
    policy = _guided(context, config, domain, reference, tokenizer, reward)
    found = evaluate_policy(
        policy, reference, tokenizer, domain, evaluation, judge=judge, proxy=reward
    )
    _note(context.recorder, found)
    context.recorder.records = base.records + context.recorder.records
    policy.save_pretrained(context.out / "policy")
    tokenizer.save_pretrained(context.out / "policy")
    if found.rows:
        write_jsonl(context.out / "responses.jsonl", found.rows)


def _guided(
    context: StageContext,
    config: MetaTestConfig,
    domain: Domain,
    reference: Any,
    tokenizer: Any,
    reward: Scorer | None,
) -> Any:
    policy = copy.deepcopy(reference)
    seed, recorder = context.random_seed(f"policy/{domain.name}"), context.recorder
    way = context.stage.settings["way"]
    if way == "rloo":
        assert reward is not None
        guide_by_rloo(
            policy,
            reference,
            tokenizer,
            domain,
            replace(config.rloo, seed=seed),
            reward_fn=reward,
            on_step=lambda log: _note_rloo(recorder, log),
        )
    elif way == "ppo":
        assert reward is not None
        guide_by_ppo(
            policy,
            reference,
            tokenizer,
            domain,
            replace(config.ppo, seed=seed),
            reward_fn=reward,
            on_step=lambda log: recorder.add("ppo_kl", log.kl, step=log.step),
        )
    else:
        guide_by_weights(
            policy,
            tokenizer,
            domain,
            replace(config.weighted, seed=seed),
            reward_fn=reward,
            on_step=lambda log: recorder.add("loss", log.loss, step=log.step),
        )
    return policy


def _read(domain: Domain) -> list[Any]:
    """Whatever of a domain a meta-test reads: other rows make another stage."""
    prompts = [{"prompt": prompt} for prompt in domain.prompts]
    return [*domain.support, *domain.eval_pairs, *prompts]


def _note_rloo(recorder: Recorder, log: RLOOLog) -> None:
    recorder.add("rloo_score", log.score_mean, step=log.step)
    if log.kl is not None:
        recorder.add("rloo_kl", log.kl, step=log.step)


def _scorer(path: str | None) -> Scorer | None:
    from shiftrm.models.loading import to_accelerator

    if path is None:
        return None
    scorer = Scorer.from_pretrained(path)
    scorer.model = to_accelerator(scorer.model)
    return scorer


def _note(recorder: Recorder, found: Evaluation) -> None:
    for name, value in found.numbers.items():
        of_pairs = name.startswith(("accuracy", "pl_loss"))
        recorder.add(name, value, n=found.pairs if of_pairs else found.responses)


def _table(records: Sequence[Record], names: Sequence[str], way: str, output: Path) -> str:
    """Each domain, before and after."""
    columns = {"accuracy_sum": "A_PL", "judged": "judge", "proxy": "guide", "kl": "KL"}
    numbers = {(r.stage, r.method, r.metric): r.value for r in records if r.step is None}
    lines = [f"{'domain':<20}{'policy':<12}" + "".join(f"{c:>9}" for c in columns.values())]
    for name in names:
        for method in ("reference", way):
            values = [numbers.get((f"evaluate/{name}", method, c), math.nan) for c in columns]
            cells = ["-" if math.isnan(v) else f"{v:.3f}" for v in values]  # type: ignore[arg-type]
            lines.append(f"{name:<20}{method:<12}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(f"Policies and responses: {output}/DOMAIN; numbers: {output / RECORDS_FILE}")
    return "\n".join(lines)
