"""The text follows the numbers, whichever way they fall."""

import pytest

from shiftrm.records import Record
from shiftrm.report import terminal_summary
from shiftrm.report.flags import flags
from shiftrm.report.measurements import Measurements
from shiftrm.report.narrative import (
    NOTHING_TO_COMPARE,
    blindness,
    headline,
    kl_verdict,
)
from shiftrm.report.wording import listing

from .conftest import change

EVALUATE = {"stage": "evaluate", "step": None}


def test_one_seed_proves_little(one_seed):
    head = headline(Measurements(one_seed))
    assert head.title.startswith("In this one run (one seed), ")
    assert "MetaRM scale-free (+0.45)" in head.title
    # +0.08 lies inside the sampling error of 0.21: it must not be counted as higher.
    assert "MetaRM, as in the paper (+0.08) ended level with it" in head.title
    assert "one seed proves little" in head.warnings[0]
    assert "clearly" not in head.title


def test_several_seeds_only_clear_arms_are_called_higher(three_seeds):
    head = headline(Measurements(three_seeds))
    assert head.title == (
        "Over 3 seeds, Retrained with 300 fresh labels a round (ceiling) (+0.51) ended clearly "
        "higher in gold than the reward model kept fixed at matched KL; no clear answer for "
        "Retrained (+0.00); MetaRM paper (+0.03) and MetaRM scale-free (+0.40)."
    )
    sentence = next(s for s in head.sentences if s.startswith("MetaRM, scale-free step: "))
    assert "95 % interval over 3 seeds -0.27 to +1.07, includes zero" in sentence
    sentence = next(s for s in head.sentences if s.startswith("Retrained with 300"))
    assert "95 % interval over 3 seeds +0.46 to +0.56, excludes zero" in sentence
    assert "one seed" not in " ".join((head.title, *head.warnings, *head.sentences))


def test_metarm_is_also_held_against_plain_retraining(three_seeds):
    # 4.77-4.61, 5.10-4.13, 4.73-4.66 = 0.16, 0.97, 0.07: mean 0.40.
    sentences = headline(Measurements(three_seeds)).sentences
    assert any(
        s.startswith("MetaRM, scale-free step against plain retraining on the same pairs: +0.40")
        for s in sentences
    )


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_losing_arms_are_called_lower(make_records, seeds):
    gold = {"fixed": (4.3, 4.4, 4.5), "metarm_scale_free": (-8.0, -7.0, -7.5)}
    title = headline(Measurements(make_records(seeds=seeds, gold_last=gold))).title
    assert "no arm ended" in title
    assert "ended lower" in title or "ended clearly lower" in title
    assert "ended higher in gold than the reward model kept fixed at" not in title.replace(
        "no arm ended higher", ""
    )


def test_unmatched_kl_is_never_called_matched(three_seeds):
    records = change(three_seeds, 9.0, method="fresh_labels", round=3, metric="kl", **EVALUATE)
    m = Measurements(records)
    head = headline(m)
    assert "at matched KL" not in head.title
    assert "the KL was not matched: 300 fresh labels" in head.title
    assert any("did not match in round 3" in w and "50 % apart" in w for w in head.warnings)
    assert any("KL 9.00 against 6.00, which is not matched" in s for s in head.sentences)
    assert "did not match" in kl_verdict(m)


def test_unmeasured_kl_is_not_called_matched(three_seeds):
    m = Measurements(change(three_seeds, None, metric="kl"))
    assert "matched" not in headline(m).title
    assert "KL not measured" in headline(m).title
    assert kl_verdict(m) == "Whether the KL matched was not measured."


def test_nothing_to_compare():
    assert headline(Measurements([])).title == NOTHING_TO_COMPARE
    assert "not measured" in " ".join(blindness(Measurements([])))
    assert flags(Measurements([])) == []


