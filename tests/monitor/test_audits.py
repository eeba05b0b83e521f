"""Audits: unbiased draws, the queue, and answers in the formats of `shiftrm evaluate`."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from shiftrm.core.betting import e_values
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.measure.people.blinding import pair_id
from shiftrm.monitor.audits import (
    Audit,
    answer,
    doubt,
    draw_audit,
    ordered_pairs,
    read_audit,
    write_audit,
)
from shiftrm.monitor.evidence import evidence_of
from shiftrm.monitor.settings import MonitorConfig

GROUPS = [
    {
        "prompt": f"p{i}",
        "responses": ["a", "b b", "c c c", "a"],
        "finished": [True, True, False, True],
        "rewards": [0.0, 0.1 * i, 30.0, 0.0],
    }
    for i in range(40)
]


def drawn(count=20, targeted=0.5, seed=0, groups=GROUPS, asked=()):
    pool = [ordered_pairs(groups)]
    return draw_audit(pool, count, targeted=targeted, rng=random.Random(seed), asked=asked)


def longer_is_right(pairs):
    return ["win" if len(pair.ours) > len(pair.theirs) else "lose" for pair in pairs]


def test_ours_is_what_the_model_prefers():
    for one in drawn(50):
        rewards = {"a": 0.0, "b b": 0.1 * int(one.pair.prompt[1:]), "c c c": 30.0}
        assert rewards[one.pair.ours] >= rewards[one.pair.theirs]
        assert one.pair.ours != one.pair.theirs  # equal texts are no pair
        assert one.pair.ours_finished == (one.pair.ours != "c c c")


def test_weights_are_unbiased():
    """Whatever is drawn more often, a prompt's weighted mean is that of an even draw."""
    many = [drawn(1, seed=seed, groups=GROUPS[1:2])[0] for seed in range(5000)]
    wide = [one.weight * (one.pair.ours == "c c c") for one in many]
    # Of the 5 ordered pairs (ab, ac, bc, ba, ca), three have c.
    assert np.mean([one.pair.ours == "c c c" for one in many]) < 0.56
    assert np.mean(wide) == pytest.approx(3 / 5, abs=0.03)
    assert np.mean([one.weight for one in many]) == pytest.approx(1.0, abs=0.02)
    assert max(one.weight for one in many) <= many[0].largest <= 2.0


def test_an_audit_draws_different_prompts():
    """Each as often as any other, however many pairs it has."""
    assert len({one.pair.prompt for one in drawn(count=100)}) == len(drawn(count=100)) == 40
    assert len({one.pair.prompt for one in drawn(count=7)}) == len(drawn(count=7)) == 7
    assert [len(drawn(groups=GROUPS[:n])) for n in (1, 2, 3, 10)] == [1, 2, 3, 10]
    large = {"prompt": "large", "responses": [f"r{k}" for k in range(12)], "finished": [True] * 12}
    groups = [*GROUPS[1:4], {**large, "rewards": list(range(12))}]
    found = [one.pair.prompt for seed in range(1500) for one in drawn(1, seed=seed, groups=groups)]
    assert found.count("large") / len(found) == pytest.approx(1 / 4, abs=0.04)


def test_steps_share_their_prompts():
    pools = [ordered_pairs(GROUPS[:4]), ordered_pairs(GROUPS[:2])]
    found = draw_audit(pools, 100, targeted=0.5, rng=random.Random(0))
    assert len(found) == len({one.pair.prompt for one in found}) == 4


def test_no_pair_is_asked_twice():
    asked: set[str] = set()
    total = []
    while found := drawn(groups=GROUPS[1:3], asked=asked):
        asked |= {pair_id(one.pair) for one in found}
        total += found
    assert len(total) == len(asked) == 6  # ba, ca, cb of each prompt; the two a are one text


