import pytest

from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.metrics import METRICS, Better, Metric, UndeclaredMetric, declare, metric
from shiftrm.records import Record, Recorder, read_records, write_records
from shiftrm.report.measurements import Measurements


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
        Record(stage="s", method="m", round=0, metric="kl", value=float("inf"))


def test_unknown_field_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        '{"stage": "s", "method": "m", "round": 1, "metric": "kl", "value": 1, "when": 3}\n'
    )
    with pytest.raises(UserError, match=r"r\.jsonl:1: unknown field 'when'"):
        read_records(tmp_path / "r.jsonl")


def test_what_is_not_declared_is_neither_recorded_nor_read(tmp_path):
    recorder = Recorder(stage="evaluate", method="fixed", round=1, seed=0)
    with pytest.raises(UndeclaredMetric, match="metric 'unparsed_vs_sft' is not declared"):
        recorder.add("unparsed_vs_sft", None)
    with pytest.raises(UndeclaredMetric, match="did you mean 'gold_mean'"):
        Measurements([]).final("evaluate", "fixed", 1, "gold_meen")
    for read in (Measurements([]).curve, Measurements([]).values, Measurements([]).sample_size):
        with pytest.raises(UndeclaredMetric):
            read("evaluate", "fixed", 1, "x")
    with pytest.raises(UndeclaredMetric):
        Measurements([]).rounds("fixed", "evaluate", "x")
    row = {"stage": "evaluate", "method": "fixed", "round": 1, "value": 0.4}
    write_jsonl(tmp_path / "r.jsonl", [{**row, "metric": m} for m in ("kl", "unparsed_vs_sft")])
    with pytest.raises(
        UserError, match=r"r\.jsonl:2: .* not know the metric 'unparsed_vs_sft'; the"
    ):
        read_records(tmp_path / "r.jsonl")


def test_names_of_the_runs_own_are_declared_with_a_star():
    assert metric("win_vs_my arm").better is Better.HIGHER
    assert metric("win_low_vs_sft").id == "win_low_vs_*"
    assert metric("pairs_dropped_equal_sides").unit == "rows"
    assert metric("accuracy_heldout").id == "accuracy_heldout", "an exact name goes first"
    assert len({one.id for one in METRICS}) == len(METRICS)


def test_a_metric_is_declared_from_outside(monkeypatch):
    monkeypatch.setattr("shiftrm.metrics._EXACT", {})
    monkeypatch.setattr("shiftrm.metrics._PATTERNS", [])
    try:
        declare(Metric("politeness_*", "Politeness", "share", 3, Better.HIGHER))
        recorder = Recorder(stage="evaluate", method="fixed", round=1, seed=0)
        recorder.add("politeness_mean", 0.5)
        found = Measurements(recorder.records).final("evaluate", "fixed", 1, "politeness_mean")
        assert found == {0: 0.5}
        assert metric("politeness_mean").heading == "Politeness"
        declare(Metric("politeness_*", "Politeness", "share", 3, Better.HIGHER))  # again: no harm
        with pytest.raises(ValueError, match="already declared as 'Politeness'"):
            declare(Metric("politeness_*", "Manners"))
    finally:
        metric.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "0.5"}, "field 'value' is '0.5'; expected a finite number, or a list of them"),
        ({"value": 10**400}, "field 'value' is 10*...; expected a finite number"),
        ({"value": [1, None]}, r"field 'value' is \[1, None\]; expected"),
        ({"value": True}, "field 'value' is True; expected"),
        ({"round": "1"}, "field 'round' is '1'; expected a whole number from 0"),
        ({"round": None}, "field 'round' is None; expected a whole number from 0"),
        ({"seed": 10**30}, "field 'seed' is 10*; expected a whole number"),
        ({"n": 1.5}, "field 'n' is 1.5; expected a whole number"),
        ({"method": 3}, "field 'method' is 3; expected text"),
    ],
)
def test_a_value_of_another_type_is_named_by_line_and_field(tmp_path, changes, message):
    row = {"stage": "s", "method": "m", "round": 1, "metric": "kl", "value": 1, "step": None}
    write_jsonl(tmp_path / "r.jsonl", [row, row | changes])
    with pytest.raises(UserError, match=rf"r\.jsonl:2: {message}"):
        read_records(tmp_path / "r.jsonl")
    write_jsonl(tmp_path / "r.jsonl", [row, row | {"value": [1, 2.5]}])
    assert [record.value for record in read_records(tmp_path / "r.jsonl")] == [1, [1, 2.5]]
