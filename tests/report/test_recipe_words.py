"""Sentences and cells of a recipe's page against numbers checked by hand."""

from pathlib import Path

import numpy as np
import pytest

from shiftrm.core.intervals import sign_test
from shiftrm.measure.judges.comparing import Verdict
from shiftrm.pipeline import judging
from shiftrm.records import Record, Recorder
from shiftrm.report.measurements import Measurements
from shiftrm.report.recipe_arms import Arms, arms_of
from shiftrm.report.recipe_summary import summary
from shiftrm.report.recipe_tables import (
    arms_table,
    best_round_table,
    blindness_table,
    data_table,
    diversity_table,
    judging_table,
    metrics_table,
    win_table,
)
from shiftrm.report.recipe_words import blindness, contest, headline, kl_sentence

from .conftest import change
from .recipe_records import CONFIG, records_of
from .test_tables import row


def view(records: list[Record], config: dict | None = CONFIG) -> tuple[Measurements, Arms]:
    m = Measurements(records)
    return m, arms_of(m, records, config)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 3), (20, 9), (9, 20), (640, 560)]
)
def test_sign_test_against_coins_thrown_one_by_one(wins, losses):
    chances = np.ones(1)
    for _ in range(wins + losses):
        chances = np.convolve(chances, [0.5, 0.5])
    as_uneven = chances <= chances[wins] * (1 + 1e-9)
    assert sign_test(wins, losses) == pytest.approx(chances[as_uneven].sum())


def test_kinds_by_the_recipe_and_by_the_records():
    records = records_of()
    kinds = {"sft": "sft", "fixed": "fixed", "metarm": "metarm", "dpo": "dpo"}
    assert view(records)[1].kinds == kinds
    assert list(view(records)[1].kinds) == list(kinds)  # the recipe's order
    renamed = {"fixed": "a", "metarm": "b", "dpo": "c"}
    odd = [Record(**{**r.__dict__, "method": renamed.get(r.method, r.method)}) for r in records]
    arms = view(odd, None)[1]
    assert arms.kinds == {"sft": "sft", "a": "fixed", "b": "metarm", "c": "dpo"}
    assert [arms.name(name) for name in arms.kinds] == [
        "SFT", "a (vanilla)", "b (MetaRM)", "c (DPO)",
    ]  # fmt: skip
    assert len({style.colour for style in arms.styles.values()}) == 4
    plain = [r for r in records if not r.metric.startswith("meta_") or r.method != "metarm"]
    plain = [Record(**{**r.__dict__, "method": "b"}) for r in plain if r.method == "metarm"]
    assert view(plain, None)[1].kinds == {"b": "retrained"}


def test_win_tables_by_hand():
    m, arms = view(records_of())
    assert row(win_table(m, arms), "MetaRM")[1:] == (
        "44 / 44 / 12 [35, 53]", "62 / 30 / 8 [53, 71]", "69 / 26 / 5 [60, 78]",
        "60 / 31 / 9 [51, 69]",
    )  # fmt: skip
    assert row(win_table(m, arms), "DPO")[2:] == ("—", "—", "—")
    best = best_round_table(m, arms)
    assert best.columns == (
        "Arm", "Best round", "vs SFT", "vs fixed (vanilla PPO)", "vs MetaRM", "vs DPO",
    )  # fmt: skip
    assert row(best, "MetaRM") == (
        "MetaRM", "3", "60 / 25 / 15 [51, 69]", "54 / 31 / 15 [45, 63]", "—",
        "49 / 36 / 15 [40, 58]",
    )  # fmt: skip
    # Wins and half the ties of round 3: 0.69 + 0.13.
    assert row(judging_table(m, arms), "MetaRM", "3")[2:6] == ("100", "0.82", "0.69", "410")


def test_without_bounds_there_are_no_brackets():
    records = [r for r in records_of() if "low_" not in r.metric]
    assert row(win_table(*view(records)), "MetaRM")[3] == "69 / 26 / 5"
    records = change(records, None, method="metarm", round=2, metric="tie_vs_sft")
    assert row(win_table(*view(records)), "MetaRM")[2] == "not measured"


def test_other_tables_by_hand():
    m, arms = view(records_of())
    assert row(arms_table(m, arms), "DPO")[1:] == ("none", "DPO", "1")
    assert row(blindness_table(m, arms), "fixed (vanilla PPO)")[1:3] == (
        "1.00 → 0.55",
        "0.55 → 0.30",
    )
    assert row(diversity_table(m, arms), "MetaRM", "2")[2:5] == ("0.640", "0.300", "0.340")
    assert row(metrics_table(m, arms), "MetaRM", "1")[7] == "2.0e-05"
    assert "Gold" not in metrics_table(m, arms).columns
    assert "Gold" in metrics_table(*view(records_of(gold=True))).columns
    metrics = ["pairs", "pairs_dropped_equal_responses", "pairs_dropped_empty_response"]
    assert row(data_table(m, metrics), "pairs (training the reward model)")[1:] == (
        "equal responses 31, empty response 4", "43,000", "35",
    )  # fmt: skip