def test_the_expected_product_of_an_audit_is_at_most_one():
    """All outcomes of an audit of a pool whose accuracy is the threshold, by enumeration."""
    right = [[1, 1, 1], [1, 0], [0, 1, 0, 1, 1, 1], [0]]  # mean over prompts: (1 + 1/2 + 2/3) / 4
    threshold = (1 + 1 / 2 + 2 / 3) / 4
    q_PN = [0.5 / len(x) + 0.5 * doubt(np.arange(1.0, len(x) + 1)) for x in right]
    w_PN = [1 / len(q) / q for q in q_PN]
    largest = max(w.max() for w in w_PN)
    for m in (1, 2, 3, 4):
        orders = list(itertools.permutations(range(4), m))
        total = 0.0
        for order in orders:
            for ks in itertools.product(*(range(len(right[p])) for p in order)):
                chance = math.prod(q_PN[p][k] for p, k in zip(order, ks, strict=True))
                x = [right[p][k] for p, k in zip(order, ks, strict=True)]
                w = [w_PN[p][k] for p, k in zip(order, ks, strict=True)]
                about = {"threshold": threshold, "largest_N": [largest] * m, "planned": 1}
                total += chance / len(orders) * e_values(x, w, [1] * m, **about)[-1]
        assert total <= 1 + 1e-12
        assert total > 0.95


def test_even_draws_have_weight_one():
    assert {one.weight for one in drawn(targeted=0.0)} == {1.0}


def test_doubt_goes_where_differences_are_small():
    assert doubt(np.array([0.0, 1.0, 1.0])) == pytest.approx([0.5, 0.25, 0.25])
    assert doubt(np.zeros(4)) == pytest.approx([0.25] * 4)


def test_equal_rewards_are_not_drawn():
    """A tie cannot be right or wrong; `p0` has b b at the reward of a."""
    assert all(one.pair.ours == "c c c" for seed in range(50) for one in drawn(groups=GROUPS[:1]))
    same = [{**group, "rewards": [1.0] * 4} for group in GROUPS]
    assert drawn(groups=same) == []


def test_no_pairs():
    same = [{"prompt": "p", "responses": ["a", "a"], "finished": [True] * 2, "rewards": [1, 2]}]
    assert drawn(groups=same) == []


def test_queue_and_answers(tmp_path):
    audit = Audit(2, 7, tuple(drawn()), episode=3)
    write_audit(tmp_path / "a", audit)
    assert read_audit(tmp_path / "a", 2) == audit
    ours, theirs = (read_jsonl(tmp_path / "a" / f"{side}.jsonl") for side in ("ours", "theirs"))
    assert len(ours) == len(theirs) == audit.labels
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
    answer(tmp_path / "a", audit, longer_is_right)
    found = read_audit(tmp_path / "a", 2)
    for one in found.answered:
        right = len(one.pair.ours) > len(one.pair.theirs)
        assert one.correct == float(right)
    assert len(found.answered) == 20
    weights = np.array([one.weight for one in found.drawn])
    correct = np.array([one.correct for one in found.drawn])
    assert found.accuracy == pytest.approx((weights * correct).sum() / weights.sum())


def test_answers_of_the_commands(tmp_path, capsys):
    """The sheet of `evaluate sheet`, filled in, and the verdicts of `evaluate win-rate`."""
    from shiftrm.cli import main

    folder = tmp_path / "a"
    groups = [
        {
            **group,
            "prompt": f"prompt {i}",
            "responses": ["u", "v v", "w w w"],
            "finished": [True] * 3,
        }
        | {"rewards": [0.0, 1.0, 2.0]}
        for i, group in enumerate(GROUPS[:16])
    ]
    audit = Audit(1, 4, tuple(drawn(8, groups=groups)))
    write_audit(folder, audit)
    sides = ["--ours", str(folder / "ours.jsonl"), "--theirs", str(folder / "theirs.jsonl")]
    sheet = tmp_path / "sheet"
    assert main(["evaluate", "sheet", *sides, "--output", str(sheet)]) == 0
    key = json.loads((sheet / "key.json").read_text())
    (one,) = key["sheets"]
    rows = [
        {"sheet": one["id"], "item": n, "answer": item["ours"], "rater": "ann"}
        for n, item in enumerate(one["items"], start=1)
    ]
    write_jsonl(tmp_path / "ann.jsonl", rows)
    words = ["--key", str(sheet / "key.json"), "--answers", str(tmp_path / "ann.jsonl")]
    people = folder / "people" / "human.jsonl"
    assert main(["evaluate", "answers", *words, "--output", str(people)]) == 0
    assert read_audit(folder, 1).accuracy == 1.0
    assert len(read_audit(folder, 1).answered) == 8
    capsys.readouterr()


