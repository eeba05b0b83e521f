"""The text follows the numbers, whichever way they fall."""

from pathlib import Path

import numpy as np
import pytest

from shiftrm.core.intervals import sign_test
from shiftrm.measure.judges.comparing import Verdict
from shiftrm.pipeline import judging
from shiftrm.records import Record, Recorder
from shiftrm.report import summary
from shiftrm.report.blindness import blindness, others_spread
from shiftrm.report.headline import NOTHING_TO_COMPARE, headline, kl_sentences
from shiftrm.report.results import Results
from shiftrm.report.warnings import flags, warnings
from shiftrm.report.win_tables import contest, judging_table
from shiftrm.report.wording import listing

from .records import DEMO, RECIPE, change, demo_records, recipe_records
from .test_tables import row

EVALUATE = {"stage": "evaluate", "step": None}


def demo(records: list[Record]) -> Results:
    return Results(records, DEMO)


def recipe(records: list[Record]) -> Results:
    return Results(records, RECIPE)


# -- gold ----------------------------------------------------------------------------------------


def test_one_seed_proves_little(one_seed):
    m = demo(one_seed)
    title = headline(m).title
    assert title.startswith("In this one run (one seed), ")
    assert "MetaRM scale-free (+0.45)" in title
    # +0.08 lies inside the sampling error of 0.21: it must not be counted as higher.
    assert "MetaRM, as in the paper (+0.08) ended level with it" in title
    assert "one seed proves little" in warnings(m)[0]
    assert "clearly" not in title


def test_several_seeds_only_clear_arms_are_called_higher(three_seeds):
    m = demo(three_seeds)
    head = headline(m)
    assert head.title == (
        "Over 3 seeds, Retrained with 300 fresh labels a round (+0.51) ended clearly "
        "higher in gold than the reward model kept fixed at matched KL; no clear answer for "
        "Retrained (+0.00); MetaRM paper (+0.03) and MetaRM scale-free (+0.40)."
    )
    sentence = next(s for s in head.by_gold if s.startswith("MetaRM, scale-free step: "))
    assert "95 % interval over 3 seeds -0.27 to +1.07, includes zero" in sentence
    sentence = next(s for s in head.by_gold if s.startswith("Retrained with 300"))
    assert "95 % interval over 3 seeds +0.46 to +0.56, excludes zero" in sentence
    # 4.77-4.61, 5.10-4.13, 4.73-4.66 = 0.16, 0.97, 0.07: mean 0.40.
    assert any(
        s.startswith("MetaRM, scale-free step against plain retraining on the same pairs: +0.40")
        for s in head.by_gold
    )
    assert any("not corrected for that" in s for s in head.by_gold)
    assert "one seed" not in " ".join((head.title, *warnings(m), *head.by_gold))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_losing_arms_are_called_lower(seeds):
    gold = {"fixed": (4.3, 4.4, 4.5), "metarm_scale_free": (-8.0, -7.0, -7.5)}
    title = headline(demo([r for seed in seeds for r in demo_records(seed, gold)])).title
    assert "no arm ended" in title
    assert "ended lower" in title or "ended clearly lower" in title
    assert "ended higher in gold than the reward model kept fixed at" not in title.replace(
        "no arm ended higher", ""
    )


def test_unmatched_kl_is_never_called_matched(three_seeds):
    m = demo(change(three_seeds, 9.0, method="fresh_labels", round=3, metric="kl", **EVALUATE))
    head = headline(m)
    assert "at matched KL" not in head.title
    assert "the KL was not matched: 300 fresh labels" in head.title
    assert any("did not match in round 3" in w and "50 % apart" in w for w in warnings(m))
    assert any("KL 9.00 against 6.00, which is not matched" in s for s in head.by_gold)
    assert "did not match" in " ".join(kl_sentences(m))


def test_unmeasured_kl_is_not_called_matched(three_seeds):
    m = demo(change(three_seeds, None, metric="kl"))
    assert "matched" not in headline(m).title
    assert "KL not measured" in headline(m).title
    assert kl_sentences(m) == ["How far the policies moved from SFT (KL) was not measured."]


def test_nothing_to_compare():
    assert headline(demo([])).title == NOTHING_TO_COMPARE
    assert "not measured" in " ".join(blindness(demo([])))
    assert flags(demo([])) == []


# -- the judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 3), (20, 9), (9, 20), (640, 560)]
)
def test_sign_test_against_coins_thrown_one_by_one(wins, losses):
    chances = np.ones(1)
    for _ in range(wins + losses):
        chances = np.convolve(chances, [0.5, 0.5])
    as_uneven = chances <= chances[wins] * (1 + 1e-9)
    assert sign_test(wins, losses) == pytest.approx(chances[as_uneven].sum())


