"""Arms of a comparison differ in their method: reward models start from one head, in one order."""

import pytest

from shiftrm.cli import main
from shiftrm.trainers.pair_batches import ROW
from tests.draws import watch
from tests.pipeline.gold_world import write_recipe


@pytest.mark.slow
def test_arms_of_a_round_share_head_and_order(world, tmp_path, here, monkeypatch, capsys):
    path = write_recipe(
        tmp_path / "mine.yaml",
        world,
        rounds=2,
        methods={
            "fixed": {"reward": "fixed", "rounds": 1},
            "retrained": {"reward": "retrained"},
            "metarm": {"reward": "metarm"},
        },
        reward={
            "batch_size": 4,
            "settings": {"max_steps": 4, "max_length": 64, "logging_steps": 1},
            "meta": {"meta_batch_size": 2},
        },
    )
    seen = watch(monkeypatch, lambda inputs: inputs[ROW].tolist() if ROW in inputs else None)
    assert main(["run", str(path), "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    trained = [draws for draws in seen if draws.head is not None]
    assert len(trained) == 5, "the first reward model, and two rounds of two arms"
    assert [d.trainer for d in trained].count("MetaRMTrainer") == 2
    assert any("metarm.round-2" in draws.folder for draws in trained)
    draws = {d.folder: (d.head, str(d.batches)) for d in trained}

    def of(*words):
        return [draw for folder, draw in draws.items() if all(word in folder for word in words)]

    assert len(draws) == 5
    first = [draw for folder, draw in draws.items() if "round-" not in folder]
    assert len({*first, *of("round-1")}) == 1, "the first one is like those of round 1"
    assert len(set(of("round-2"))) == 1, "later rounds draw anew, alike for all arms"
    assert of("round-2")[0][0] != first[0][0]
    assert of("round-2")[0][1] != first[0][1]
    rows = [row for batch in trained[0].batches for row in batch]
    assert len(rows) == 16
    assert rows != sorted(rows), "it is an order that was drawn"
