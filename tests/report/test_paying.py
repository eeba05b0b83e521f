"""The page's block on what reward models pay for, from records that are made up."""

import pytest

from shiftrm.records import Recorder
from shiftrm.report.page import render_page
from shiftrm.report.paying import (
    features,
    overpaid,
    paying_figure,
    paying_pictures,
    paying_sentences,
    paying_tables,
)
from shiftrm.report.plots import render
from shiftrm.report.results import Results
from tests.report.records import DEMO
from tests.report.test_page import assert_harmless, headings, text_of

OVER = {"off_topic": 0.3, "topical": -0.2, "hedges": 0.15, "length": 0.01}


def records(*, seeds=(0,), gold=True, arms=("fixed", "retrained"), rounds=(1, 2)):
    found = []
    for seed in seeds:
        for arm, round_ in [("sft", 0), *((a, r) for a in arms for r in rounds)]:
            recorder = Recorder(stage="evaluate", method=arm, round=round_, seed=seed)
            recorder.add("kl", 0.1 * round_)
            recorder.add("pays_explained", 0.4, n=800)
            for feature, value in OVER.items():
                value = round_ * value + 0.02 * seed
                recorder.add(f"pays_{feature}", 0.05, n=800)
                if gold:
                    recorder.add(f"overpays_{feature}", value, n=800)
                    wide = 1.0 if feature == "hedges" else 0.05
                    recorder.add(f"overpays_low_{feature}", value - wide, n=800)
                    recorder.add(f"overpays_high_{feature}", value + wide, n=800)
            found += recorder.records
    return found


def test_the_block_of_one_seed():
    m = Results(records(), DEMO)
    kept, plain = paying_sentences(m)
    assert kept.startswith(m.name("fixed"))
    assert plain.endswith(
        "round 2: pays too much for off topic (+0.60), and too little for topical (-0.40)."
    )
    assert "hedges" not in kept, "its interval holds 0"
    assert "length" not in kept, "it is small"
    over, paid = paying_tables(m)
    assert over.columns == ("Arm", "Round", "hedges", "length", "off topic", "topical")
    assert [row[:2] for row in over.rows[:2]] == [("SFT", "0"), (m.name("fixed"), "1")]
    assert over.rows[1][4] == "+0.30 [0.25, 0.35]"
    assert "clustered by prompt" in over.note
    assert paid.columns[-1] == "Explained (R²)"
    assert paid.rows[0][2:] == ("0.05",) * 4 + ("0.40",)
    (picture,) = paying_pictures(m)
    assert picture.images[0].source


def test_intervals_are_over_the_seeds_where_there_are_several():
    m = Results(records(seeds=(0, 1, 2)), DEMO)
    found = overpaid(m, "fixed", 1, "off_topic")
    assert found.value == pytest.approx(0.32)
    # The seeds are 0.02 apart: t = 4.303 with two degrees of freedom.
    assert found.high - found.value == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert "over the seeds" in paying_tables(m)[0].note
    assert "hedges (+0.32)" in paying_sentences(m)[0]


def test_the_heat_map_holds_every_arm_round_and_feature():
    m = Results(records(), DEMO)
    figure = paying_figure(m)
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (4, 5)
    assert image.get_array()[2].tolist() == pytest.approx([0, 0.3, 0.6, 0.3, 0.6])
    assert image.norm.vmin == -image.norm.vmax == pytest.approx(-0.6)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][2] == "off topic"
    assert render(figure) == render(paying_figure(m))


def test_a_feature_that_is_missing_in_a_round():
    some = [
        record
        for record in records()
        if not (record.method == "fixed" and record.round == 2 and "topic" in record.metric)
    ]
    m = Results(some, DEMO)
    over, paid = paying_tables(m)
    fixed = {row[:2]: row for row in over.rows}[m.name("fixed"), "2"]
    assert (fixed[4], fixed[5]) == ("—", "—")
    assert paid.rows[2][4] == "—"
    assert paying_figure(m) is not None


def test_without_gold_only_the_prices_are_shown(undrawn):
    m = Results(records(gold=False), DEMO)
    assert features(m) == sorted(OVER)
    assert (paying_sentences(m), paying_pictures(m)) == ([], [])
    assert [table.title for table in paying_tables(m)] == ["Prices under the reward model"]
    html = render_page(records(gold=False), config=DEMO)
    assert "What the reward model pays for" in headings(html)


def test_on_the_page(undrawn):
    html = render_page(records(), config=DEMO)
    assert_harmless(html)
    assert "What the reward model pays for that gold does not" in headings(html)
    text = text_of(html)
    assert "pays too much for off topic (+0.60)" in text
    assert "Other measurements" not in text, "all of them have their place"


def test_no_block_where_nothing_was_recorded(one_seed, undrawn):
    assert paying_tables(Results(one_seed, DEMO)) == []
    assert "What the reward model pays for" not in render_page(one_seed, config=DEMO)
