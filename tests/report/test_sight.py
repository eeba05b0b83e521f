"""Sight tests on the pages: of a run, round by round, and of a diagnosis."""

from dataclasses import replace

import pytest

from shiftrm.core.intervals import Measured
from shiftrm.data.negatives import NEGATIVES
from shiftrm.measure.diagnosis.comparison import adaptation_verdict
from shiftrm.measure.sight import SightTest
from shiftrm.records import Record
from shiftrm.report import render_page
from shiftrm.report.adaptation import card_tables
from shiftrm.report.diagnosis import numbers
from shiftrm.report.diagnosis import render_page as diagnosis_page
from shiftrm.report.diagnosis_sight import sight_tables
from shiftrm.report.results import Results
from shiftrm.report.sight import sight_sentences, sight_table
from tests.report.records import DEMO
from tests.report.test_diagnosis import findings, group_file, pair_file
from tests.report.test_page import EVIL, assert_harmless, read, text_of

# -- of a run ----------------------------------------------------------------------------------


def record(method, round_, metric, value, seed=0):
    return Record("evaluate", method, round_, metric, value, seed=seed)


def recorded(*, gold=True):
    yield record("sft", 0, "sight_cut_after", 0.9)
    for seed in (0, 1):
        for round_ in (1, 2):
            yield record("fixed", round_, "sight_other_prompt_before", 0.6 + seed / 10, seed)
            yield record("fixed", round_, "sight_other_prompt_after", 0.4 + seed / 10, seed)
            yield record("fixed", round_, "sight_cut_before", 0.8, seed)
            yield record("fixed", round_, "sight_cut_after", 0.8, seed)
            yield record("fixed", round_, "gold_mean", 3.0, seed)
            if gold:
                yield record("fixed", round_, "gold_sight_other_prompt", 0.9 + round_ / 100, seed)
                yield record("fixed", round_, "rank_policy_before", 0.5, seed)
                yield record("fixed", round_, "rank_policy_after", 0.125, seed)


def test_the_table_of_a_run():
    table = sight_table(Results(recorded(), DEMO))
    other, cut = "A response to another prompt", "The response cut off in the middle"
    assert table.columns == ("Arm", "Round", other, cut, "Rank correlation with gold")
    rows = {row[:2]: row[2:] for row in table.rows}
    [name] = {arm for arm, _ in rows if arm not in ("SFT", "Gold")}
    assert rows[name, "1"] == rows[name, "2"] == ("0.65 → 0.45", "0.80 → 0.80", "0.50 → 0.12")
    assert rows["Gold", "all"] == ("0.91 to 0.92", "not measured", "—")
    [(_, sft)] = [(key, cells) for key, cells in rows.items() if key[1] == "0"]
    assert sft == ("not measured", "0.90", "not measured"), "SFT has no policy training"


def test_shares_have_intervals_over_the_prompts_of_a_seed_or_over_seeds():
    def cells(records):
        return [row[2:] for row in sight_table(Results(records, DEMO)).rows]

    alone = [
        record("fixed", 1, f"{name}sight_cut_{when}", value)
        for when, value, half in (("before", 0.5, 0.07), ("after", 0.75, 0.04))
        for name, value in (("", value), ("half_width_", half))
    ]
    assert cells(alone) == [("0.50 ± 0.07 → 0.75 ± 0.04",)]
    # Over three seeds: a standard error of .1 / sqrt 3, and the t quantile 4.303.
    seeds = [record("fixed", 1, "sight_cut_after", 0.6 + 0.1 * s, s) for s in range(3)]
    seeds += [record("fixed", 1, "half_width_sight_cut_after", 0.04, s) for s in range(3)]
    assert cells(seeds) == [("0.70 ± 0.25",)]


def test_the_sentences_name_what_each_arm_looks_at_least():
    *_, last = sight_sentences(Results(recorded(), DEMO))
    assert last.startswith("Lowest after the last round:")
    assert last.endswith("0.45 against a response to another prompt.")
    high = [record("fixed", 1, "sight_cut_after", 0.8)]
    assert len(sight_sentences(Results(high, DEMO))) == 1


def test_the_page_of_a_run(one_seed):
    html = render_page([*one_seed, *recorded()], config=DEMO)
    assert_harmless(html)
    text = text_of(html)
    assert "<h2>Sight tests</h2>" in html
    assert "It needs no labels" in text
    assert "0.65 → 0.45" in text
    assert "rank_policy" not in text, "the table has asked for it, so it is not among the others"
    assert "<h2>Sight tests</h2>" not in render_page(one_seed, config=DEMO)


def test_a_kind_that_is_not_registered_here_keeps_its_name():
    records = [record("fixed", 1, "sight_<b>_after", 0.5)]
    assert sight_table(Results(records, DEMO)).columns[-1] == "<b>"
    html = render_page(records, config=DEMO)
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


# -- of a diagnosis ------------------------------------------------------------------------------


