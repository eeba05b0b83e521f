"""Cells of the tables against numbers checked by hand."""

import pytest

from shiftrm.metrics import Better, Metric, declare
from shiftrm.records import Record
from shiftrm.report import blindness, setup_tables, sight, tables, win_tables
from shiftrm.report.measurements import SeedEstimate
from shiftrm.report.results import Results

from .records import DEMO, RECIPE, change, over_optimised, recipe_records

FIXED = "Reward model kept fixed (vanilla PPO)"


def row(table: tables.Table, *start: str) -> tuple[str, ...]:
    """The one row that begins like this."""
    found = [cells for cells in table.rows if cells[: len(start)] == start]
    assert len(found) == 1
    return found[0]


def demo(records: list[Record]) -> Results:
    return Results(records, DEMO)


def recipe(records: list[Record]) -> Results:
    return Results(records, RECIPE)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.005, "1.00"), (-0.001, "0.00"), (-1.5, "-1.50"), (2e7, "2.00e+07")],
)
def test_fixed_point(value, text):
    assert tables.fixed_point(value) == text


def test_numbers_with_and_without_interval():
    assert tables.number(SeedEstimate(4.314, None, 1)) == "4.31"
    assert tables.number(SeedEstimate(4.314, 0.216, 3)) == "4.31 ± 0.22"
    assert tables.number(None) == "not measured"


# -- wins ----------------------------------------------------------------------------------------


def test_win_table_by_hand(one_seed, three_seeds):
    # Round 3 of `fixed`: gold 4.32, win 0.3 + 0.12 * 2.02 = 0.5424, tie 0.1, lose 0.3576.
    table = win_tables.win_table(demo(one_seed))
    assert table.columns == ("Arm", "Round 1", "Round 2", "Round 3")
    assert row(table, FIXED)[3] == "54 / 10 / 36"
    # DPO: gold 3.6, win 0.3 + 0.12 * 1.3 = 0.456.
    assert row(table, "DPO")[1:] == ("46 / 10 / 44", "—", "—")
    assert "by gold reward" in table.note
    # Mean gold of `fixed` 4.46667: win 0.56; over seeds the mean of a linear function. The
    # interval is 0.12 times that of gold (0.3729).
    assert row(win_tables.win_table(demo(three_seeds)), FIXED)[3] == "56 / 10 / 34 [52, 60]"


def test_win_tables_of_a_judge_by_hand():
    m = recipe(recipe_records())
    assert row(win_tables.win_table(m), "MetaRM")[1:] == (
        "44 / 44 / 12 [35, 53]", "62 / 30 / 8 [53, 71]", "69 / 26 / 5 [60, 78]",
        "60 / 31 / 9 [51, 69]",
    )  # fmt: skip
    best = win_tables.best_round_table(m)
    assert best.columns == ("Arm", "Best round", "vs SFT", "vs Kept fixed", "vs MetaRM", "vs DPO")
    assert row(best, "MetaRM") == (
        "MetaRM", "3", "60 / 25 / 15 [51, 69]", "54 / 31 / 15 [45, 63]", "—",
        "49 / 36 / 15 [40, 58]",
    )  # fmt: skip
    # Wins and half the ties of round 3: 0.69 + 0.13.
    judging = row(win_tables.judging_table(m), "MetaRM", "3")
    assert judging[2:6] == ("100", "0.82", "0.69", "410")


def test_missing_bounds_and_shares():
    records = [r for r in recipe_records() if "low_" not in r.metric]
    assert row(win_tables.win_table(recipe(records)), "MetaRM")[3] == "69 / 26 / 5"
    records = change(records, None, method="metarm", round=2, metric="tie_vs_sft")
    assert row(win_tables.win_table(recipe(records)), "MetaRM")[2] == "not measured"


def test_best_rounds_may_differ_between_seeds():
    records = [
        Record("compare", "retrained", round_, f"{outcome}_vs_fixed", share, seed=seed)
        for seed, round_, shares in ((0, 2, (0.5, 0.1, 0.4)), (1, 3, (0.7, 0.1, 0.2)))
        for outcome, share in zip(("win", "tie", "lose"), shares, strict=True)
    ]
    fixed = Record("evaluate", "fixed", 1, "kl", 1.0)
    table = win_tables.best_round_table(demo([*records, fixed]))
    # 0.5 and 0.7: the t-interval (12.7 * 0.1) covers everything.
    name = "Retrained on the same pairs"
    assert table.rows == ((name, "2, 3", "not measured", "60 / 10 / 30 [0, 100]", "—"),)
    assert "one half" in table.note or "first half" in table.note


# -- numbers -------------------------------------------------------------------------------------


def test_metrics_table_by_hand(one_seed):
    table = tables.metrics_table(demo(one_seed))
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
    table = tables.metrics_table(demo(three_seeds))
    assert row(table, FIXED, "3")[2] == "4.47 ± 0.37"


def test_columns_of_gold_need_gold():
    assert "Gold" not in tables.metrics_table(recipe(recipe_records())).columns
    assert "Gold" in tables.metrics_table(recipe(recipe_records(gold=True))).columns
    assert tables.kl_table(recipe(recipe_records())).rows == ()


