"""The gold world's run over domains: stages on a tiny world, figures and tables from records."""

import dataclasses

import pytest
from transformers import AutoTokenizer

import oodpl_gold
from oodpl_figures import (
    LABELS,
    beta_figure,
    gold_figure,
    gradient_norm_figure,
    mean_over_domains,
    training_figure,
)
from oodpl_tables import all_tables
from shiftrm.config import apply_overrides, from_mapping, to_mapping
from shiftrm.data.domains import load_split
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.rendering import encode
from shiftrm.pipeline import engine
from shiftrm.pipeline.domain_config import METHODS, DomainRunConfig
from shiftrm.pipeline.domain_plan import plan, sources, targets
from shiftrm.records import Record, read_records
from shiftrm.report.plots import render
from shiftrm.trainers.pair_batches import ROW
from shiftrm.world.build_domains import DOMAINS
from shiftrm.world.domain_gold import HELD_OUT, SOURCES, gold
from tests.draws import watch

TINY = [
    "betas=[1.0]", "meta.outer_steps=2", "meta.evaluations=1", "meta.support_batch_size=4",
    "meta.query_batch_size=4", "world.hidden_size=16", "world.sft_examples=128",
    "world.support=16", "world.pairs=16", "world.eval_pairs=8", "world.heads=2",
    "world.intermediate_size=32", "sft.epochs=1", "policy.updates=2", "policy.batch_size=8",
    "evaluation.responses_per_prompt=1",
]  # fmt: skip


def configure(*words):
    return from_mapping(DomainRunConfig, apply_overrides(to_mapping(DomainRunConfig()), [*words]))


@pytest.mark.slow
def test_a_tiny_run_measures_what_it_says(tmp_path, monkeypatch):
    def in_process(waiting, finished, root, keys, seed, workers, threads, notify):
        for stage in waiting:
            engine.execute(stage, root, keys[stage.name], seed)

    monkeypatch.setattr(engine, "_run_pool", in_process)
    config = configure(*TINY, "methods=[reference,oodpl_weighted,pooled_weighted,dpo]", "seed=3")
    engine.run_stages(plan(config), tmp_path, seed=3)
    records = read_records(tmp_path / "records.jsonl")
    assert {r.seed for r in records} == {3}
    found = {(r.stage, r.method, r.metric): r.value for r in records}
    for method in ("reference", "oodpl_weighted", "oodpl_beta_1", "dpo"):
        for domain in HELD_OUT:
            rows = read_jsonl(tmp_path / "policies" / method / f"{domain}.jsonl")
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
    assert targets(search=False) == HELD_OUT
    assert sources(search=False) == SOURCES
    assert not {*targets(search=True), *sources(search=True)} & {*HELD_OUT}
    assert {*targets(search=True), *sources(search=True)} == {*SOURCES}


def test_all_that_learns_from_pairs_has_one_budget():
    config = configure("meta.outer_steps=7", "meta.domains_per_step=3", "meta.query_batch_size=5")
    learners = [s for s in plan(config) if s.function.endswith(("train_on_pairs", "train_dpo"))]
    assert len(learners) == 1 + len(HELD_OUT) + 1
    assert {(s.settings["steps"], s.settings["pairs"]) for s in learners} == {(7, 15)}
    updates = config.ppo.steps * 16 * 16 // config.ppo.minibatch_size
    assert updates == config.policy.updates, "and all that makes a policy another"
    assert config.ppo.minibatch_size == config.policy.batch_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[oodpl_weigthed]"], "unknown method 'oodpl_weigthed'; did you mean"),
        (["betas=[0.0]"], "they must be > 0"),
        (["betas=[1.0,1.0]"], "name none twice"),
        (["meta.reduction=max"], "meta.reduction is 'max'"),
        (["meta.outer_steps=0"], "meta.outer_steps is 0; it must be above 0"),
        (["policy.beta=3.0"], "set beta or pairs.guide_beta"),
        (["world.seed=1"], "world.seed follows the run's seed"),
    ],
)
def test_bad_settings_are_named(words, message):
    with pytest.raises(UserError, match=message):
        configure(*words)


def made_up_records():
    records = []
    for seed in (0, 1):
        for t, domain in enumerate(HELD_OUT):
            for m, method in enumerate((*METHODS, "oodpl_beta_1", "oodpl_beta_2")):
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
        {seed: METHODS.index("dpo") + 0.15 + 0.01 * seed for seed in (0, 1)}
    )
    tables = all_tables(records)
    row = next(line for line in tables["gold"].splitlines() if LABELS["finetuned"] in line)
    # Two seeds 0.01 apart: a half width of 12.7062 * 0.005.
    assert row.split("|")[2].strip() == "1.005 ± 0.064"
    assert row.split("|")[-2].strip() == "1.155 ± 0.064"
    ours = METHODS.index("oodpl_weighted") - METHODS.index("pooled_weighted")
    line = f"{LABELS['oodpl_weighted']} | {LABELS['pooled_weighted']} | {ours:+.2f} ({ours:+.2f} to"
    assert line in tables["differences"]
    assert set(LABELS) == set(METHODS)

    for number, kept in enumerate(  # whole runs, and the shortest one
        (records, [r for r in records if r.method in ("reference", "beta_1")])
    ):
        folder = tmp_path / str(number)
        write_jsonl(folder / "records.jsonl", [dataclasses.asdict(r) for r in kept])
        (folder / "config.yaml").write_text("beta: 1.0\n")
        oodpl_gold.draw([folder], folder / "results.md")
        page = (folder / "results.md").read_text()
        assert all_tables(kept)["gold"] in page
        assert len(list(folder.glob("*.png"))) == page.count(".png") == 4
    for figure in (
        training_figure(records, 1.0),
        gold_figure(records),
        beta_figure(records),
        gradient_norm_figure(records),
    ):
        assert render(figure, format="png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_baselines_share_head_and_order(tmp_path, monkeypatch):
    """The pooled reward model starts as OODPL's, and DPO sees its pairs in the same order."""
    config = configure(*TINY, "methods=[pooled_weighted,dpo]", "betas=[]")
    stages = [s for s in plan(config) if not s.name.startswith("policies")]
    keys = engine.stage_keys(stages, 0)
    seen = watch(monkeypatch, rows_or_chosen)
    for stage in stages:
        engine.execute(stage, tmp_path, keys[stage.name], 0)
    by_kind = {draws.trainer: draws for draws in seen}
    pooled, dpo = by_kind["RewardTrainer"], by_kind["DPOTrainer"]
    assert by_kind["OODPLTrainer"].head == pooled.head
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    domains = load_split(tmp_path / "world" / "files" / DOMAINS).all
    pairs = [row for d in domains if d.name in SOURCES for row in d.query]
    texts = [encode(tokenizer, row["prompt"], row["chosen"], finished=False) for row in pairs]
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
    return [row[kept].tolist()[:-1] for row, kept in zip(ids, mask, strict=True)][: len(ids) // 2]
