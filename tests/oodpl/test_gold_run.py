"""The recipe gold_domains: stages on a tiny world, figures and tables from records."""

import dataclasses

import pytest
from transformers import AutoTokenizer

import oodpl_gold
from shiftrm.cli import main
from shiftrm.data.domains import load_split
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.rendering import encode
from shiftrm.pipeline import engine
from shiftrm.pipeline.domain_section import DOMAIN_ARMS, DomainSection
from shiftrm.pipeline.job_checks import job_of, settings_of
from shiftrm.pipeline.jobs import MetaTrain, Optimise, TrainReward
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, notes, read_recipe
from shiftrm.policies.ppo_config import PPOConfig
from shiftrm.records import Record, read_records
from shiftrm.report.domain_figures import all_figures
from shiftrm.report.domain_records import LABELS, mean_over_domains
from shiftrm.report.domains import all_tables
from shiftrm.report.plots import render
from shiftrm.trainers.pair_batches import ROW
from shiftrm.world.domain_gold import HELD_OUT, SOURCES, gold
from tests.draws import watch

TINY = [
    "domains.betas=[1.0]", "domains.meta.max_steps=2", "domains.meta.eval_steps=2",
    "domains.meta.support_batch_size=4", "domains.meta.query_batch_size=4",
    "domains.world.hidden_size=16", "domains.world.sft_examples=128", "domains.world.support=16",
    "domains.world.pairs=16", "domains.world.eval_pairs=8", "domains.world.heads=2",
    "domains.world.intermediate_size=32", "sft.settings.num_train_epochs=1",
    "domains.weighted.updates=2", "domains.weighted.batch_size=8", "evaluation.responses=1",
    "reward.batch_size=8", "reward.settings.max_steps=2", "dpo.batch_size=8",
    "dpo.settings.max_steps=2",
]  # fmt: skip


def configure(*words):
    return read_recipe("gold_domains", [*words])


@pytest.mark.slow
def test_a_tiny_run_measures_what_it_says(tmp_path, in_process, capsys):
    methods = "methods=[reference,oodpl_weighted,pooled_weighted,dpo]"
    words = ["run", "gold_domains", *TINY, methods, "seed=3", "--output", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Gold in the domains without labels: reference" in said
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 4
    assert "Means over the domains" in page
    records = read_records(tmp_path / "records.jsonl")
    assert {r.seed for r in records} == {3}
    found = {(r.stage, r.method, r.metric): r.value for r in records}
    for method in ("reference", "oodpl_weighted", "oodpl_beta_1", "dpo"):
        for domain in HELD_OUT:
            rows = read_jsonl(tmp_path / "policies" / method / domain / "test/responses.jsonl")
            golds = [
                gold(domain, row["prompt"], response, finished=done)
                for row in rows
                for response, done in zip(row["responses"], row["finished"], strict=True)
            ]
            mean = sum(golds) / len(golds)
            assert found[f"evaluate/{domain}", method, "gold_mean"] == pytest.approx(mean)
            assert (found[f"evaluate/{domain}", method, "kl"] == 0) == (method == "reference")
            watched = found["meta", "beta_1", f"eval_{domain}_reference_accuracy"]
            reference = found[f"evaluate/{domain}", "reference", "accuracy_mean"]
            assert watched == pytest.approx(reference), "one meaning of A_PL"
    again = found["evaluate/castle", "oodpl_beta_1", "gold_mean"]
    assert again == found["evaluate/castle", "oodpl_weighted", "gold_mean"], "the same method"


def test_the_search_for_settings_never_reads_held_out_domains():
    section, search = DomainSection(), DomainSection(search=True)
    assert (section.targets, section.sources) == (HELD_OUT, SOURCES)
    assert not {*search.targets, *search.sources} & {*HELD_OUT}
    assert {*search.targets, *search.sources} == {*SOURCES}
    stages = plan(configure("domains.search=true"))
    assert not [name for name in HELD_OUT if any(name in str(s.settings) for s in stages)]


def test_all_that_learns_from_pairs_has_one_budget():
    config = configure()
    stages = plan(config)
    meta = next(settings_of(s) for s in stages if isinstance(job_of(s), MetaTrain))
    budget = meta["max_steps"], meta["domains_per_step"] * meta["query_batch_size"]
    learners = [s for s in stages if isinstance(job_of(s), TrainReward | Optimise)]
    assert len(learners) == 1 + len(HELD_OUT) + 1
    for stage in learners:
        given = settings_of(stage)
        batch = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
        assert (given["max_steps"], batch) == budget, stage.name
    ppo, weighted = PPOConfig(**config.policy.settings), config.domains.weighted
    updates = ppo.steps * ppo.prompts_per_step * ppo.rollouts_per_prompt // ppo.minibatch_size
    assert updates == weighted.updates, "and all that makes a policy another"
    assert ppo.minibatch_size == weighted.batch_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[oodpl_weigthed]"], "unknown method 'oodpl_weigthed'; did you mean"),
        (["methods=[dpo,dpo]"], "name none twice"),
        (["methods={mine: {reward: oodpl, policy: plain}}"], "methods.mine: reward and policy are"),
        (["domains.betas=[0.0]"], "they must be > 0"),
        (["domains.betas=[1.0,1.0]"], "name none twice"),
        (["domains.meta.reduction=max"], "stage meta/beta_0.25: reduction is 'max'"),
        (["domains.meta.max_steps=0"], "max_steps is 0; give at least 1"),
        (["domains.meta.beta=2"], "set domains.beta or domains.betas"),
        (["domains.meta.seed=2"], "domains.meta.seed: the run sets it from its own `seed`"),
        (["domains.weighted.beta=3.0"], "set domains.beta or domains.guide_beta"),
        (["domains.world.seed=1"], "domains.world.seed follows the run's seed"),
        (["policy.settings.steps=0"], "steps is 0; it must be at least 1"),
        (["rounds=2"], "rounds: not used in a run over domains; leave it out"),
        (["evaluation.judged=3"], "evaluation: not used in a run over domains"),
        (["sft=null"], "sft is null; the gold world's base model needs it"),
    ],
)
def test_bad_settings_are_named(words, message):
    with pytest.raises(UserError, match=message):
        check_settings(plan(configure(*words)))


