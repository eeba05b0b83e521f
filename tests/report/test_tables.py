"""Cells of the tables against numbers checked by hand."""

import pytest

from shiftrm.records import Record
from shiftrm.report import tables
from shiftrm.report.measurements import Estimate, Measurements

from .conftest import change


def row(table: tables.Table, *start: str) -> tuple[str, ...]:
    """The one row that begins like this."""
    found = [cells for cells in table.rows if cells[: len(start)] == start]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.005, "1.00"), (-0.001, "0.00"), (-1.5, "-1.50"), (2e7, "2.00e+07")],
)
def test_fixed_point(value, text):
    assert tables.fixed_point(value) == text


def test_numbers_with_and_without_interval():
    assert tables.number(Estimate(4.314, None, 1)) == "4.31"
    assert tables.number(Estimate(4.314, 0.216, 3)) == "4.31 ± 0.22"
    assert tables.number(None) == "not measured"


def test_win_table_by_hand(one_seed):
    # Round 3 of `fixed`: gold 4.32, win 0.3 + 0.12 * 2.02 = 0.5424, tie 0.1, lose 0.3576.
    table = tables.win_table(Measurements(one_seed))
    assert table.columns == ("Arm", "Round 1", "Round 2", "Round 3")
    assert row(table, "Reward model kept fixed (vanilla PPO)")[3] == "54 / 10 / 36"
    # DPO: gold 3.6, win 0.3 + 0.12 * 1.3 = 0.456.
    assert row(table, "DPO (has no rounds)")[1:] == ("46 / 10 / 44", "", "")


def test_win_table_is_the_mean_over_seeds(three_seeds):
    # Mean gold of `fixed` 4.46667: win 0.56; over seeds the mean of a linear function.
    table = tables.win_table(Measurements(three_seeds))
    assert row(table, "Reward model kept fixed (vanilla PPO)")[3] == "56 / 10 / 34"


def test_a_missing_share_reads_not_measured(one_seed):
    records = change(one_seed, None, method="fixed", round=2, metric="tie_vs_sft")
    table = tables.win_table(Measurements(records))
    assert row(table, "Reward model kept fixed (vanilla PPO)")[2] == "not measured"


def test_best_round_table(one_seed):
    table = tables.best_round_table(Measurements(one_seed))
    assert table.columns == ("Arm", "Best round", "vs SFT", "vs vanilla PPO", "vs DPO")
    assert row(table, "MetaRM, scale-free step")[1:] == (
        "3", "61 / 16 / 23", "44 / 16 / 40", "52 / 16 / 32",
    )  # fmt: skip
    assert row(table, "Reward model kept fixed (vanilla PPO)")[3] == "—"
    assert "one half of the evaluation prompts" in table.note


def test_best_rounds_may_differ_between_seeds():
    records = [
        Record("compare", "retrained", round_, f"{outcome}_vs_fixed", share, seed=seed)
        for seed, round_, shares in ((0, 2, (0.5, 0.1, 0.4)), (1, 3, (0.7, 0.1, 0.2)))
        for outcome, share in zip(("win", "tie", "lose"), shares, strict=True)
    ]
    table = tables.best_round_table(Measurements(records))
    assert table.rows == (
        ("Retrained on the same pairs", "2, 3", "not measured", "60 / 10 / 30", "not measured"),
    )


def test_metrics_table_by_hand(one_seed):
    table = tables.metrics_table(Measurements(one_seed))
    scale_free = dict(zip(table.columns, row(table, "MetaRM, scale-free step", "3"), strict=True))
    assert scale_free == {
        "Arm": "MetaRM, scale-free step",
        "Round": "3",
        "Gold": "4.77",
        "KL to SFT": "6.00",
        "Proxy (standardised)": "1.20",
        "Accuracy, held-out pairs": "0.740",
        "Accuracy, policy's pairs, before": "0.640",  # 0.72 - 2 * 0.06 + 0.04
        "Accuracy, policy's pairs, after": "0.540",  # 0.66 - 2 * 0.06
        "Relative variance, before": "1.80",
        "Relative variance, after": "0.90",
        "Influence of the meta step": "0.3100",
        "Length (words)": "11.9",
        "Share cut off by the limit": "0.010",
    }
    assert row(table, "MetaRM, as in the paper", "1")[10] == "2.0e-05"
    assert row(table, "Retrained on the same pairs", "1")[10] == "—"
    assert row(table, "SFT", "0")[2:4] == ("2.30", "0.00")
    assert row(table, "SFT", "0")[6:8] == ("—", "0.720")


def test_metrics_with_intervals(three_seeds):
    # 4.32, 4.46, 4.62: mean 4.46667, sd 0.150111, half width 4.3027 * 0.150111 / sqrt(3) = 0.3729.
    table = tables.metrics_table(Measurements(three_seeds))
    assert row(table, "Reward model kept fixed (vanilla PPO)", "3")[2] == "4.47 ± 0.37"


def test_kl_stands_beside_gold(one_seed):
    table = tables.kl_table(Measurements(one_seed))
    assert table.columns[-2:] == ("Gold, round 3", "KL, round 3")
    assert row(table, "MetaRM, scale-free step")[-2:] == ("4.77", "6.00")
    assert row(table, "DPO")[1:3] == ("3.60", "9.00")


def test_blindness_table(one_seed):
    table = tables.blindness_table(Measurements(one_seed))
    assert table.rows[0] == ("1", "0.720", "0.660", "1.00", "0.50")
    assert table.rows[2] == ("3", "0.600", "0.540", "0.25", "0.12")


def test_configuration_is_flattened():
    table = tables.config_table({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": "x", "f": None})
    assert table.rows == (("a.b", "1"), ("a.c", "{}"), ("d", "[1, 2]"), ("e", "x"), ("f", "null"))


def test_versions_name_the_seeds(three_seeds):
    other = Record("ppo", "fixed", 1, "kl", 1.0, seed=9, commit="beef", versions="shiftrm 0.2")
    table = tables.versions_table(Measurements([*three_seeds, other]))
    assert table.rows == (
        ("0123456789ab", "shiftrm 0.1.0, torch 2.13.0", "0, 1, 2"),
        ("beef", "shiftrm 0.2", "9"),
    )


def test_every_row_is_as_wide_as_its_header(one_seed, three_seeds):
    makers = (
        tables.win_table, tables.best_round_table, tables.metrics_table, tables.kl_table,
        tables.blindness_table, tables.adaptation_table, tables.versions_table, tables.world_table,
    )  # fmt: skip
    partial = [r for i, r in enumerate(one_seed) if i % 3]
    for records in ([], one_seed, three_seeds, partial):
        m = Measurements(records)
        for table in (*(make(m) for make in makers), tables.paper_table()):
            assert all(len(cells) == len(table.columns) for cells in table.rows), table.title
