"""The page and JSON of a diagnosis: complete, escaped, self-contained, made from any numbers."""

import json
import random
import re

import pytest

from shiftrm.core.intervals import Measured
from shiftrm.measure.diagnosis.comparison import compare
from shiftrm.measure.diagnosis.diagnosis import ScoredFile, diagnose
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredPair, ScoredResponse
from shiftrm.measure.diagnosis.verdict import overall, verdicts
from shiftrm.report.diagnosis import Findings, numbers, render_page, write_numbers, write_page
from shiftrm.report.diagnosis_examples import as_text, examples
from shiftrm.report.diagnosis_features import pays_pictures, pays_sentences, pays_tables
from shiftrm.report.diagnosis_plots import calibration_figure, difference_figure, length_figure
from shiftrm.report.diagnosis_tables import NONE, interval, numbers_tables, short
from shiftrm.report.plots import render
from tests.report.test_page import EVIL, assert_harmless, read, text_of


def group_file(*, model="m", name="sft", n=40, k=3, scale=1.0, seed=0):
    rng = random.Random(seed)
    groups, rows = [], []
    for i in range(n):
        lengths = [rng.randint(1, 9) for _ in range(k)]
        groups.append(
            ScoredGroup(i, tuple(ScoredResponse(rng.gauss(0, scale), t) for t in lengths))
        )
        rows.append({"prompt": f"prompt {i}", "responses": [f"answer {i}.{j}" for j in range(k)]})
    return ScoredFile(model, name, groups=tuple(groups)), rows


def pair_file(*, model="m", name="labelled", n=40, seed=0):
    rng = random.Random(seed)
    pairs = [
        ScoredPair(i, ScoredResponse(rng.gauss(1, 1), 2), ScoredResponse(rng.gauss(0, 1), 3))
        for i in range(n)
    ]
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]
    return ScoredFile(model, name, pairs=tuple(pairs)), rows


def findings(*made):
    files, rows = [file for file, _ in made], [behind for _, behind in made]
    diagnoses = diagnose(files)
    words = verdicts(diagnoses)
    whole = overall(list(zip(diagnoses, words, strict=True)))
    return Findings(files, rows, diagnoses, words, whole, compare(files, diagnoses))


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which is most of a page's time."""
    monkeypatch.setattr("shiftrm.report.plots.render", lambda figure: b"<svg/>")


def test_page_has_everything(tmp_path):
    found = findings(group_file(), group_file(name="policy", scale=0.2, seed=1), pair_file())
    path = write_page(found, tmp_path / "x.html")
    html = path.read_text(encoding="utf-8")
    assert_harmless(html)
    text = text_of(html)
    assert "The reward model is blind on policy; it tells responses apart on sft" in text
    for heading in ("Verdicts", "Numbers", "Pictures", "Responses to read", "How the verdict"):
        assert f"<h2>{heading}" in html
    images = [attributes for tag, attributes in read(html).tags if tag == "img"]
    # What it pays for, differences twice, calibration, one length picture a file.
    assert len(images) == 1 + 2 + 1 + 3
    assert all(len(image["alt"] or "") > 30 for image in images)
    assert "smallest spread" in text
    assert "surest mistake" in text
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]


def test_same_findings_same_page():
    found = findings(group_file(n=4), pair_file(n=4))
    assert render_page(found) == render_page(found)


def test_everything_foreign_is_escaped(tmp_path):
    evil_chat = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": [{"text": EVIL}]}]
    made = []
    for model in (EVIL, EVIL + "2"):
        file, rows = group_file(model=model, name=EVIL, n=5)
        made.append((file, [{**row, "prompt": EVIL, "responses": [EVIL] * 3} for row in rows]))
        file, rows = pair_file(model=model, name=EVIL + "pairs", n=5)
        made.append((file, [{"chosen": evil_chat, "rejected": EVIL} for _ in rows]))
    html = render_page(findings(*made))
    assert_harmless(html)
    assert "<script" not in html
    assert " ".join(read(html).text).count("<script>alert('x')</script>") > 20, "shown, as text"


def test_broken_text_is_written(tmp_path, undrawn):
    """A lone surrogate has no UTF-8 form; it must not lose the page or the numbers."""
    file, rows = group_file(n=2, name="a\ud800")
    found = findings((file, [{**row, "prompt": "b\ud800"} for row in rows]))
    assert "b\ufffd" in write_page(found, tmp_path / "x.html").read_text(encoding="utf-8")
    assert json.loads(write_numbers(found, tmp_path / "x.json").read_text())


