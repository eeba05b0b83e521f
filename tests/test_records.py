import pytest

from shiftrm.errors import UserError
from shiftrm.records import Record, Recorder, read_records, write_records


def test_round_trip(tmp_path):
    recorder = Recorder(stage="evaluate", method="fixed", round=2, seed=7)
    recorder.add("gold_mean", 1.25, n=40)
    recorder.add("difference_values_sft", [0.1, 0.2])
    recorder.add("kl", float("nan"))  # not measured is not a value
    recorder.add("kl", None)
    write_records(tmp_path / "r.jsonl", recorder.records)
    back = read_records(tmp_path / "r.jsonl")
    assert back == recorder.records
    assert [(r.metric, r.value, r.n, r.seed, r.round) for r in back] == [
        ("gold_mean", 1.25, 40, 7, 2),
        ("difference_values_sft", [0.1, 0.2], None, 7, 2),
    ]
    assert "torch" in back[0].versions


def test_a_record_is_finite():
    with pytest.raises(ValueError, match="not finite"):
        Record(stage="s", method="m", round=0, metric="x", value=float("inf"))


def test_unknown_field_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        '{"stage": "s", "method": "m", "round": 1, "metric": "x", "value": 1, "when": 3}\n'
    )
    with pytest.raises(UserError, match=r"r\.jsonl:1: unknown field 'when'"):
        read_records(tmp_path / "r.jsonl")