def test_several_answers_are_averaged_and_strangers_ignored(tmp_path):
    audit = Audit(1, 1, tuple(drawn(1, groups=GROUPS[1:])))
    write_audit(tmp_path / "a", audit)
    pair = audit.drawn[0].pair
    row = {"prompt": pair.prompt, "ours": pair.ours, "theirs": pair.theirs}
    rows = [{**row, "outcome": outcome} for outcome in ("win", "tie", None)]
    write_jsonl(tmp_path / "a" / "answers.jsonl", [*rows, {**rows[0], "ours": "else"}])
    assert read_audit(tmp_path / "a", 1).drawn[0].correct == 0.75
    write_jsonl(tmp_path / "a" / "answers.jsonl", [{**row, "outcome": "better"}])
    with pytest.raises(UserError, match="answer 1 is 'better'; write win"):
        read_audit(tmp_path / "a", 1)


def test_a_function_must_answer_all(tmp_path):
    audit = Audit(1, 1, tuple(drawn(groups=GROUPS[1:])))
    with pytest.raises(UserError, match="1 answers for"):
        answer(tmp_path, audit, lambda pairs: ["win"])


# -- evidence ------------------------------------------------------------------------------------


def answered(number, right, episode=1, count=10):
    pairs = drawn(count, targeted=0.0, groups=GROUPS[1:])
    filled = [
        type(one)(one.pair, one.weight, one.largest, float(k < right))
        for k, one in enumerate(pairs)
    ]
    return Audit(number, number, tuple(filled), episode)


def test_evidence_is_the_test_of_the_present_model():
    config = MonitorConfig(threshold=0.7, budget=40, audit_pairs=10)
    audits = [answered(1, 1), answered(2, 3, episode=2), answered(3, 9, episode=2)]
    found = evidence_of(audits, config, 2)
    wanted = e_values(
        [1.0] * 3 + [0.0] * 7 + [1.0] * 9 + [0.0],
        [1.0] * 20,
        [1] * 10 + [2] * 10,
        threshold=0.7,
        largest_N=[1.0] * 20,
        planned=4,
    )
    assert found.value == pytest.approx(wanted[-1])
    assert (found.accuracy, found.answers, found.needed) == (pytest.approx(0.9), 20, 20)
    assert evidence_of(audits, config, 3).value == 1.0
    assert evidence_of([answered(1, 0, count=20)], config, 1).alarm


# -- files of answers that are not as they should be ---------------------------------------------


@pytest.fixture
def queued(tmp_path):
    """An audit's folder, and its answers, all "win"."""
    audit = Audit(1, 1, tuple(drawn(5)))
    write_audit(tmp_path / "a", audit)
    rows = [
        {"prompt": p.prompt, "ours": p.ours, "theirs": p.theirs, "outcome": "win"}
        for p in (one.pair for one in audit.drawn)
    ]
    return tmp_path / "a", rows


def test_exchanged_sides_count_turned_round(queued):
    folder, rows = queued
    turned = [{**r, "ours": r["theirs"], "theirs": r["ours"], "outcome": "lose"} for r in rows[:4]]
    write_jsonl(folder / "answers.jsonl", turned)
    assert [one.correct for one in read_audit(folder, 1).drawn] == [1.0] * 4 + [None]


def test_other_pairs_are_said(queued):
    folder, rows = queued
    write_jsonl(folder / "answers.jsonl", [{**row, "prompt": 3} for row in rows])
    with pytest.raises(UserError, match="none of its 5 answers is about a pair of this audit"):
        read_audit(folder, 1)


@pytest.mark.parametrize("text", ["", "win\n", '{"prompt": "p'])
def test_a_broken_file_leaves_the_others(text, queued):
    folder, rows = queued
    (folder / "answers.jsonl").write_text(text)
    (folder / "people").mkdir()
    write_jsonl(folder / "people" / "human.jsonl", rows)
    problems = []
    assert len(read_audit(folder, 1, problems).answered) == 5
    assert len(problems) == 1
    assert "answers.jsonl" in problems[0]


def test_an_outcome_that_is_a_list(queued):
    folder, rows = queued
    write_jsonl(folder / "answers.jsonl", [{**rows[0], "outcome": ["lose"]}])
    with pytest.raises(UserError, match=r"answer 1 is \['lose'\]; write win"):
        read_audit(folder, 1)
