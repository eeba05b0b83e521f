"""What a page opens with, and an arm that is trained on gold itself."""

import pytest

from shiftrm.report import render_page, summary
from shiftrm.report.analysis import kl_spreads
from shiftrm.report.blindness import blindness_tables, others_spread
from shiftrm.report.figures import kl_figure
from shiftrm.report.headline import NOTHING_TO_COMPARE, headline, kl_sentences
from shiftrm.report.opening import opening_picture, opening_sentence
from shiftrm.report.results import Results
from shiftrm.report.samples import Answer, SamplePrompt
from shiftrm.report.sight import sight_table
from shiftrm.report.tables import metrics_table
from shiftrm.report.warnings import flags, warnings

from .records import DEMO, RECIPE, change, demo_records, recipe_records, renamed
from .test_page import text_of
from .test_tables import row

GOLD = {**DEMO, "methods": {**DEMO["methods"], "gold": {"reward": "gold", "policy": None}}}
LAST = {"stage": "evaluate", "round": 3, "metric": "gold_mean"}


def with_gold(seed=0, gold=5.5, kl=4.0):
    """The demo with an arm trained on gold: every measure of a reward model is perfect."""
    records = demo_records(seed)
    added = [r for r in renamed(records, "retrained", method="gold") if r.stage != "reward_model"]
    added = change(added, 1.0, metric="accuracy_policy_after")
    added = change(change(added, kl, metric="kl", round=3), gold, **LAST)
    return [*records, *added]


def sentence(records, config=GOLD):
    m = Results(records, config)
    return opening_sentence(m, headline(m))


# -- the sentence --------------------------------------------------------------------------------


def test_the_sentence_of_one_seed():
    # Best 4.83, fixed 4.32, gold 5.50: 0.51 of 1.18 is 43 %.
    assert sentence(with_gold()) == (
        "After three rounds, equally far from the start (KL 6), the policy earns a true reward of "
        "4.3 with the reward model kept fixed, 4.8 with the best of four other methods (Retrained "
        "with 300 fresh labels a round) and 5.5 with the true reward itself: in this one run that "
        "method closed 43 % of the gap."
    )


def test_the_sentence_over_seeds_needs_an_interval_without_zero():
    records = [r for seed in (0, 1, 2) for r in with_gold(seed)]
    # Differences .51 .49 .53, mean .51; fixed 4.4667; .51 / (5.5 - 4.4667) is 49 %.
    assert sentence(records).endswith("over 3 seeds that method closed 49 % of the gap.")
    unclear = change(records, 3.0, method="fresh_labels", seed=0, **LAST)
    assert "no method earns the policy clearly more true reward" in sentence(unclear)


def test_a_gain_within_the_noise_is_none():
    """The sampling error of a difference is 1.96 * 1.5 * sqrt(2 / 400) = 0.21."""
    records = with_gold()
    for arm in ("retrained", "metarm_paper", "metarm_scale_free", "fresh_labels"):
        records = change(records, 4.5, method=arm, **LAST)
    assert sentence(records).endswith(
        "no method earns the policy clearly more true reward than the reward model kept fixed "
        "(4.3): four other methods ended at 4.5, in this one run; the true reward itself gave 5.5."
    )
    worse = change(records, -8.0, method="metarm_paper", **LAST)
    assert "four other methods ended at -8.0 to 4.5" in sentence(worse)


def test_without_gold_as_an_arm_no_share_is_given():
    assert sentence(demo_records(), DEMO).endswith(
        "4.8 with the best of four other methods (Retrained with 300 fresh labels a round), in "
        "this one run."
    )


def test_a_ceiling_below_the_fixed_one_gives_no_share():
    assert "%" not in sentence(with_gold(gold=4.0))


def test_the_distance_is_said_as_it_is():
    where = {"stage": "evaluate", "metric": "kl", "round": 3, "method": "fresh_labels"}
    assert "not equally far from the start (KL 6 to 9)" in sentence(
        change(with_gold(), 9.0, **where)
    )
    assert sentence(change(with_gold(), None, **where)).startswith(
        "After three rounds, the policy earns"
    )


def test_elsewhere_the_page_opens_with_its_headline():
    for records, config in ((recipe_records(), RECIPE), (recipe_records(gold=True), RECIPE)):
        m = Results(records, config)
        assert opening_sentence(m, headline(m)) == headline(m).title
        assert opening_picture(m) is None
    assert sentence([]) == NOTHING_TO_COMPARE


