"""The contrast arms of one small run, over two rounds where the second depends on the first."""

import pytest

from shiftrm.cli import main
from shiftrm.data.negatives import NEGATIVES
from shiftrm.files import read_jsonl
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from shiftrm.records import read_records
from tests.demo.conftest import TINY
from tests.pipeline.gold_world import write_recipe

ARMS = {
    "contrast_rounds": {"reward": "contrast_rounds", "rounds": 2},
    "contrast_hard": {"reward": "contrast_hard", "rounds": 2},
    **{name: {"reward": name} for name in ("contrast", "contrast_pairs", "contrast_both")},
    **{name: {"reward": name} for name in ("contrast_all", "contrast_meta")},
}


@pytest.mark.slow
def test_a_run_of_the_contrast_arms(world, tmp_path, here, capsys):
    path = write_recipe(tmp_path / "mine.yaml", world, methods=ARMS)
    output = tmp_path / "run"
    assert main(["run", str(path), "--output", str(output)]) == 0, capsys.readouterr().err
    records = read_records(output / "records.jsonl")
    seen = {(r.method, r.round) for r in records if r.stage == "evaluate" and r.metric == "kl"}
    assert {(name, k) for name in ARMS for k in range(1, ARMS[name].get("rounds", 1) + 1)} <= seen

    def part(name, file, number=1):
        return output / "methods" / name / f"round-{number}" / file

    def weights(name):
        return part(name, "reward_model/model/model.safetensors").read_bytes()

    # In round 1 there are no earlier rounds; everything else differs.
    assert weights("contrast") == weights("contrast_rounds")
    assert len({weights(name) for name in ARMS}) == len(ARMS) - 1
    rounds = [part("contrast_rounds", "groups/groups.jsonl", k) for k in (1, 2)]
    joined = part("contrast_rounds", "all_groups/groups.jsonl", 2)
    assert read_jsonl(joined) == [row for file in rounds for row in read_jsonl(file)]


OWN = """
from shiftrm.data.negatives import Negative

NOTHING = Negative(
    "nothing of use", "responses", list, lambda answer, answers, rng: answer._replace(text=" or")
)
"""
KIND = "own_negative:NOTHING"


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_negative.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_only_an_arm_with_ways_of_its_own_is_tested_on_them(own):
    words = ["methods=[retrained, contrast_all]"]
    before = stage_keys(plan(read_recipe("gold_demo", words)), 0)
    arms = f"mine: {{reward: contrast, settings: {{contrast_negatives: [cut, '{KIND}']}}}}"
    arms += ", retrained: {reward: retrained}, contrast_all: {reward: contrast_all}"
    stages = plan(read_recipe("gold_demo", [f"methods={{{arms}}}"]))
    after = stage_keys(stages, 0)
    for name in before:
        if name.endswith("evaluation"):
            assert before[name] == after[name]
    kinds = {s.name: s.settings.get("sight_kinds") for s in stages if s.name.endswith("evaluation")}
    mine = {name: found for name, found in kinds.items() if found is not None}
    assert set(mine) == {f"methods/mine/round-{k}/evaluation" for k in (1, 2, 3)} & set(kinds)
    assert all(found == [*NEGATIVES.names(), KIND] for found in mine.values())


def test_a_run_measures_how_often_gold_agrees_with_a_users_own_way(own, tmp_path, capsys):
    arms = f"methods={{mine: {{reward: contrast, settings: {{contrast_negatives: ['{KIND}']}}}}}}"
    words = [*TINY, arms, "execution.workers=1", "--output", "run"]
    assert main(["run", "gold_demo", *words]) == 0, capsys.readouterr().err
    found = {r.metric: r.value for r in read_records(tmp_path / "run" / "records.jsonl")}
    for name in ("sight_{}_before", "sight_{}_after", "gold_sight_{}"):
        assert 0 <= found[name.format(KIND)] <= 1
        assert name.format("shuffled") in found
    assert KIND in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
