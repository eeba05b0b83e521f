"""kill -9 at any moment and a rerun end in the records of an uninterrupted run."""

import random
import signal

import pytest

from shiftrm.data.groups import read_groups
from shiftrm.records import read_records
from tests.demo.conftest import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run."""
    output = tmp_path_factory.mktemp("straight") / "run"
    status, errors = demo(output)
    assert status == 0, errors
    return output


def test_a_whole_run_is_complete(straight):
    records = read_records(straight / "records.jsonl")
    seen = {(r.stage, r.method, r.metric) for r in records}
    for method in ("fixed", "metarm_scale_free"):
        for metric in (
            "gold_mean",
            "kl",
            "accuracy_policy_before",
            "accuracy_policy_after",
            "relative_difference_variance_after",
            "win_vs_sft",
            "accuracy_heldout",
        ):
            assert ("evaluate", method, metric) in seen
        assert ("ppo", method, "difference_variance") in seen
        assert ("compare", method, "win_vs_sft") in seen
    assert ("reward_model", "metarm_scale_free", "meta_influence") in seen
    assert ("reward_model", "sft", "eval_accuracy") in seen
    assert (straight / "report.html").stat().st_size > 10_000
    assert not (straight / ".work").exists()
    groups = read_groups(
        straight / "methods" / "metarm_scale_free" / "round-1" / "groups" / "groups.jsonl"
    )
    assert all(len(group["responses"]) == 3 for group in groups)
    from shiftrm.models.scoring import Scorer

    scorer = Scorer.from_pretrained(
        straight / "methods" / "metarm_scale_free" / "round-1" / "reward_model" / "model"
    )
    assert len(scorer(["describe the garden :"], [" lovely roses"])) == 1


def test_killed_in_random_places(straight, tmp_path):
    rng = random.Random(7)
    for kill in range(4):
        moment = (1 if kill else 0, rng.uniform(0.0, 0.4))
        status, _ = demo(tmp_path / "run", kill_after=moment)
        assert status == -signal.SIGKILL, f"kill {kill}: the run had ended already"
        assert not (tmp_path / "run" / "report.html").exists()
    status, errors = demo(tmp_path / "run")
    assert status == 0, errors
    assert "already there" in errors, "what was finished is not done again"
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == (
        straight / "records.jsonl"
    ).read_bytes()
    assert not list((tmp_path / "run").glob("**/*.tmp"))


def test_control_c_is_one_line(tmp_path):
    status, errors = demo(tmp_path / "run", kill_after=(1, 0.0), how=signal.SIGINT)
    assert status == 130
    lines = [line for line in errors.splitlines() if line[0] != "[" and "so far" not in line]
    assert lines == ["shiftrm: interrupted; give the same command again to continue"]


def test_same_seed_same_records_whatever_the_workers(straight, tmp_path):
    status, errors = demo(tmp_path / "run", workers=1)
    assert status == 0, errors
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == (
        straight / "records.jsonl"
    ).read_bytes()