def test_blind(one_seed):
    text = " ".join(blindness(Measurements(one_seed)))
    assert "fell from 0.720 before the first round to 0.540 after round 3" in text
    assert "went from 1.00 to 0.12 (12 % of what it was)" in text
    assert "it did go blind" in text


def test_quieter_is_not_blind(one_seed):
    where = {"method": "fixed", "round": 3, **EVALUATE}
    text = blindness(Measurements(change(one_seed, 0.71, metric="accuracy_policy_after", **where)))
    assert "hardly moved, from 0.720" in text[0]
    assert text[-1].endswith("quieter rather than blind.")


def test_not_blind(one_seed):
    where = {"method": "fixed", "round": 3, **EVALUATE}
    records = change(one_seed, 0.78, metric="accuracy_policy_after", **where)
    records = change(records, 0.9, metric="relative_difference_variance_after", **where)
    text = blindness(Measurements(records))
    assert "rose from 0.720" in text[0]
    assert text[-1] == "So in these numbers it did not go blind."


def test_small_influence_is_flagged_for_its_arm_only(one_seed):
    found = [flag for flag in flags(Measurements(one_seed)) if "too small to matter" in flag]
    assert len(found) == 1
    assert found[0].startswith("MetaRM, as in the paper: ")
    assert "2.0e-05" in found[0]
    assert "rounds 1, 2 and 3" in found[0]


def test_louder_not_sharper_names_arm_and_round(three_seeds):
    found = [f for f in flags(Measurements(three_seeds)) if f.startswith("Louder, not sharper")]
    assert len(found) == 1
    assert "MetaRM, as in the paper, round 3" in found[0]
    assert "scale-free" not in found[0]


def test_below_one_half_is_flagged(one_seed):
    assert not any("below one half" in flag for flag in flags(Measurements(one_seed)))
    where = {"method": "metarm_scale_free", "round": 2, **EVALUATE}
    records = change(one_seed, 0.46, metric="accuracy_policy_after", **where)
    found = [flag for flag in flags(Measurements(records)) if "below one half" in flag]
    assert len(found) == 1
    assert "MetaRM, scale-free step, round 2 (0.460)" in found[0]
    assert "amplifying makes it worse" in found[0]


def test_within_the_noise_of_one_half_is_a_coin(one_seed):
    """0.49 of 400 pairs is within two standard errors (0.05) of 0.5."""
    where = {"method": "metarm_scale_free", "round": 2, **EVALUATE}
    found = flags(Measurements(change(one_seed, 0.49, metric="accuracy_policy_after", **where)))
    assert not any("below one half" in flag for flag in found)
    [coin] = [flag for flag in found if "no better than a coin" in flag]
    assert "MetaRM, scale-free step, round 2" in coin


def test_over_optimisation_is_flagged(one_seed):
    where = {"method": "fixed", "round": 3, **EVALUATE}
    records = change(one_seed, 1.0, metric="gold_mean", **where)
    found = [flag for flag in flags(Measurements(records)) if "over-optimisation" in flag]
    assert len(found) == 1
    assert "(vanilla PPO), round 2 to 3" in found[0]


def test_listing():
    assert listing([]) == ""
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a; b and c"


def test_terminal_summary(one_seed):
    text = terminal_summary(one_seed)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["arm", "round", "gold", "KL"]
    fixed = next(line for line in lines if line.startswith("Kept fixed"))
    assert fixed.split() == [
        "Kept",
        "fixed",
        "3",
        "4.32",
        "6.00",
        "54/10/36",
        "0.600",
        "0.540",
        "0.12",
    ]
    prose = lines[lines.index("") + 1 :]
    assert 3 <= len(prose) <= 6
    assert "one seed proves little" in text


def test_terminal_summary_of_nothing_and_of_an_odd_arm():
    assert NOTHING_TO_COMPARE in terminal_summary([])
    text = terminal_summary([Record("evaluate", "[bold]odd", 1, "gold_mean", 1.0)])
    assert "[bold]odd" in text