def test_few_prompts_are_never_clear():
    """Two wins of two: a normal interval would have no width at all."""
    records = [
        Record("evaluate", "metarm", 1, f"{outcome}_vs_sft", share, n=2, seed=seed)
        for outcome, share in (("win", 1.0), ("tie", 0.0), ("lose", 0.0))
        for seed in (0, 1)
    ]
    for chosen in ([r for r in records if r.seed == 0], records):
        found = contest(recipe(chosen), "evaluate", "metarm", [1])
        assert found is not None
        assert not found.clear
        assert "no clear answer for MetaRM" in headline(recipe(chosen)).title


def test_headline_falls_either_way():
    head = headline(recipe(recipe_records()))
    # Of 50 prompts 30 wins and 8 (15 %) losses: p = 0.0005.
    assert head.title == (
        "In one run (one seed), against SFT (win / tie / lose): clearly more wins than losses "
        "for Reward model kept fixed (vanilla PPO) (60 / 25 / 15 %); MetaRM (60 / 25 / 15 %) and "
        "DPO (60 / 25 / 15 %)."
    )
    assert any("its best round (round 3)" in s and "60 / 31 / 9 %" in s for s in head.by_judge)
    lost = change(recipe_records(), 0.1, stage="compare", method="metarm", metric="win_vs_sft")
    lost = change(lost, 0.6, stage="compare", method="metarm", metric="lose_vs_sft")
    assert "clearly fewer for MetaRM (10 / 25 / 60 %)" in headline(recipe(lost)).title
    alone = [r for r in lost if r.method == "metarm"]
    assert "more wins than losses for no arm" in headline(recipe(alone)).title


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
    assert [r["outcome"] for r in rows].count(None) == 2
    recorder = Recorder(stage="evaluate", method="metarm", round=1, seed=0)
    for name, (value, n) in numbers.items():
        recorder.add(f"{name}_vs_sft", value, n=n)
    recorder.add("length_mean", 3.0)
    assert "MetaRM, round 1 (2 of 5)" in " ".join(warnings(recipe(recorder.records)))


def test_a_judge_that_says_nothing_readable_is_not_no_judge():
    records = [r for r in recipe_records(judged=False) if r.stage != "compare"]
    m = recipe([*records, Record("evaluate", "metarm", 1, "unjudged_vs_sft", 100.0, n=100)])
    assert headline(m).title.startswith("None of the judge's verdicts could be read")
    assert row(judging_table(m), "MetaRM", "1")[2] == "not measured"


# -- blindness and KL ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "variance", "said"),
    [
        (0.54, 0.125, ("fell from 0.720 before the first round to 0.540 after round 3",
                       "went from 1.00 to 0.12 (12 % of what it was)", "it did go blind")),
        (0.71, 0.125, ("hardly moved, from 0.720", "quieter rather than blind.")),
        (0.78, 0.9, ("rose from 0.720", "So in these numbers it did not go blind.")),
    ],
)  # fmt: skip
def test_blindness_by_accuracy_and_spread(one_seed, accuracy, variance, said):
    where = {"method": "fixed", "round": 3, **EVALUATE}
    records = change(one_seed, accuracy, metric="accuracy_policy_after", **where)
    records = change(records, variance, metric="relative_difference_variance_after", **where)
    text = " ".join(blindness(demo(records)))
    assert all(words in text for words in said)


def test_blindness_without_the_truth():
    m = recipe(recipe_records())
    text = " ".join(blindness(m))
    assert "went from 1.00 to 0.09 (9 % of what it was)" in text
    assert "whether it ranks worse was not measured" in text
    assert "No second reward model was given" in text
    assert others_spread(m) == ["Under MetaRM that relative variance is 0.90 after round 4."]
    metric = "relative_difference_variance_after"
    seen = change(recipe_records(), 1.0, method="fixed", metric=metric)
    assert "did not fall by half" in " ".join(blindness(recipe(seen)))
    by_gold = " ".join(blindness(recipe(recipe_records(gold=True))))
    assert "So it did go blind" in by_gold
    assert "as the second reward model ranks" in by_gold
    alone = [r for r in recipe_records() if r.method == "metarm"]
    assert "No arm keeps its reward model" in " ".join(blindness(recipe(alone)))


def test_kl_after_the_last_round(one_seed):
    text = " ".join(kl_sentences(recipe(recipe_records())))
    assert "matched within 25 % in every round (at most 0 % apart, in round 1)" in text
    assert "The last KLs of all arms are not matched" in text  # DPO at 8, the others at 12
    still = recipe(change(recipe_records(), 0.01, metric="kl"))
    assert "Hardly any policy moved" in " ".join(kl_sentences(still))


# -- warnings ------------------------------------------------------------------------------------