def made(kind, share, *, prompts=50, reason=""):
    negative = NEGATIVES.get(kind)
    pairs = 0 if share is None else 500
    return SightTest(kind, negative.label, share, pairs, prompts, 0, negative.low, reason)


def shares(other=0.53, **more):
    share = Measured(other, other - 0.04, other + 0.04)
    none = made("language", None, reason="language: needs prompts of a known language")
    return (made("other_prompt", share, **more), made("cut", Measured(0.9, 0.85, 0.95)), none)


def with_tests(tests, **more):
    file, rows = group_file(**more)
    return replace(file, sight=tests), rows


def test_one_model_has_a_column_for_each_file_of_groups():
    found = findings(with_tests(shares()), with_tests(shares(0.9), name="ppo"), pair_file())
    [table] = sight_tables(found.diagnoses)
    assert table.columns == ("", "What a low number means", "sft", "ppo")
    first, second, third = table.rows
    assert first[0] == "to a response to another prompt"
    assert first[1] == NEGATIVES.get("other_prompt").low
    assert first[2:] == ("0.53 [0.49, 0.57] of 500", "0.90 [0.86, 0.94] of 500")
    assert second[2:] == ("0.90 [0.85, 0.95] of 500",) * 2
    assert third[2:] == ("—", "—")
    assert "does not apply (language: needs prompts of a known language)" in table.note
    assert sight_tables(findings(group_file(), pair_file()).diagnoses) == []


def test_several_models_have_a_table_for_each_file():
    found = findings(
        with_tests(shares(), model="a"), pair_file(model="a"),
        with_tests(shares(0.9), model="b"), pair_file(model="b"),
    )  # fmt: skip
    [table] = sight_tables(found.diagnoses)
    assert table.title.endswith("· sft")
    assert table.columns[2:] == ("a", "b")


@pytest.mark.parametrize(
    ("other", "more", "low"),
    [(0.53, {}, True), (0.65, {}, True), (0.67, {}, False), (0.53, {"prompts": 29}, False)],
)
def test_a_low_test_warns_with_its_meaning_and_names_the_remedy(other, more, low):
    """Low: the whole interval, +-0.04, lies below 0.7, on 30 prompts or more."""
    [verdict] = findings(with_tests(shares(other, **more))).verdicts
    warned = [text for text in verdict.warnings if text.startswith("Sight test:")]
    assert len(warned) == low
    wanted = "--method contrast_all --model DIR --pairs PAIRS --groups FILE --output NEW contrast_s"
    assert any(wanted in text for text in verdict.advice) == low
    if low:
        assert f"{other:.2f} [" in warned[0]
        assert warned[0].endswith(NEGATIVES.get("other_prompt").low)


def test_the_page_and_numbers_of_a_diagnosis(undrawn):
    found = findings(with_tests(shares()))
    html = diagnosis_page(found)
    text = text_of(html)
    assert "<h2>Sight tests</h2>" in html
    assert "0.53 [0.49, 0.57] of 500" in text
    assert "hardly looks at the prompt" in text
    first = numbers(found)["files"][0]["sight"][0]
    assert first["kind"] == "other_prompt"
    assert first["share"] == pytest.approx({"value": 0.53, "low": 0.49, "high": 0.57})
    assert "<h2>Sight tests</h2>" not in diagnosis_page(findings(group_file()))


def test_foreign_text_is_escaped(undrawn):
    """A plug-in's label, the name of a file, and a reason that quotes data."""
    odd = SightTest("odd", EVIL, None, 0, 0, 0, EVIL, EVIL)
    html = diagnosis_page(findings(with_tests((odd,), name=EVIL)))
    assert_harmless(html)
    assert "<script" not in html
    assert " ".join(read(html).text).count("<script>alert('x')</script>") > 3


def test_an_adaptation_says_both_numbers_and_the_card_has_the_table():
    found = findings(with_tests(shares(), model="before"), with_tests(shares(0.9), model="after"))
    change = adaptation_verdict(found.comparisons, found.diagnoses)
    said = (
        "Sight tests on sft (share preferred to): a response to another prompt 0.53 [0.49, 0.57] "
        "before, 0.90 [0.86, 0.94] after; the response cut off in the middle"
    )
    assert said in change.sentence
    card = card_tables(replace(found, change=change))
    assert "| to a response to another prompt |" in card
    assert "| 0.53 [0.49, 0.57] of 500 | 0.90 [0.86, 0.94] of 500 |" in card


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("shiftrm.report.plots.render", lambda figure: b"<svg/>")


def test_a_low_share_against_cut_responses_is_no_warning():
    """In the gold world such reward models were the more accurate ones (docs/methods.md)."""
    low = Measured(0.3, 0.26, 0.34)
    for kind in ("cut", "shuffled"):
        [verdict] = findings(with_tests((made(kind, low),))).verdicts
        assert not any("Sight test" in text for text in verdict.warnings)
    [verdict] = findings(with_tests((made("repeated", low),))).verdicts
    assert any("Sight test" in text for text in verdict.warnings)