@pytest.mark.parametrize(
    "made",
    [
        [pair_file(n=1)],
        [group_file(n=1, k=2)],
        [group_file(scale=0.0)],
        [group_file(scale=0.0, name="flat"), group_file()],
        [group_file(scale=1e6)],
        [group_file(model="a"), group_file(model="b")],
        [group_file(model="a"), pair_file(model="b")],
        [pair_file(model=str(i)) for i in range(9)],
    ],
)
def test_any_numbers_make_a_page(made, undrawn, tmp_path):
    found = findings(*made)
    assert_harmless(render_page(found))
    write_numbers(found, tmp_path / "x.json")  # NaN and infinities would be refused


def test_responses_that_are_all_the_same_make_a_page():
    same = tuple(ScoredResponse(1.0, 2, True, "k") for _ in range(3))
    file = ScoredFile("m", "collapsed", groups=(ScoredGroup(0, same), ScoredGroup(1, same)))
    rows = [{"prompt": "p", "responses": ["a"] * 3}] * 2
    text = text_of(render_page(findings((file, rows))))
    assert "There are no two different responses to one prompt" in text
    assert "Reward differences: not measured" in text


def test_numbers_hold_every_field():
    found = numbers(findings(group_file(), pair_file()))
    groups, pairs = found["files"]
    assert groups["labels"] is None
    assert pairs["labels"]["pairs"] == 40
    assert pairs["shift"]["reference"] == "sft"
    assert groups["verdict"]["word"] in ("tells apart", "dim")
    assert found["overall"][0]["model"] == "m"


def test_tables_of_one_model_and_of_several():
    one = findings(group_file(), pair_file())
    (table,) = numbers_tables(one.diagnoses, one.verdicts)
    assert table.columns == ("", "sft", "labelled")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Verdict"] == tuple(v.word for v in one.verdicts)
    assert rows["Accuracy on labels (coin: 0.5)"][0] == NONE
    assert rows["Rows"] == ("40 groups", "40 pairs")
    assert "Rows left out, too long" not in rows, "rows that nobody has are not shown"
    assert all(len(row) == 3 for row in table.rows)
    two = findings(*(make(model=m) for m in ("a", "b") for make in (group_file, pair_file)))
    tables = numbers_tables(two.diagnoses, two.verdicts)
    assert [(t.title, t.columns) for t in tables] == [
        ("sft", ("", "a", "b")), ("labelled", ("", "a", "b")),
    ]  # fmt: skip


def test_small_numbers_are_not_shown_as_zero():
    assert (short(0.004), short(0.0), short(-0.0), short(None)) == ("4.0e-03", "0.00", "0.00", NONE)
    assert (short(0.005), short(-2.5, 1, sign=True)) == ("0.01", "-2.5")
    assert interval(Measured(0.5, 0.4, 0.6)) == "0.50 [0.40, 0.60]"
    assert (interval(Measured(0.5)), interval(None)) == ("0.50", NONE)


