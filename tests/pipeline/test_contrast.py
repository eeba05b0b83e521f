"""The contrast arms of one small run, over two rounds where the second depends on the first."""

import pytest

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.records import read_records
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