def test_few_prompts_are_never_clear():
    """Two wins of two: a normal interval would have no width at all."""
    records = [
        Record("evaluate", "metarm", 1, f"{outcome}_vs_sft", share, n=2, seed=seed)
        for outcome, share in (("win", 1.0), ("tie", 0.0), ("lose", 0.0))
        for seed in (0, 1)
    ]
    for chosen in ([r for r in records if r.seed == 0], records):
        found = contest(Measurements(chosen), "evaluate", "metarm", [1])
        assert found is not None
        assert not found.clear
        assert "no clear answer for MetaRM" in headline(*view(chosen)).title


def test_headline_falls_either_way():
    m, arms = view(records_of())
    head = headline(m, arms, CONFIG)
    # Of 50 prompts 30 wins and 8 (15 %) losses: p = 0.0005.
    assert head.title == (
        "In one run (one seed), against SFT (win / tie / lose): clearly more wins than losses "
        "for fixed (vanilla PPO) (60 / 25 / 15 %); MetaRM (60 / 25 / 15 %) and DPO "
        "(60 / 25 / 15 %)."
    )
    assert any("its best round (round 3)" in s and "60 / 31 / 9 %" in s for s in head.sentences)
    lost = change(records_of(), 0.1, stage="compare", method="metarm", metric="win_vs_sft")
    lost = change(lost, 0.6, stage="compare", method="metarm", metric="lose_vs_sft")
    assert "clearly fewer for MetaRM (10 / 25 / 60 %)" in headline(*view(lost)).title
    assert (
        "more wins than losses for no arm"
        in headline(*view([r for r in lost if r.method == "metarm"])).title
    )


def test_blindness_and_kl():
    m, arms = view(records_of())
    text = " ".join(blindness(m, arms))
    assert "went from 1.00 to 0.09 (9 % of what it was)" in text
    assert "whether it ranks worse was not measured" in text
    assert "Under MetaRM that relative variance is 0.90 after round 4." in text
    assert "not matched" in kl_sentence(m, arms)  # DPO at 8, the others at 12
    assert "Hardly any policy moved" in kl_sentence(*view(change(records_of(), 0.01, metric="kl")))
    seen = change(records_of(), 1.0, method="fixed", metric="relative_difference_variance_after")
    assert "did not draw together" in " ".join(blindness(*view(seen)))
    by_gold = " ".join(blindness(*view(records_of(gold=True))))
    assert "So it did go blind" in by_gold
    assert "as the second reward model ranks" in by_gold
    alone = [r for r in records_of() if r.method == "metarm"]
    assert "No arm keeps its reward model" in " ".join(blindness(*view(alone)))


def test_warnings_name_what_is_wrong():
    records = change(records_of(), 40.0, metric="unjudged_vs_sft", method="dpo")
    records = change(records, 0.3, metric="judge_consistency_vs_sft", method="dpo")
    text = " ".join(headline(*view(records)).warnings)
    assert "without a verdict of the judge, which do not count: DPO, round 1 (40 of 100)" in text
    assert "contradicts itself when the order changes (share that agrees): DPO, round 1" in text
    assert "MetaRM, rounds 3 and 4 (0.14)" in text  # cut off
    assert "MetaRM (1.60 times SFT's)" in text  # 96 words over 60
    assert "too small to matter" in text  # the meta step


def test_summary_says_what_was_measured():
    text = summary(records_of())
    assert text.splitlines()[0].split()[:3] == ["arm", "round", "win/tie/lose"]
    assert "69/26/5" in text
    # Two rates of one round, 69 and 60, and why.
    assert "over all judged prompts of the round. The sentences below count the second half" in text
    assert "(the second half, on which no round was chosen; by round, all are counted)" in text
    assert "43,000 pairs (35 left out)" in text
    assert "one seed proves little" in text
    without = summary(records_of(judged=False))
    assert "win/tie/lose" not in without
    assert "No judge was there" in without
    assert summary([])


class HalfReadable:
    """A judge of whose verdicts on short answers nothing can be read."""

    name = "half readable"

    def judge(self, comparisons, *, progress=None):
        return [Verdict(c, "win" if len(str(c.ours)) > 8 else None) for c in comparisons]


def test_what_the_loop_records_of_a_judge_is_what_the_page_reads(monkeypatch):
    """Two verdicts in five cannot be read: counted under the name that the page asks for."""
    ours = [{"prompt": f"p{i}", "response": "good" * (i + 1)} for i in range(5)]
    theirs = [{"prompt": f"p{i}", "response": "bad"} for i in range(5)]
    monkeypatch.setattr(judging, "open_recipes_judge", lambda *_, **__: HalfReadable())
    rows, numbers = judging.judge_rows(ours, theirs, {"kind": "own"}, cache=Path("unused"), seed=0)
    assert [row["outcome"] for row in rows].count(None) == 2
    recorder = Recorder(stage="evaluate", method="metarm", round=1, seed=0)
    for name, (value, n) in numbers.items():
        recorder.add(f"{name}_vs_sft", value, n=n)
    recorder.add("length_mean", 3.0)
    text = " ".join(headline(*view(recorder.records)).warnings)
    assert "MetaRM, round 1 (2 of 5)" in text


def test_a_judge_that_says_nothing_readable_is_not_no_judge():
    records = [r for r in records_of(judged=False) if r.stage != "compare"]
    asked = Record("evaluate", "metarm", 1, "unjudged_vs_sft", 100.0, n=100)
    m, arms = view([*records, asked])
    assert headline(m, arms).title.startswith("Not one verdict of the judge could be read")
    assert row(judging_table(m, arms), "MetaRM", "1")[2] == "not measured"