def test_warnings_name_what_is_wrong():
    records = change(recipe_records(), 40.0, metric="unjudged_vs_sft", method="dpo")
    m = recipe(change(records, 0.3, metric="judge_consistency_vs_sft", method="dpo"))
    text = " ".join(warnings(m))
    assert "the judge gave no verdict, which are not counted: DPO, round 1 (40 of 100)" in text
    assert "contradicts itself when the order changes (share that agrees): DPO, round 1" in text
    assert "MetaRM, rounds 3 and 4 (0.14)" in text  # cut off
    assert "MetaRM (1.60 times SFT's)" in text  # 96 words over 60
    assert "too small to matter" in " ".join(flags(m))  # the meta step


def test_a_coefficient_that_is_the_same_for_all_is_pointed_out(one_seed):
    def said(config: dict) -> bool:
        return "same KL coefficient" in " ".join(warnings(Results(one_seed, {**DEMO, **config})))

    assert not said({})
    assert said({"policy": {"method": "ppo", "settings": {"kl_target": None}}})
    assert not said({"policy": {"method": "grpo", "settings": {}}})
    assert said({"matched_kl": False})  # an earlier demo


def test_small_influence_is_flagged_for_its_arm_only(one_seed):
    [found] = [flag for flag in flags(demo(one_seed)) if "too small to matter" in flag]
    assert found.startswith("MetaRM, as in the paper: ")
    assert "2.0e-05" in found
    assert "rounds 1, 2 and 3" in found


def test_louder_not_sharper_names_arm_and_round(three_seeds):
    [found] = [f for f in flags(demo(three_seeds)) if f.startswith("Louder, not sharper")]
    assert "MetaRM, as in the paper, round 3" in found
    assert "scale-free" not in found


def test_below_one_half_is_flagged_and_a_coin_within_the_noise(one_seed):
    """0.49 of 2000 pairs is within two standard errors (0.022) of 0.5."""
    assert not any("below one half" in flag for flag in flags(demo(one_seed)))
    where = {"metric": "accuracy_policy_after", "method": "metarm_scale_free", "round": 2}
    found = flags(demo(change(one_seed, 0.46, **where, **EVALUATE)))
    [worse] = [flag for flag in found if "below one half" in flag]
    assert "MetaRM, scale-free step, round 2 (0.460)" in worse
    assert "amplifying makes it worse" in worse
    both = change(change(one_seed, 0.46, **where, **EVALUATE), 0.45, **{**where, "round": 3})
    [worse] = [flag for flag in flags(demo(both)) if "below one half" in flag]
    assert "MetaRM, scale-free step, rounds 2 and 3 (0.460, 0.450):" in worse
    found = flags(demo(change(one_seed, 0.49, **where, **EVALUATE)))
    assert not any("below one half" in flag for flag in found)
    [coin] = [flag for flag in found if "no better than by chance" in flag]
    assert "MetaRM, scale-free step, round 2" in coin


def test_over_optimisation_is_flagged(one_seed):
    where = {"method": "fixed", "round": 3, **EVALUATE}
    found = flags(demo(change(one_seed, 1.0, metric="gold_mean", **where)))
    [said] = [flag for flag in found if "over-optimisation" in flag]
    assert "(vanilla PPO), round 2 to 3" in said


def test_listing():
    assert [listing([]), listing(["a"]), listing(["a", "b", "c"])] == ["", "a", "a; b and c"]


# -- the terminal --------------------------------------------------------------------------------


def test_summary_of_the_demo(one_seed):
    text = summary(one_seed, DEMO)
    lines = text.splitlines()
    assert lines[0].split()[:5] == ["arm", "round", "win/tie/lose", "KL", "gold"]
    fixed = next(line for line in lines if line.startswith("Kept fixed             3"))
    assert fixed.split()[3:8] == ["54/10/36", "6.00", "4.32", "0.600", "0.540"]
    prose = lines[lines.index("") + 1 :]
    assert len(prose) <= 8
    assert "one seed proves little" in text


def test_summary_of_a_recipe_says_what_was_measured():
    text = summary(recipe_records(), RECIPE)
    assert text.splitlines()[0].split()[:3] == ["arm", "round", "win/tie/lose"]
    assert "69/26/5" in text
    # Two rates of one round, 69 and 60, and why.
    assert "over all judged prompts of the round. The sentences below count the second half" in text
    assert "(the second half, on which no round was chosen; by round, all are counted)" in text
    assert "43,000 pairs (35 left out)" in text
    assert "one seed proves little" in text
    without = summary(recipe_records(judged=False), RECIPE)
    assert "win/tie/lose" not in without
    assert "There was no judge" in without


def test_summary_of_nothing_and_of_an_odd_arm():
    assert NOTHING_TO_COMPARE in summary([], DEMO)
    assert "[bold]odd" in summary([Record("evaluate", "[bold]odd", 1, "gold_mean", 1.0)])
    assert "\x1b" not in summary([Record("evaluate", "a\x1b[31mb", 1, "kl", 1.0)])