def test_page_and_terminal_open_with_it(undrawn):
    html, said = render_page(with_gold(), config=GOLD), summary(with_gold(), GOLD)
    start = text_of(html).split("The arms")[0]
    assert start.index("After three rounds") < start.index("Higher is better")
    assert start.index("Higher is better") < start.index("In this one run (one seed)")
    assert html.split("7 arms, 3 rounds")[0].count("<img") == 1, "one picture, and it comes first"
    assert said.index("After three rounds") < said.index("In this one run (one seed)")


# -- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_picture_starts_all_arms_at_sft(seeds, monkeypatch):
    drawn = []
    monkeypatch.setattr("shiftrm.report.plots.render", lambda f: drawn.append(f) or b"<svg/>")
    picture = opening_picture(Results([r for s in seeds for r in with_gold(s)], GOLD))
    axes = drawn[0].axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 6, "five arms and gold, without DPO"
    assert {line.get_ydata()[0] for line in lines} == {2.3}
    assert lines[-1].get_ydata()[-1] == pytest.approx(5.5)
    assert "at KL 4" in picture.caption
    assert ("over the seeds" in picture.caption) == (len(seeds) > 1)
    fixed = axes.containers[2]  # of the first arm's last round
    low, high = fixed.lines[2][0].get_segments()[0][:, 1]
    # 1.96 * 1.5 / sqrt(400) = 0.147; over seeds 4.3027 * 0.150111 / sqrt(3) = 0.3729.
    assert (high - low) / 2 == pytest.approx(0.147 if len(seeds) == 1 else 0.3729, abs=1e-4)


# -- gold is no reward model ---------------------------------------------------------------------


def test_gold_is_compared_but_no_arm_with_a_reward_model():
    m = Results(with_gold(kl=2.0), GOLD)
    assert "Gold" not in headline(m).title
    assert any(s.startswith("Gold as the reward (ceiling): gold 5.50") for s in headline(m).by_gold)
    assert all("gold" not in (s.lowest, s.highest) for s in kl_spreads(m))
    assert not any("KL did not match" in w for w in warnings(m))
    assert "matched within 25 %" in " ".join(kl_sentences(m))
    assert "Gold reward 2.00" in " ".join(kl_sentences(m))
    spoken = " ".join([*flags(m), *others_spread(m)])
    assert "Gold as the reward" not in spoken
    assert "4 arms are compared" not in " ".join(headline(m).by_gold)
    seeds = [r for seed in (0, 1, 2) for r in with_gold(seed)]
    assert any(s.startswith("5 arms are compared") for s in headline(Results(seeds, GOLD)).by_gold)


def test_tables_have_no_reward_model_of_gold(undrawn):
    records = with_gold()
    for arm in ("fixed", "gold"):
        records += renamed([r for r in records if r.metric == "kl"], arm, metric="sight_cut_after")
    m = Results(records, GOLD)
    assert row(sight_table(m), "Reward model kept fixed (vanilla PPO)", "3")
    cells = dict(
        zip(
            metrics_table(m).columns,
            row(metrics_table(m), "Gold as the reward (ceiling)", "3"),
            strict=True,
        )
    )
    assert cells["Gold"] == "5.50"
    for name, value in cells.items():
        if name.startswith(("Accuracy", "Relative", "Proxy", "Influence")):
            assert value == "—", name
    for table in [*blindness_tables(m), sight_table(m)]:
        assert all("Gold as the reward" not in cells[0] for cells in table.rows)
    lines = [line.split() for line in summary(records, GOLD).splitlines()]
    [end] = [cells[5:] for cells in lines if cells[:3] == ["Gold", "reward", "3"]]
    assert end == ["5.50", "-", "-", "-", "-", "-", "11.9"]
    shown = [text.get_text() for text in kl_figure(m, "proxy").legends[0].get_texts()]
    assert "Gold reward" not in shown
    assert "Gold reward" in [t.get_text() for t in kl_figure(m, "gold").legends[0].get_texts()]


def test_a_sample_of_golds_arm_shows_no_reward_of_a_model(undrawn):
    answers = (Answer("gold", 3, "r", "5.00", gold="5.00"), Answer("fixed", 3, "r", "1.00"))
    text = text_of(render_page(with_gold(), config=GOLD, samples=[SamplePrompt("p", answers)]))
    assert "reward 5.00" not in text
    assert "reward 1.00" in text
