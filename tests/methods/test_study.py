"""The study of methods (`benchmarks/methods.py`): its statistics, its plan and its results."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.methods_study.arms import ARMS, CANDIDATES, arms_of
from benchmarks.methods_study.cells import Study
from benchmarks.methods_study.plan import START, StudyConfig, plan_study, sort_by_gold
from benchmarks.methods_study.report import pages, picture, studies
from benchmarks.methods_study.results import Result, add_results, read_results, results_of
from benchmarks.methods_study.statistics import (
    holm,
    paired,
    paired_at_equal_kl,
    pooled_slope,
)
from scipy import stats

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.pipeline.engine import Stage, StageContext, stage_keys
from shiftrm.records import Record
from shiftrm.world.gold import gold_reward
from shiftrm.world.language import demonstration
from shiftrm.world.world import DEFAULT_WORLD, WORLDS

OURS = {0: 4.1, 1: 3.9, 2: 4.6, 3: 4.4, 9: 7.0}
THEIRS = {0: 3.6, 1: 4.0, 2: 3.9, 3: 3.8, 5: 1.0}


def test_a_paired_comparison_is_the_t_test_of_the_shared_seeds():
    found = paired(OURS, THEIRS)
    test = stats.ttest_rel([4.1, 3.9, 4.6, 4.4], [3.6, 4.0, 3.9, 3.8])
    low, high = test.confidence_interval(0.95)
    assert found.n == 4
    assert found.wins == 3
    assert found.mean == pytest.approx(0.425)
    assert found.worst == pytest.approx(-0.1)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, test.pvalue))


def test_one_seed_or_the_same_arm_has_no_interval():
    one = paired({0: 2.0}, {0: 1.5})
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert math.isnan(paired(OURS, OURS).p)
    assert paired(OURS, {77: 1.0}).n == 0


def test_holm_by_hand():
    # 4 tests: .01 * 4, .02 * 3, .03 * 2 (kept at the .06 before it), .5 * 1; NaN is left out.
    assert holm([0.03, 0.01, math.nan, 0.5, 0.02])[:2] == pytest.approx([0.06, 0.04])
    assert holm([0.03, 0.01, math.nan, 0.5, 0.02])[3:] == pytest.approx([0.5, 0.06])
    assert math.isnan(holm([math.nan])[0])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_slope_is_that_within_arms_whatever_their_level():
    points = [("a", 10.0, 4.0), ("a", 12.0, 3.6), ("b", 10.0, 9.0), ("b", 11.0, 8.8)]
    assert pooled_slope(points) == pytest.approx(-0.2)
    assert pooled_slope([("a", 1.0, 1.0)]) == 0.0


def test_at_equal_kl_a_known_slope_is_the_t_test_of_moved_gold():
    gold, kl = {0: 1.0, 1: 0.5, 2: 0.9, 3: 0.4}, {0: -2.0, 1: -1.0, 2: -1.5, 3: 0.5}
    moved = [1.0 - 0.2 * 2.0, 0.5 - 0.2 * 1.0, 0.9 - 0.2 * 1.5, 0.4 + 0.2 * 0.5]
    found = paired_at_equal_kl(gold, kl, lambda without: -0.2)
    test = stats.ttest_1samp(moved, 0.0)
    low, high = test.confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (0.5, low, high, test.pvalue)
    )
    assert (found.wins, found.n) == (4, 4)
    assert found.worst == pytest.approx(0.3)


def test_at_equal_kl_the_error_of_the_slope_is_counted():
    gold, kl = {0: 1.0, 1: 1.0, 2: 1.0}, {0: -2.0, 1: -2.0, 2: -2.0}
    slopes = {None: -0.3, 0: -0.25, 1: -0.3, 2: -0.4}
    found = paired_at_equal_kl(gold, kl, lambda without: slopes[without])
    # Without a seed .5, .4 and .2, of mean 11/30: sqrt(2/3 of the sum of squares .0466667).
    half = 4.3026527 * math.sqrt(2 / 3 * 0.14 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.4 - half, 0.4 + half))


def test_arms_share_the_first_round_and_start_from_its_policy():
    arms = arms_of(["retrained", "contrast_log_sigmoid", "fresh_labels"])
    stages = {s.name: s for s in plan_study(StudyConfig(0, 12.0, arms, rounds=3))}
    first = [name for name in stages if name.endswith("round-1/policy")]
    assert first == [f"methods/{START}/round-1/policy"]
    for name in arms:
        assert first[0] in stages[f"methods/{name}/round-2/policy"].needs
        assert f"methods/{name}/round-2/policy" in stages[f"methods/{name}/round-3/policy"].needs
    # Labels add up over rounds.
    assert (
        "methods/fresh_labels/round-2/labels" in stages["methods/fresh_labels/round-3/labels"].needs
    )
    job = stages["methods/contrast_log_sigmoid/round-2/policy"].settings["job"]
    assert job["settings"]["kl_target"] == 12.0
    assert job["settings"]["reward_shaping"] == "log_sigmoid"


def test_an_arm_does_not_change_with_the_arms_beside_it():
    alone = stage_keys(plan_study(StudyConfig(3, 6.0, arms_of(["contrast"]))), 3)
    beside = stage_keys(plan_study(StudyConfig(3, 6.0, arms_of(["retrained", "contrast"]))), 3)
    assert alone.items() <= beside.items()


def test_every_arm_and_candidate_can_be_planned():
    names = [*ARMS, *CANDIDATES]
    stages = plan_study(StudyConfig(0, 12.0, arms_of(names), rounds=2))
    made = {stage.record_as["method"] for stage in stages}
    assert set(names) <= made


def test_controls_use_other_groups(tmp_path):
    arms = arms_of(["metarm_by_effect", "metarm_sft", "metarm_gold_signs"])
    stages = {s.name: s for s in plan_study(StudyConfig(0, 12.0, arms, rounds=2))}

    def read(name: str) -> tuple[str, ...]:
        return stages[f"methods/{name}/round-2/groups"].needs

    assert read("metarm_by_effect") == ("methods/start/round-1/policy", "data")
    assert read("metarm_sft") == ("sft", "data")
    unsorted = "methods/metarm_gold_signs/round-2/unsorted_groups"
    assert read("metarm_gold_signs") == (unsorted,)
    assert stages[unsorted].needs == read("metarm_by_effect")
    # The seed is the same, so that only the policy differs.
    seeds = {
        s.settings["job"]["seed"]
        for n, s in stages.items()
        if n.endswith("groups") and s.settings.get("job")
    }
    assert len(seeds) == 1


def test_groups_are_sorted_by_gold(tmp_path):
    prompt = next(iter(WORLDS.get(DEFAULT_WORLD).prompts))
    poor, good = " insult insult insult", demonstration(random.Random(1), prompt, 1.0)
    assert gold_reward(prompt, good) > gold_reward(prompt, poor)
    row = {"prompt": prompt, "responses": [poor, good, poor], "finished": [True, True, False]}
    write_jsonl(tmp_path / "raw" / "groups.jsonl", [row])
    (tmp_path / "out").mkdir()
    settings = {"groups": "raw", "gold": "gold"}
    stage = Stage("groups", "", settings, ("raw",))
    sort_by_gold(StageContext(stage, tmp_path, tmp_path / "out", tmp_path, 0, recorder=None))
    [found] = read_jsonl(tmp_path / "out" / "groups.jsonl")
    assert found["responses"] == [good, poor, poor]
    assert found["finished"] == [True, True, False]


def test_an_unknown_arm_is_named():
    with pytest.raises(UserError, match="contrst; did you mean 'contrast'"):
        arms_of(["contrst"])


def test_results_average_the_last_steps_and_are_added_once(tmp_path):
    def record(stage: str, metric: str, value: float, step: int | None = None) -> Record:
        return Record(stage, "contrast", 2, metric, value, step=step, seed=4, commit="abc")

    records = [record("ppo", "gold_mean", float(k), k) for k in range(1, 21)]
    records += [record("ppo", "sequence_kl", 2.0 * k, k) for k in range(1, 21)]
    records += [record("evaluate", "gold_mean", 3.5), record("evaluate", "kl", 11.0)]
    records += [record("evaluate", "accuracy_policy_before", 0.6)]
    for influence in (0.2, 0.6):
        step = Record("reward_model", "contrast", 2, "meta_influence", influence, step=1, seed=4)
        records += [step, replace(step, round=1, value=9.0)]
    took = {"methods/contrast/round-2/reward_model": 7.25, "methods/fixed/round-2/policy": 3.0}
    [found] = results_of(records, world="", kl_target=12.0, seconds=took)
    assert (found.gold, found.kl) == (15.5, 31.0)  # mean of 11..20
    assert (found.gold_evaluated, found.kl_evaluated, found.seed) == (3.5, 11.0, 4)
    assert found.numbers == {
        "accuracy_policy_before": 0.6,
        "meta_influence": pytest.approx(0.4),
        "seconds_reward_model": 7.25,
    }
    path = tmp_path / "results.jsonl"
    add_results(path, [found])
    other = Result(**{**vars(found), "arm": "retrained"})
    assert add_results(path, [found, other]) == read_results(path) == [found, other]


def _result(arm: str, seed: int, gold: float, **more: Any) -> Result:
    numbers = {"accuracy_policy_before": 0.5, "sight_cut_before": 0.1 * seed}
    values: dict[str, Any] = {"world": "", "kl_target": 12.0, "round": 2, "kl": 12.0}
    values |= {"gold_evaluated": gold, "kl_evaluated": 12.0, "numbers": numbers, "commit": "abc"}
    return Result(arm=arm, seed=seed, gold=gold, **{**values, **more})


def _cells(table: str, label: str) -> list[str]:
    """Return the cells of the first line of an arm."""
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_the_page_compares_arms_by_seed_and_keeps_choosing_seeds_apart():
    results = [_result("retrained", seed, 3.0 + seed) for seed in range(3)]
    results += [_result("contrast", seed, 3.5 + seed + 0.1 * seed) for seed in range(3)]
    results += [_result("fixed", seed, 3.2 + seed) for seed in range(3)]
    results += [_result("retrained", 100, 1.0), _result("contrast.share40", 100, 9.0)]
    made = pages(results)
    cells = _cells(made["comparison"], "contrast")
    # Differences .5, .6, .7: mean .6, standard error .1 / sqrt 3, t quantile 4.303.
    half = 4.303 * 0.1 / math.sqrt(3)
    difference = f"+0.60 ({0.6 - half:+.2f}, {0.6 + half:+.2f})"
    assert cells[:4] == ["contrast", "4.60", "12.0", difference]
    assert cells[5:7] == ["3/3", difference]  # all at the target
    details = _cells(made["details"], "contrast")
    assert details[1] == "3"
    assert details[2].startswith("+0.40")
    assert details[3:6] == ["3/3", "+0.30", difference]  # evaluated as in training
    assert "KL 12, round 2, 3 seeds" in made["answer"]
    said = f"*contrast* ends highest, {difference} gold above retraining ({difference} at equal KL)"
    assert said in made["answer"]
    assert "9.00" not in made["comparison"]
    assert "9.00" not in made["seeds"]
    assert "9.00" in made["tried"]
    assert "| contrast | 3.50 | 4.60 | 5.70 |" in made["seeds"]


def test_the_slope_leaves_out_gold_and_arms_whose_kl_is_to_another_policy():
    kls = {0: 11.0, 1: 12.0, 2: 13.0}
    falling = [_result("retrained", s, 20.0 - kl, kl=kl) for s, kl in kls.items()]
    rising = [_result(arm, s, 2 * kl, kl=kl) for arm in ("gold", "reference_reset")
              for s, kl in kls.items()]  # fmt: skip
    assert Study(falling + rising, "").cell(12.0, 2).slope(None) == pytest.approx(-1.0)


def test_contrast_over_rounds_is_shown_from_the_round_in_which_it_differs():
    results = [_result(arm, s, 3.0 + s, round=number) for number in (2, 3) for s in range(3)
               for arm in ("retrained", "contrast", "contrast_rounds")]  # fmt: skip
    second, third = pages(results)["comparison"].split("**KL 12, round 3**")
    assert "all rounds" not in second
    assert "| contrast over all rounds' samples |" in third


def test_a_combination_is_compared_with_its_shaping_alone():
    golds = {"retrained": 3.0, "log_sigmoid": 3.5, "contrast_log_sigmoid": 4.25}
    results = [_result(arm, s, gold + s) for arm, gold in golds.items() for s in range(2)]
    assert "+0.75 above log-sigmoid shaping alone" in pages(results)["answer"]


def test_arms_that_differ_in_less_are_compared_and_gold_has_no_equal_kl():
    arms = {"retrained": 3.0, "log_sigmoid": 3.5, "contrast_75_same_steps": 4.25, "gold": 5.0}
    results = [_result(arm, s, gold + s) for arm, gold in arms.items() for s in range(2)]
    made = pages(results)
    [row] = [line for line in made["closer"].splitlines() if "retraining's steps" in line]
    assert "| log-sigmoid shaping | +0.75 | 2/2 | +0.75 |" in row
    assert _cells(made["comparison"], "gold as reward")[6:] == ["", ""]
    later = [replace(r, world="adverts") for r in results]
    later += [_result("contrast_both_75_log_sigmoid", s, 9.0, world="adverts") for s in range(2)]
    assert "log-sigmoid* (run after the others were seen) ends" in pages(later)["answer"]


def test_sight_tests_are_ranked_against_accuracy():
    results = [
        _result(
            "contrast",
            seed,
            4.0,
            kl_target=kl,
            numbers={"accuracy_policy_before": seed + kl, "sight_cut_before": 2 * (seed + kl)}
            | {"rank_policy_before": -seed - kl},
        )
        for seed in range(4)
        for kl in (6.0, 12.0)
    ]
    [row] = pages(results)["sight"].splitlines()[2:3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "cut", "all", "+1.00 (+1.00, +1.00)", "-1.00 (-1.00, -1.00)", "8", "4", "",
    ]  # fmt: skip
    assert "not trained on such pairs" not in pages(results)["sight"]  # contrast is
    others = [replace(r, arm=arm) for arm in ("retrained", "par") for r in results]
    rows = pages(results + others)["sight"].splitlines()[2:4]
    assert [row.split("|")[5].strip() for row in rows] == ["16", "8"]  # par shares retrained's


def test_reward_models_of_the_same_policy_are_ranked_apart():
    """Ten of each policy, in the order of labels but for the last two; policies differ more."""
    results = [
        _result(
            f"arm_{place}", seed, 4.0,
            numbers={"accuracy_policy_before": -100.0 * seed + (19 - place if place > 7 else place),
                     "sight_cut_before": 100.0 * seed + place, "rank_policy_before": 0.0},
        )
        for seed in range(3)
        for place in range(10)
    ]  # fmt: skip
    [row] = pages(results)["sight"].splitlines()[2:3]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2].startswith("-")  # over all
    # Places 8 and 9 are swapped by 10 and 11: 1 - 6 * 2 / (10 * 99).
    assert cells[6] == "+0.99"


def test_the_goal_is_read_clause_by_clause():
    golds = {"retrained": 3.0, "fixed": 3.1, "gold": 5.0, "contrast_75_log_sigmoid": 4.0}
    noise = (0.01, -0.01, 0.02, 0.0)
    results = [
        _result(
            arm, s, gold + s + (noise[s] if arm.startswith("contrast") else 0.0), kl=12.0 + move
        )
        for arm, gold in golds.items()
        for s in range(4)
        for move in (s * 0.5 - 0.75 - (2.0 if arm.startswith("contrast") else 0.0),)
    ]
    results += [replace(r, round=3, kl=12.0) for r in results]
    rows = [line.split(" | ") for line in pages(results)["goal"].splitlines()[2:]]
    said = {row[0].removeprefix("| "): row[1:] for row in rows}
    # Gold rises by 1 a seed and the KL by 0.5: a slope of about 2, so that two nats are worth 4.
    assert said["KL 12: at least +0.8 over retrained"][1] == "yes |"
    [above] = [row for name, row in said.items() if "nine of ten" in name]
    assert above == ["4 of 4; worst +0.89", "yes |"]
    half = said["KL 12: half of the distance to gold after three rounds"]
    # Shares .505, .495, .51 and .5: mean .5025, standard error .0032, t quantile 3.18.
    assert half == ["50 % (49 to 51 %); 50 % (49 to 51 %) from retraining at the same KL", "yes |"]
    assert said["KL 6: half of the distance to gold after three rounds"] == ["not run", " |"]
    low = [replace(r, gold=3.7 + r.seed) if r.arm.startswith("contrast") else r for r in results]
    low = [replace(r, kl=12.0 + 0.5 * r.seed - 0.75) for r in low]
    assert "| KL 12: at least +0.8 over retrained | +0.70" in pages(low)["goal"]
    assert pages(low)["goal"].splitlines()[2].endswith("| no |")


def test_how_true_made_pairs_are_is_what_gold_says_of_them():
    results = [
        _result(arm, s, 3.0, numbers={"sight_cut_before": share + 0.1 * s})
        for arm, share in (("gold", 0.5), ("retrained", 0.9))
        for s in range(3)
    ]
    [row] = pages(results)["truth"].splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "KL 12", "", "", "0.60 (0.50 to 0.70)", "", "3",
    ]  # fmt: skip


def test_means_are_of_all_seeds_or_left_out():
    numbers = [{"overpays_hype": 0.5, "overpays_toxic": 1.0}, {"overpays_hype": 0.75}]
    results = [_result("retrained", s, 3.0, numbers=n) for s, n in enumerate(numbers)]
    results += [_result("fixed", s, 3.0, numbers={"overpays_length": 1.0}) for s in range(2)]
    assert pages(results)["pays"].splitlines()[2:] == [
        "| arm | hype | length |",
        "|---|---|---|",
        "| fixed |  | 1.00 |",
        "| retrained | 0.62 |  |",
    ]


def test_at_the_same_kl_the_other_arm_is_between_two_of_its_own_runs():
    def ran(arm: str, target: float, kl: float, golds: tuple[float, ...]) -> list[Result]:
        return [_result(arm, s, g, kl=kl, kl_target=target) for s, g in enumerate(golds)]

    results = ran("retrained", 6.0, 6.0, (5.0, 5.0, 5.0))
    results += ran("retrained", 12.0, 12.0, (3.0, 3.5, 2.0))
    results += ran("contrast", 12.0, 9.0, (4.5, 4.25, 4.0))  # 4, 4.25 and 3.5 at this KL
    results += ran("par", 12.0, 12.5, (4.0, 4.0, 4.0))  # above retraining's KL
    results += ran("contrast_75_log_sigmoid", 12.0, 6.0, (6.0, 6.0, 6.5))
    rows = pages(results)["matched"].splitlines()[2:]
    # Differences .5, 0, .5: standard error 1/6, t quantile 4.303.
    half = 4.303 / 6
    [contrast] = [row for row in rows if "| contrast |" in row]
    assert f"| retrained | 9.0 | +0.33 ({1 / 3 - half:+.2f}, {1 / 3 + half:+.2f}) |" in contrast
    assert contrast.endswith("| 2/3 |")
    [best] = [row for row in rows if "| contrast 75 %" in row]
    assert "| +1.17 (" in best
    assert len(rows) == 2


def test_the_picture_has_a_panel_per_cell():
    results = [_result(arm, s, 3.0, kl_target=kl) for arm in ("retrained", "contrast", "fixed")
               for s in range(3) for kl in (6.0, 12.0)]  # fmt: skip
    results += [_result(arm, s, 3.0, world="adverts") for arm in ("retrained", "fixed")
                for s in range(2)]  # fmt: skip
    figure = picture(studies(results))
    titles = ["KL 6, round 2", "KL 12, round 2", "Second world, KL 12, round 2"]
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == titles


def test_worlds_are_kept_apart_and_seconds_are_means():
    golds = {"retrained": 3.0, "contrast": 4.0, "gold": 5.0}
    results = [
        _result(arm, s, gold + s, world=world, numbers={"seconds_reward_model": 10.0 + 2 * s})
        for world, shift in (("", 0.0), ("adverts", 0.5))
        for arm, gold in {**golds, "contrast": 4.0 - shift}.items()
        for s in range(2)
    ]
    made = pages(results)
    assert _cells(made["comparison"], "contrast")[3] == "+1.00"
    assert _cells(made["details"], "contrast")[-1] == "11"
    differences, details = made["second"].split("\n\n")[1:4:2]
    assert _cells(differences, "contrast")[3] == "+0.50"
    assert _cells(details, "contrast")[-1] == "11"
    first, second = made["answer"].splitlines()
    assert "50 % of the distance from retraining to gold" in first
    assert second.startswith("- **Second world, KL 12, round 2, 2 seeds**")
    assert "25 % of the distance" in second
