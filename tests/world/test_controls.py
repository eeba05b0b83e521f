"""The gold world's controls: the checks on made-up numbers, the documents, and one small run."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.gold_world.checks import (
    Table,
    check_controls,
    curve_noise,
    gold_as_reward,
    largest_fall,
    proxy_without_penalty,
    shuffled_labels,
    windows,
)
from benchmarks.gold_world.controls import ControlsConfig, at_kl, plan_controls
from benchmarks.gold_world.report import (
    block,
    controls_figure,
    controls_tables,
    feature_table,
    replace_block,
)

from shiftrm.errors import UserError
from shiftrm.pipeline.engine import run_stages, stage_keys
from shiftrm.records import Record, read_records
from shiftrm.world.world import WORLDS

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = ControlsConfig()


def test_the_controls_keep_their_own_start_of_the_kl_penalty():
    """The recipe's is for the demo's KL; the numbers of docs/gold-world.md are with this one."""
    settings = CONFIG.experiment.policy.settings
    assert (settings["kl_coefficient"], settings["kl_rate"]) == (0.05, 0.2)


def line(start, end, steps=100):
    return [start + (end - start) * i / (steps - 1) for i in range(steps)]


def ideal(seed):
    """Records in which everything is as it should be, with sampling noise of 0.05 a step."""
    rng = random.Random(seed)
    records = []

    def curve(method, metric, values):
        for step, value in enumerate(values, start=1):
            value += rng.gauss(0, 0.05)
            records.append(Record("ppo", method, 1, metric, value, step=step, n=256, seed=seed))

    def final(stage, method, metric, value, n=800):
        records.append(Record(stage, method, 1, metric, value, n=n, seed=seed))

    def trained(method, accuracy):
        for step in (500, 1000):  # the last one counts
            value = accuracy if step == 1000 else 0.3
            records.append(
                Record("reward_model", method, 0, "eval_accuracy", value, step=step, seed=seed)
            )

    def evaluated(method, gold, kl):
        final("evaluate", method, "gold_mean", gold)
        final("evaluate", method, "gold_std", 2.0)
        final("evaluate", method, "kl", kl)

    evaluated("sft", 2.0, 0.0)
    for method, proxy, gold, end, kl in (
        ("proxy_no_kl", line(0.5, 2.0), line(2.0, 4.0, 20) + line(4.0, -6.0, 80), -6.0, 60.0),
        ("gold_no_kl", line(0.5, 2.0), line(2.0, 5.6, 50) + line(5.6, 5.6, 50), 5.6, 10.0),
        ("proxy_kl", line(0.5, 1.4), line(2.0, 4.5, 40) + line(4.5, 4.5, 60), 4.5, 4.0),
        ("shuffled_no_kl", line(0.0, 1.8), line(2.0, -9.0), -9.0, 80.0),
        ("shuffled@kl6", line(0.0, 1.2), line(2.0, 0.5), 0.5, 6.0),
    ):
        curve(method, "standardised_mean", proxy)
        curve(method, "gold_mean", gold)
        evaluated(method, end, kl)
    for count, accuracy in zip(CONFIG.pair_counts, (0.6, 0.7, 0.75), strict=True):
        trained(f"pairs_{count}", accuracy)
    for shuffle, accuracy in enumerate((0.44, 0.5, 0.53), start=1):  # their mean counts
        trained(f"shuffled_{shuffle}", accuracy)
    names = [*(f"pairs_{count}" for count in CONFIG.pair_counts), "gold"]
    for target in CONFIG.kl_targets:
        for name, gold in zip(names, (3.0, 4.2, 4.8, 5.4), strict=True):
            curve(at_kl(name, target), "gold_mean", [gold] * 60)
            curve(at_kl(name, target), "sequence_kl", [target] * 60)
    return records


RECORDS = [record for seed in (0, 1) for record in ideal(seed)]


def changed(method, metric, change, stage="ppo"):
    """The ideal records with the numbers of one metric changed: `change(value, step)`."""
    return [
        replace(r, value=change(r.value, r.step))
        if (r.stage, r.method, r.metric) == (stage, method, metric)
        else r
        for r in RECORDS
    ]


def failing(records):
    return {
        (check.control, check.seed) for check in check_controls(records, CONFIG) if not check.holds
    }


def test_windows_fall_and_noise_by_hand():
    assert windows([1.0, 3.0, 5.0, 7.0, 100.0], width=2) == [2.0, 6.0]
    assert largest_fall([1.0, 4.0, 2.0, 3.0, 0.5, 9.0]) == 3.5
    assert largest_fall([1.0, 2.0, 2.0]) == 0.0
    # Differences +2 and -2: variance of a step 4 / 2; of the difference of two means of 8, 2*2/8.
    assert curve_noise([0.0, 2.0, 0.0], width=8) == pytest.approx(3 * math.sqrt(0.5))
    with pytest.raises(ValueError, match="two steps"):
        curve_noise([1.0])


def test_curve_noise_estimates_sampling_noise_through_a_trend():
    rng = random.Random(0)
    curve = [0.02 * t + rng.gauss(0, 0.3) for t in range(4000)]
    assert curve_noise(curve, width=10) == pytest.approx(3 * 0.3 * math.sqrt(2 / 10), rel=0.05)


def test_all_hold_where_all_is_as_it_should_be():
    checks = check_controls(RECORDS, CONFIG)
    assert [check for check in checks if not check.holds] == []
    assert {check.control for check in checks} == set("abcde")
    assert {check.seed for check in checks if check.control == "d"} == {None}
    assert {check.seed for check in checks if check.control != "d"} == {0, 1}


BROKEN = {
    "proxy falls": (
        ("proxy_no_kl", "standardised_mean", lambda v, t: 2.5 - v),
        {("a", 0), ("a", 1)},
    ),
    "proxy stands still": (
        ("proxy_no_kl", "standardised_mean", lambda v, t: v if t < 33 else 1.0),
        {("a", 0), ("a", 1)},
    ),
    "gold never peaks": (
        ("proxy_no_kl", "gold_mean", lambda v, t: 2 - 0.1 * t),
        {("a", 0), ("a", 1)},
    ),
    "gold ends above SFT": (
        ("proxy_no_kl", "gold_mean", lambda v, t: 2.1, "evaluate"),
        {("a", 0), ("a", 1)},
    ),
    "gold as reward falls": (
        ("gold_no_kl", "gold_mean", lambda v, t: v - 0.5 * (t > 80)),
        {("b", 0), ("b", 1)},
    ),
    "shuffled labels teach": (
        ("shuffled_1", "eval_accuracy", lambda v, t: 0.65, "reward_model"),
        {("c", 0), ("c", 1)},
    ),
    "shuffled labels gain": (
        ("shuffled@kl6", "gold_mean", lambda v, t: 2.6, "evaluate"),
        {("c", 0), ("c", 1)},
    ),
    "more pairs are worse": (("pairs_500@kl6", "gold_mean", lambda v, t: v + 1.5), {("d", None)}),
    "better than gold": (("pairs_20000@kl12", "gold_mean", lambda v, t: v + 1), {("d", None)}),
    "KL not matched": (("pairs_3000@kl12", "sequence_kl", lambda v, t: v * 0.7), {("d", None)}),
    "gold went further": (("gold@kl12", "sequence_kl", lambda v, t: v * 1.3), {("d", None)}),
    "the penalty does not help": (
        ("proxy_kl", "gold_mean", lambda v, t: v - 0.02 * max(0, t - 50)),
        {("e", 0), ("e", 1)},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_claim_fails_where_it_should(name):
    change, expected = BROKEN[name]
    assert failing(changed(*change)) == expected


def test_gold_may_stop_short_of_the_kl_it_is_allowed():
    assert failing(changed("gold@kl12", "sequence_kl", lambda v, t: v * 0.7)) == set()


def test_a_missing_run_is_an_error_that_names_it():
    with pytest.raises(KeyError, match="gold_no_kl"):
        check_controls([r for r in RECORDS if r.method != "gold_no_kl"], CONFIG)


def test_records_given_twice_are_an_error():
    with pytest.raises(ValueError, match="step 1 is there twice"):
        check_controls([*RECORDS, *RECORDS], CONFIG)


def test_plan_needs_stand_before_those_that_need_them():
    stages = plan_controls(CONFIG)
    assert len(stage_keys(stages, 0)) == len(stages)  # KeyError where a need comes later
    names = {stage.record_as["method"] for stage in stages}
    assert {"proxy_no_kl", "proxy_kl", "gold_no_kl", "shuffled_3", "pairs_500@kl6"} <= names
    free = next(s for s in stages if s.name == "runs/proxy_no_kl/policy")
    settings = free.settings["job"]["settings"]
    assert (settings["kl_target"], settings["kl_coefficient"]) == (None, 0)
    with pytest.raises(UserError, match="proxy_pairs is 10"):
        ControlsConfig(proxy_pairs=10)


def test_figure_and_tables_show_every_seed():
    figure = controls_figure(RECORDS, CONFIG)
    assert len(figure.axes) == 4
    assert len(figure.axes[0].lines) == 2 * (2 + 1)  # two runs: two seeds and their mean
    tables = controls_tables(RECORDS, CONFIG, check_controls(RECORDS, CONFIG))
    assert "| (a) proxy, no penalty | -6.00 (60.0) | -6.00 (60.0) |" in tables
    assert "FAILS" not in tables


@pytest.mark.parametrize(
    ("name", "shown"), [("topics", "features"), ("adverts", "features-adverts")]
)
def test_the_document_shows_the_gold_reward_as_it_is(name, shown):
    world = WORLDS.get(name)
    text = feature_table(world)
    assert all(f"`{feature.name}` | {feature.weight:+g} |" in text for feature in world.features)
    assert block(DOCS / "gold-world.md", shown) == text, (
        f"docs/gold-world.md is older than the world: run "
        f"benchmarks/gold_world_controls.py --world {name} --docs docs"
    )


def test_controls_of_another_world_use_its_gold():
    stages = {s.name: s for s in plan_controls(ControlsConfig(settings=("world.kind=adverts",)))}
    assert stages["runs/gold_no_kl/policy"].settings["job"]["reward"] == "gold:adverts"
    assert stages["runs/proxy_no_kl/policy"].settings["job"]["watch"] == "gold:adverts"
    assert stages["runs/proxy_no_kl/evaluation"].settings["gold"] == "gold:adverts"
    assert stages["pairs"].settings["gold"] == "gold:adverts"


def test_replace_block(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("x\n<!-- t:begin -->\nold\n<!-- t:end -->\ny\n", encoding="utf-8")
    replace_block(path, "t", "new\nlines")
    assert path.read_text() == "x\n<!-- t:begin -->\nnew\nlines\n<!-- t:end -->\ny\n"
    assert block(path, "t") == "new\nlines"
    with pytest.raises(UserError, match="no block 'u'"):
        replace_block(path, "u", "")


SMALL = ControlsConfig(
    pair_counts=(3_000,),
    heldout_pairs=1_000,
    kl_targets=(),
    reward_steps=400,
    shuffles=1,
    free_steps=50,
    settings=("world.sft_examples=19200", "policy.settings.prompts_per_step=8"),
)


@pytest.mark.slow
def test_small_controls_for_real(tmp_path):
    """(a), (b) and (c) without penalty: one seed, shorter training, half the roll-outs."""
    skipped = ("runs/proxy_kl/", f"runs/{at_kl('shuffled', SMALL.shuffled_kl)}/")
    stages = [s for s in plan_controls(SMALL) if not s.name.startswith(skipped)]
    run_stages(stages, tmp_path / "run", seed=0)
    table = Table(read_records(tmp_path / "run" / "records.jsonl"))
    accuracy, no_gain = shuffled_labels(table, 0, ["shuffled_no_kl"])
    checks = [*proxy_without_penalty(table, 0), *gold_as_reward(table, 0), no_gain]
    assert [check for check in checks if not check.holds] == []
    # One shuffle leaves one random direction, which a few hundredths more or less go with; the
    # controls themselves take the mean of several.
    assert abs(accuracy.numbers["mean"] - 0.5) < 0.15