def test_kl_stands_beside_gold(one_seed):
    table = tables.kl_table(demo(one_seed))
    assert table.columns[-2:] == ("Gold, round 3", "KL, round 3")
    assert row(table, "MetaRM, scale-free step")[-2:] == ("4.77", "6.00")
    assert row(table, "DPO")[1:3] == ("3.60", "9.00")


def test_tables_of_sight(one_seed):
    kept, spread, adapted = blindness.blindness_tables(demo(one_seed))
    assert kept.rows[0] == ("1", "0.720", "0.660", "1.00", "0.50")
    assert kept.rows[2] == ("3", "0.600", "0.540", "0.25", "0.12")
    assert row(spread, FIXED)[1:] == ("1.00 → 0.50", "0.50 → 0.25", "0.25 → 0.12")
    assert row(adapted, "MetaRM, scale-free step", "2")[2:4] == ("sharper", "0.660 → 0.700")
    [spread, adapted] = blindness.blindness_tables(recipe(recipe_records()))  # without gold
    assert row(spread, FIXED)[1:3] == ("1.00 → 0.55", "0.55 → 0.30")
    assert row(adapted, "MetaRM", "1")[2:4] == ("not measured", "not measured")


def test_a_metric_from_outside_is_shown_after_the_last_round():
    polite = declare(Metric("polite_share_here", "Polite responses", "share", 3, Better.HIGHER))
    said = {1: 0.1, 2: 0.25}
    own = [Record("evaluate", "metarm", r, polite.id, value) for r, value in said.items()]
    records = [*own, Record("evaluate", "dpo", 1, "kl", 1.0)]
    m = recipe(records)
    tables.metrics_table(m)
    assert tables.other_table(m).rows == (("Polite responses (share)", "0.250", "—"),)
    assert tables.other_table(m).columns[1:] == ("MetaRM, round 2", "DPO, round 1")


def test_diversity_by_hand():
    table = tables.diversity_table(recipe(recipe_records()))
    assert row(table, "MetaRM", "2")[2:5] == ("0.640", "0.300", "0.340")


@pytest.mark.parametrize(
    ("seeds", "peak", "best"),
    [
        ((over_optimised(),), "3.00", "2.50"),
        # t(1) = 12.706 times 0.1414 / sqrt(2)
        ((over_optimised(), over_optimised(1, shift=0.2)), "3.10 ± 1.27", "2.60 ± 1.27"),
    ],
)
def test_over_optimisation_by_hand(seeds, peak, best):
    m = recipe([record for records in seeds for record in records])
    table = tables.over_optimisation_table(m)
    assert table.columns[-2:] == ("Gold at KL 3", "Gold at KL 10"), "by number, not by letter"
    [found] = table.rows
    assert found[1:] == ("1", peak, *(cell for cell in found[3:]))
    if len(seeds) == 1:
        assert found[3:] == ("2.00", "1.00", "9.00", "2.00", "2.50", "0.50")
    table = tables.best_of_n_table(m)
    assert [cells[0] for cells in table.rows] == ["1", "4"]
    assert table.rows[1][3] == best
    assert "falls 0.25" in table.note


# -- what went in --------------------------------------------------------------------------------


def test_arms_and_data():
    m = recipe(recipe_records())
    assert row(setup_tables.arms_table(m), "DPO")[1:] == ("none", "DPO", "1")
    assert row(setup_tables.data_table(m), "pairs (training the reward model)")[1:] == (
        "equal responses 31, empty response 4", "43,000", "35",
    )  # fmt: skip


def test_configuration_is_flattened():
    config = {"a": {"b": 1, "c": {}}, "d": [1, 2], "e": "x", "f": None, "g": "http://me:key@host"}
    assert setup_tables.config_table(config).rows == (
        ("a.b", "1"), ("a.c", "{}"), ("d", "[1, 2]"), ("e", "x"), ("f", "null"),
        ("g", "http://…@host"),
    )  # fmt: skip


def test_versions_name_the_seeds(three_seeds):
    other = Record("ppo", "fixed", 1, "kl", 1.0, seed=9, commit="beef", versions="shiftrm 0.2")
    assert setup_tables.versions_table(demo([*three_seeds, other])).rows == (
        ("0123456789ab", "shiftrm 0.1.0, torch 2.13.0", "0, 1, 2"),
        ("beef", "shiftrm 0.2", "9"),
    )


def test_every_row_is_as_wide_as_its_header(one_seed, three_seeds):
    makers = (
        win_tables.win_table, win_tables.best_round_table, win_tables.judging_table,
        tables.metrics_table, tables.kl_table, tables.other_table, tables.over_optimisation_table,
        tables.best_of_n_table, setup_tables.versions_table, setup_tables.world_table,
        setup_tables.arms_table, setup_tables.data_table, tables.diversity_table, sight.sight_table,
    )  # fmt: skip
    partial = [r for i, r in enumerate(one_seed) if i % 3]
    for records in ([], one_seed, three_seeds, partial):
        m = demo(records)
        for table in [*(make(m) for make in makers), *blindness.blindness_tables(m)]:
            assert all(len(cells) == len(table.columns) for cells in table.rows), table.title
