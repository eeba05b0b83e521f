"""Runs in another gold world than the first: "gold" is the reward of the run's world."""

import json

import pytest

from shiftrm.cli import main
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from shiftrm.world.registered import adverts
from tests.demo.conftest import TINY

KIND = "world.kind=adverts"
ARMS = "methods=[fixed, fresh_labels, gold]"


def by_name(*words):
    return {stage.name: stage for stage in plan(read_recipe("gold_demo", [ARMS, *words]))}


@pytest.mark.parametrize(
    ("words", "kind", "gold"),
    [
        ((), None, "gold"),
        (("world.kind=topics",), None, "gold"),
        ((KIND,), "adverts", "gold:adverts"),
    ],
)
def test_every_stage_asks_the_gold_reward_of_the_runs_world(words, kind, gold):
    found = by_name(*words)
    assert job_of(found["methods/gold/round-1/policy"]).reward == gold
    assert job_of(found["methods/fixed/round-1/policy"]).watch == gold
    assert found["methods/fixed/round-2/evaluation"].settings["gold"] == gold
    assert found["comparison"].settings["judge"]["kind"] == gold
    for name in ("pairs", "methods/fresh_labels/round-2/labels"):
        assert found[name].settings.get("gold", "gold") == gold
    assert found["data"].settings["files"].get("kind") == kind


def test_the_default_world_by_its_name_is_the_same_run():
    def keys(*words):
        return stage_keys(plan(read_recipe("gold_demo", list(words))), 0)

    assert keys() == keys("world.kind=topics")
    other = keys(KIND)
    assert all(other[name] != key for name, key in keys().items())


def test_another_worlds_gold_may_be_named():
    found = by_name(KIND, "evaluation.gold=gold:topics", "judge.kind=gold:topics")
    assert found["evaluation"].settings["gold"] == "gold:topics"
    assert found["comparison"].settings["judge"]["kind"] == "gold:topics"
    assert job_of(found["methods/gold/round-1/policy"]).reward == "gold:adverts"


@pytest.mark.parametrize(
    "word", ["world.kind=advert", "evaluation.gold=gold:advert", "judge.kind=gold:advert"]
)
def test_a_world_that_does_not_exist_is_one_line(word, capsys):
    assert main(["run", "gold_demo", "--dry-run", word]) == 2
    error = capsys.readouterr().err.strip()
    assert "unknown gold world 'advert'" in error
    assert "adverts" in error
    assert "\n" not in error


def test_a_recipe_without_a_world_names_the_gold_it_means():
    judge = read_recipe("hh_helpful", ["model=m", "judge.kind=gold:adverts"]).judge_kind
    assert judge == "gold:adverts"
    with pytest.raises(UserError, match=r"judge.kind is 'golden'"):
        read_recipe("hh_helpful", ["model=m", "judge.kind=golden"])


@pytest.mark.slow
def test_a_run_in_the_second_world_to_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, KIND, ARMS, "world.labels=8", "execution.workers=1"]
    assert main(["run", "gold_demo", *words, "--output", "run"]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    gold = adverts.WORLD.gold_reward
    rows = read_jsonl(run / "methods/fixed/round-1/evaluation/scored.jsonl")
    for row in rows:
        for text, finished, said in zip(
            row["responses"], row["finished"], row["golds"], strict=True
        ):
            assert said == pytest.approx(gold(row["prompt"], text, finished=finished), abs=1e-5)
    rows = read_jsonl(run / "methods/gold/round-1/evaluation/scored.jsonl")
    assert all(row["rewards"] == row["golds"] for row in rows)
    labelled = read_jsonl(run / "methods/fresh_labels/round-1/labels/pairs.jsonl")
    assert {row["domain"] for row in labelled} <= set(adverts.TONES)
    for row in read_jsonl(run / "methods/fixed/round-1/judgement/verdicts-fixed-vs-sft.jsonl"):
        assert row["outcome"] in ("win", "tie", "lose")
    page = (run / "report.html").read_text()
    assert adverts.WORLD.about in page
    assert "world.kind" in page


def test_commands_that_take_gold_take_the_gold_of_a_world(tmp_path, capsys):
    prompt, good, bad = "a quiet hotel :", " enjoy silence with breakfast today", " dirty drums"
    for name, text in (("ours", good), ("theirs", bad)):
        row = {"prompt": prompt, "responses": [text, text], "finished": [True, True]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sides = ["--ours", str(tmp_path / "ours.jsonl"), "--theirs", str(tmp_path / "theirs.jsonl")]
    compare = ["evaluate", "win-rate", *sides, "--output", str(tmp_path / "wins"), "--judge"]
    assert main([*compare, "gold:adverts"]) == 0
    [verdict] = read_jsonl(tmp_path / "wins" / "verdicts.jsonl")
    assert verdict["outcome"] == "win"
    capsys.readouterr()
    assert main([*compare, "gold:advert"]) == 2
    assert "unknown gold world 'advert'" in capsys.readouterr().err
    samples = tmp_path / "samples.jsonl"
    rows = {"prompt": prompt, "responses": [good, bad], "proxy": [1.0, 0.0]}
    samples.write_text(json.dumps(rows) + "\n")
    best = ["evaluate", "best-of-n", "--samples", str(samples), "--output"]
    assert main([*best, str(tmp_path / "best.json"), "--gold", "gold:adverts"]) == 0
    found = json.loads((tmp_path / "best.json").read_text())
    expected = adverts.WORLD.gold_reward(prompt, good)
    assert found["points"][-1]["gold"]["value"] == pytest.approx(expected)