def test_another_budget_is_said():
    assert notes(configure()) == []
    [reward, dpo] = notes(configure("domains.meta.max_steps=50"))
    assert "reward trains for max_steps=150 on batches of 128 pairs, but meta-training" in reward
    assert "for 50 on 128" in dpo


def test_the_plan_is_printed_with_every_command(capsys):
    assert main(["run", "gold_domains", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "shiftrm meta-train --model start/model --policy sft/model --domains" in said
    assert "--way none --judge data/world/weights.json" in said


def made_up_records():
    records = []
    for seed in (0, 1):
        for t, domain in enumerate(HELD_OUT):
            for m, method in enumerate((*LABELS, "oodpl_beta_1", "oodpl_beta_2")):
                for metric in ("gold_mean", "kl", "accuracy_mean", "accuracy_sum"):
                    value = m + 0.1 * t + 0.01 * seed
                    records.append(
                        Record(f"evaluate/{domain}", method, 0, metric, value, seed=seed)
                    )
        for beta in ("beta_1", "beta_2"):
            for step in (1, 2, 3):
                for metric in ("loss", "accuracy", "hypergradient_norm", "eval_castle_accuracy"):
                    records.append(
                        Record("meta", beta, 0, metric, 1 / step + seed, step=step, seed=seed)
                    )
    return records


def test_tables_and_figures_from_records(tmp_path, capsys):
    records = made_up_records()
    assert mean_over_domains(records, "dpo", "gold_mean") == pytest.approx(
        {seed: list(LABELS).index("dpo") + 0.15 + 0.01 * seed for seed in (0, 1)}
    )
    tables = all_tables(records)
    row = next(line for line in tables["gold"].rows if LABELS["finetuned"] in line)
    # Two seeds 0.01 apart: a half width of 12.7062 * 0.005.
    assert (row[1], row[-1]) == ("1.005 ± 0.064", "1.155 ± 0.064")
    ours = list(LABELS).index("oodpl_weighted") - list(LABELS).index("pooled_weighted")
    named = (LABELS["oodpl_weighted"], LABELS["pooled_weighted"])
    row = next(line for line in tables["differences"].rows if line[:2] == named)
    assert row[2].startswith(f"{ours:+.2f} ({ours:+.2f} to")
    assert set(LABELS) == set(DOMAIN_ARMS)

    for number, kept in enumerate(  # whole runs, and the shortest one
        (records, [r for r in records if r.method in ("reference", "beta_1")])
    ):
        folder = tmp_path / str(number)
        write_jsonl(folder / "records.jsonl", [dataclasses.asdict(r) for r in kept])
        (folder / "config.yaml").write_text("domains: {beta: 1.0}\n")
        oodpl_gold.draw([folder], folder / "results.md")
        page = (folder / "results.md").read_text()
        assert oodpl_gold.markdown(all_tables(kept)["gold"]) in page
        assert len(list(folder.glob("*.png"))) == page.count(".png") == 4
    for _, figure in all_figures(records, 1.0).values():
        assert render(figure, format="png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_baselines_share_head_and_order(tmp_path, monkeypatch):
    """The pooled reward model starts as OODPL's, and DPO sees its pairs in the same order."""
    config = configure(*TINY, "methods=[pooled_weighted,dpo]", "domains.betas=[]")
    stages = [s for s in plan(config) if not s.name.startswith("policies")]
    keys = engine.stage_keys(stages, 0)
    seen = watch(monkeypatch, rows_or_chosen)
    for stage in stages:
        engine.execute(stage, tmp_path, keys[stage.name], 0)
    by_kind = {draws.trainer: draws for draws in seen}
    pooled, dpo = by_kind["RewardTrainer"], by_kind["DPOTrainer"]
    assert by_kind["OODPLTrainer"].head == pooled.head
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft/model")
    domains = load_split(tmp_path / "data/world/domains").all
    pairs = [row for d in domains if d.name in SOURCES for row in d.query]
    texts = [
        encode(tokenizer, row["prompt"], row["chosen"], finished=row["chosen_finished"])
        for row in pairs
    ]
    assert len(pooled.batches) == len(dpo.batches) == 2
    for rows, chosen in zip(pooled.batches, dpo.batches, strict=True):
        assert chosen == [texts[row] for row in rows]


def rows_or_chosen(inputs):
    """Of the reward model's batches the rows, of DPO's the tokens of the preferred sides."""
    if ROW in inputs:
        return inputs[ROW].tolist()
    if "completion_mask" not in inputs:
        return None
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)][: len(ids) // 2]
