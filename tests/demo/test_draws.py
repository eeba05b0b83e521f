"""The demo's arms: reward models of a round start from one head and see the pairs in one order."""

import pytest

from shiftrm.pipeline.engine import execute, stage_keys
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from shiftrm.trainers.pair_batches import ROW
from tests.demo.conftest import TINY
from tests.draws import watch


@pytest.mark.slow
def test_arms_of_a_round_share_head_and_order(tmp_path, monkeypatch):
    settings = [*TINY, "rounds=2", "methods=[fixed, retrained, metarm_scale_free]"]
    config = read_recipe("gold_demo", settings)
    stages = plan(config)
    keys = stage_keys(stages, config.seed)
    seen = watch(monkeypatch, lambda inputs: inputs[ROW].tolist() if ROW in inputs else None)
    for stage in stages:
        if stage.name != "comparison":
            execute(stage, tmp_path, keys[stage.name], config.seed)
    trained = [draws for draws in seen if draws.head is not None]
    assert len(trained) == 5, "the first reward model, and two rounds of two arms"
    draws = [(d.head, str(d.batches)) for d in trained]
    first, retrained, other, metarm, another = draws
    assert first == retrained == metarm, "in the first round the fixed one is like the others"
    assert other == another, "later rounds draw anew, alike for all arms"
    assert other[0] != first[0]
    assert other[1] != first[1]
