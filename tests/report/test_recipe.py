"""The page of a recipe's run: complete, honest about what is missing, escaped."""

import re
from pathlib import Path

import pytest
import yaml

from shiftrm.cli import main
from shiftrm.records import Record, write_records
from shiftrm.report.measurements import Measurements
from shiftrm.report.recipe import render_recipe_page, summary, write_recipe_report
from shiftrm.report.recipe_arms import arms_of
from shiftrm.report.recipe_samples import read_samples

from .recipe_records import CONFIG, EVIL, records_of, write_folder
from .test_page import assert_harmless, read, text_of
from .test_recipe_gold import records as gold_records


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which is most of a page's time."""
    monkeypatch.setattr("shiftrm.report.page.plots.render", lambda figure: b"<svg/>")


def test_the_page_has_everything_in_order(tmp_path: Path):
    folder = tmp_path / "run"
    write_folder(folder)
    records = [*records_of(gold=True), *gold_records()]
    path = write_recipe_report(records, tmp_path, folder, CONFIG)
    assert path == tmp_path / "report.html"
    html = path.read_text(encoding="utf-8")
    assert_harmless(html)
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Wins against SFT and against each other", "Did the reward model go blind?", "Pictures",
        "Over-optimisation", "Diversity", "All numbers", "Sample responses",
        "Data, configuration and versions", "How the numbers are made", "Glossary",
    ]  # fmt: skip
    images = [attributes for tag, attributes in read(html).tags if tag == "img"]
    assert len(images) == 9
    assert all(len(image["alt"] or "") > 30 for image in images)
    text = text_of(html)
    assert "69 / 26 / 5 [60, 78]" in text
    assert "not measured" not in text.lower()
    assert EVIL in text
    assert "<script" not in html
    assert "secret" not in html
    assert "a reward model" not in text.split("The arms")[0]  # the judge is a language model


@pytest.mark.parametrize(
    "keep",
    [
        lambda r: r.method == "fixed",
        lambda r: r.method in ("metarm", "dpo"),
        lambda r: r.stage == "ppo",
        lambda r: r.stage == "reward_model",
        lambda r: r.stage == "compare",
        lambda r: r.stage == "data",
        lambda r: r.method != "sft",
        lambda r: "after" not in r.metric,
        lambda r: r.metric != "kl",
        lambda r: not r.metric.startswith("win"),
        lambda r: r.round < 2,
        lambda r: (r.method, r.seed) != ("fixed", 1),
        lambda r: False,
    ],
)
def test_missing_parts_do_not_crash(keep, undrawn):
    records = [*records_of(0, gold=True), *records_of(1, gold=True)]
    for config in (CONFIG, None):
        html = render_recipe_page([r for r in records if keep(r)], config=config)
        assert_harmless(html)


def test_what_was_not_measured_is_said(undrawn):
    text = text_of(render_recipe_page(records_of(judged=False), config=CONFIG))
    assert "No judge was there (judge.kind is none)" in text
    assert "no second reward model was given: evaluation.gold" in text
    assert "whether it ranks worse was not measured" in text
    assert "one seed proves little" in text
    without = [r for r in records_of() if "similarity" not in r.metric]
    assert "No embedder was given" in text_of(render_recipe_page(without, config=CONFIG))


def test_the_judge_that_only_counts_is_named(undrawn):
    config = {**CONFIG, "judge": {"kind": "reward-model", "model": "x"}}
    assert "The judge is a reward model" in text_of(render_recipe_page(records_of(), config=config))


def test_several_seeds(undrawn):
    records = [record for seed in (0, 1, 2) for record in records_of(seed)]
    html = render_recipe_page(records, config=CONFIG)
    text = text_of(html)
    # Wins of MetaRM in round 3: 69, 70, 71 %; t-interval 4.3027 / sqrt(3) * 1 % = 2.48 %.
    assert "70 / 25 / 5 [68, 72]" in text
    assert "one seed" not in text.split("How the numbers")[0]
    assert "43,000 to 43,002" in text
    assert render_recipe_page(list(records), config=CONFIG) == html


def test_everything_foreign_is_escaped(undrawn):
    odd = [
        Record(**{**r.__dict__, "method": EVIL, "commit": EVIL, "versions": EVIL})
        for r in records_of()
        if r.method == "metarm"
    ]
    odd.append(Record("data", "sft", 0, f"pairs_dropped_{EVIL}", 3.0))
    config = {**CONFIG, "name": EVIL, EVIL: [EVIL]}
    html = render_recipe_page([*records_of(), *odd], config=config, notes=[EVIL])
    assert_harmless(html)
    assert "<script" not in html
    assert "\x1b" not in summary([Record("evaluate", "a\x1b[31mb", 1, "kl", 1.0)])


def test_samples_of_every_arm_beside_each_other(tmp_path: Path):
    write_folder(tmp_path)
    records = records_of()
    arms = arms_of(Measurements(records), records, CONFIG)
    first, *rest = read_samples(tmp_path, arms)
    assert len(rest) == 3
    assert first.prompt == f"user: {EVIL}\n\nassistant: Yes?\n\nuser: Go on."
    assert [(a.name, a.round, a.reward) for a in first.answers] == [
        ("SFT", 0, "0.50"), ("fixed (vanilla PPO)", 10, "0.50"), ("MetaRM", 4, "0.50"),
        ("DPO", 1, "0.50"),
    ]  # fmt: skip
    assert [a.cut for a in rest[1].answers] == [True] * 4
    assert len(rest[1].answers[0].response) < 2100
    (tmp_path / "evaluation" / "scored.jsonl").write_text("{broken")
    assert read_samples(tmp_path, arms)[0].answers[0].name == "fixed (vanilla PPO)"
    assert read_samples(tmp_path / "nowhere", arms) == []


def test_any_single_record_makes_a_page(undrawn):
    kinds = {(r.stage, r.metric): r for r in records_of(gold=True) if r.method != "dpo"}
    for record in list(kinds.values())[::3]:
        render_recipe_page([record])
        assert summary([record])


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("shiftrm.report.recipe.win_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_recipe_report([], path, None, None)
    assert path.read_text() == "old"


# -- `shiftrm report DIR...` ---------------------------------------------------------------------


def write_run(folder: Path, seed: int, **settings: object) -> Path:
    write_records(folder / "records.jsonl", records_of(seed))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": seed, **settings}))
    return folder


def test_report_knows_a_recipes_runs(tmp_path: Path, undrawn, capsys):
    runs = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    output = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    text = text_of(output.read_text(encoding="utf-8"))
    assert "shiftrm run: hh_helpful" in text
    assert "3 arms, 4 rounds, 2 seeds." in text
    assert "with other settings" not in text
    write_run(tmp_path / "1", 1, rounds=7)
    output = tmp_path / "again.html"  # a page that is there is not written over
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    assert "rounds: 4 -> 7" in text_of(output.read_text(encoding="utf-8"))


def test_report_refuses_runs_of_both_kinds(tmp_path: Path, capsys):
    recipe = write_run(tmp_path / "0", 0)
    demo = tmp_path / "1"
    write_records(demo / "records.jsonl", records_of(1))
    (demo / "config.yaml").write_text("seed: 1\ndata: {pairs: 3000}\n")
    assert main(["report", str(recipe), str(demo)]) == 2
    assert "give runs of one kind" in capsys.readouterr().err