def test_examples_by_hand():
    def responses(*rewards):
        return tuple(ScoredResponse(r, 1, True, r) for r in rewards)

    spreads = [3.0, 0.5, 9.0, 1.0, 5.0]
    groups = tuple(ScoredGroup(i, responses(0.0, d)) for i, d in enumerate(spreads))
    rows = [{"prompt": f"p{i}", "responses": ["low", "high"]} for i in range(5)]
    found = examples(ScoredFile("m", "f", groups=groups), rows)
    assert [e.prompt for e in found] == ["p1", "p3", "p2", "p4"], "0.5, 1 | 9, 5"
    assert [r.text for r in found[0].responses] == ["high", "low"], "the best first"
    assert found[0].why == "smallest spread: standard deviation 0.250"

    margins = [2.0, -3.0, 0.1, -1.0, 0.5]
    pairs = tuple(ScoredPair(i, *responses(m, 0.0)) for i, m in enumerate(margins))
    rows = [{"chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]
    found = examples(ScoredFile("m", "f", pairs=pairs), rows)
    assert [e.responses[0].text for e in found] == ["c1", "c3", "c2", "c4"]
    assert found[0].why == "surest mistake: chosen - rejected = -3.000"
    assert found[0].responses[1].note == "rejected · reward +0.000 · 1 tokens"


def test_repeated_responses_are_shown_once():
    same = ScoredResponse(1.0, 2, True, "k")
    group = ScoredGroup(0, (same, same, ScoredResponse(2.0, 2, False, "l")))
    rows = [{"prompt": "p", "responses": ["one", "one", "two"]}]
    (found,) = examples(ScoredFile("m", "f", groups=(group,)), rows)
    assert [r.text for r in found.responses] == ["two", "one"]
    assert found.responses[0].note.endswith("cut off")


def test_long_texts_are_cut():
    assert as_text("a" * 3000).endswith(" …")
    assert as_text(None) == ""
    assert as_text([{"role": "user", "content": "hi"}]) == "user: hi"


def test_figures_say_when_there_is_nothing_to_draw():
    found = findings(group_file(scale=0.0))
    series = [("x", found.files[0], found.diagnoses[0])]
    assert calibration_figure(series) is None
    assert difference_figure(series, relative=True) is None, "no deviation to divide by"
    assert difference_figure(series, relative=False) is not None


def test_many_points_become_a_density():
    few, _ = group_file(n=20)
    many, _ = group_file(n=2000)
    assert len(render(length_figure("$x_{", many))) < 4 * len(render(length_figure("x", few)))


def worded_file(*, model="m", name="sft", by=1.0, n=40, noise=0.0):
    """Rewards of `by` a word, and of two a question mark for each hundred words."""
    rng = random.Random(0)
    groups, rows = [], []
    for i in range(n):
        counts = [rng.randint(1, 9) for _ in range(3)]
        asked = [rng.random() < 0.5 for _ in range(3)]
        texts = [("word " * c) + "?" * a for c, a in zip(counts, asked, strict=True)]
        rewards = [
            by * c + 2 * 100 * a / c + rng.gauss(0, noise)
            for c, a in zip(counts, asked, strict=True)
        ]
        groups.append(ScoredGroup(i, tuple(ScoredResponse(r, 1) for r in rewards)))
        rows.append({"prompt": f"p{i}", "responses": texts})
    return ScoredFile(model, name, groups=tuple(groups)), rows


def test_what_the_reward_pays_for():
    found = findings(worded_file(by=-30.0), worded_file(name="policy"), group_file(name="same"))
    (name, text), *_ = pays_sentences(found)
    assert name == "sft"
    assert re.match(
        r"The reward falls by 0\.\d\d standard deviations with one standard deviation more words; "
        r"it rises by 0\.\d\d with more question marks\. ",
        text,
    )
    assert "explain 100 %" in text
    (table,) = pays_tables(found)
    assert table.columns == ("One standard deviation more …", "sft", "policy")
    (largest, _, price), (second, words, _), *_ = table.rows
    assert (largest, second) == ("Question marks", "Words"), "by the largest price of all files"
    assert float(price.split()[0]) > -float(words.split()[0]) > 0.5
    assert re.fullmatch(r"-0\.\d\d \[-0\.\d\d, -0\.\d\d\]", words)
    assert table.rows[-1][:2] == ("Explained by all features", "100 %")
    (short,) = pays_tables(found, most=1)
    assert [row[0] for row in short.rows] == ["Question marks", "Explained by all features"]
    entry = numbers(found)["pays"][0]
    assert (entry["model"], entry["name"], entry["against"]) == ("m", "sft", None)
    assert {price["feature"] for price in entry["prices"]} >= {"length", "questions"}


def test_models_stand_side_by_side_in_what_they_pay_for():
    found = findings(worded_file(model="old"), worded_file(model="new", by=-30.0))
    (table,) = pays_tables(found)
    assert table.title == "What the reward pays for: sft"
    assert table.columns[1:] == ("old", "new", "new less old")
    words = next(row for row in table.rows if row[0] == "Words")
    old, new, change = (float(cell.split()[0]) for cell in words[1:])
    assert change == pytest.approx(new - old, abs=0.015)
    assert [name for name, _ in pays_sentences(found)] == ["sft · old", "sft · new"]
    (picture,) = pays_pictures(found)
    assert picture.images[0].source


def test_a_reward_that_no_feature_moves():
    (_, text), *others = pays_sentences(findings(worded_file(noise=1e9), group_file(name="same")))
    assert text.startswith("No feature moves the reward clearly by 0.1 standard deviations.")
    assert not others, "the texts of the other file differ in no feature"
    text = text_of(render_page(findings(group_file())))
    assert "Not measured: too few prompts have several responses" in text
