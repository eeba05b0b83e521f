"""Every recipe with rounds is planned, and run for one or two rounds of two steps."""

import pytest

from shiftrm.cli import main
from shiftrm.data.pairs import read_pairs
from shiftrm.files import read_jsonl
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, read_recipe
from shiftrm.records import read_records
from tests.pipeline.conftest import LOOP, RECIPES

TWO_ROUNDS = ("hh_helpful", "summary")
"""One round of the others shows that their data goes through every stage."""


@pytest.mark.parametrize("name", LOOP)
def test_a_recipe_is_understood_as_it_stands(name):
    """Settings included: each command would take its words."""
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["model=owner/base", "execution.bf16=false"])
    stages = plan(recipe)
    check_settings(stages)
    seen = set()
    for stage in stages:
        assert seen.issuperset(stage.needs), stage.name
        seen.add(stage.name)


@pytest.mark.parametrize("name", LOOP)
def test_a_dry_run_says_what_would_be_done(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(RECIPES / f"{name}.yaml"), *words(name), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "shiftrm sft --model" in said
    assert "methods/" in said
    assert "million parameters" in said
    assert "Nothing was run or written." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOP)
def test_a_recipe_runs_to_its_page(name, words, tmp_path, capsys, here):
    output = tmp_path / "run"
    settings = [*words(name), *([] if name in TWO_ROUNDS else ["rounds=1"])]
    assert main(["run", str(RECIPES / f"{name}.yaml"), *settings, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"Page: {output / 'report.html'}" in said
    recipe = read_recipe(RECIPES / f"{name}.yaml", settings)
    records = read_records(output / "records.jsonl")
    for method in recipe.methods:
        for number in range(1, recipe.rounds_of(method) + 1):
            found = {r.metric for r in records if (r.method, r.round) == (method, number)}
            assert {"kl", "accuracy_heldout", "relative_difference_variance_after"} <= found
            if recipe.methods[method].reward == "metarm" and not recipe.methods[method].is_dpo:
                assert {"meta_influence", "eval_accuracy"} <= found
                model = output / f"methods/{method}/round-{number}/reward_model/model"
                assert len(Scorer.from_pretrained(model)(["why ?"], ["please enjoy"])) == 1
    evaluated = {str(row["prompt"]) for row in read_jsonl(output / "data" / "eval_prompts.jsonl")}
    trained = {str(row["prompt"]) for row in read_jsonl(output / "data" / "prompts.jsonl")}
    assert not evaluated & trained
    assert read_pairs(output / "data" / "pairs.jsonl")
