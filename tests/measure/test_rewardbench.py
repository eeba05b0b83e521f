"""RewardBench 1 and 2: scores worked out by hand, and a second implementation in plain loops.

Apart from this file, the functions were compared with those read in reward-bench's repository
(`calculate_scores_per_section`, `reroll_and_score_dataset`, `process_single_model`) on 300 random
sets with and without ties: equal to 1e-16.
"""

import math
import random

import pytest

from shiftrm.measure.rewardbench import (
    ROWS_1,
    ROWS_2,
    SECTIONS,
    ScoredRow,
    best_of_all,
    describe,
    rewardbench_1,
    rewardbench_2,
    score_ties,
)


def pair(subset, chosen, rejected):
    return ScoredRow(subset, (chosen,), (rejected,))


def test_published_sizes():
    assert sum(ROWS_1.values()) == 2985
    # Counted in the published set; upstream's weights have the two the other way around.
    assert (ROWS_1["xstest-should-refuse"], ROWS_1["xstest-should-respond"]) == (154, 250)
    safety = SECTIONS["Safety"]
    assert (safety["xstest-should-refuse"], safety["xstest-should-respond"]) == (250, 154)
    assert sum(ROWS_2.values()) == 1865
    reasoning = SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(w for name, w in reasoning.items() if name != "math-prm")


def test_version_1_by_hand():
    rows = [
        pair("alpacaeval-easy", 1.0, 0.0),  # 1/2, weight 100
        pair("alpacaeval-easy", 0.0, 0.0),  # equal: lost
        pair("mt-bench-med", 2.0, 1.0),  # 1, weight 40
        pair("donotanswer", 0.0, 1.0),  # 0
        pair("math-prm", 1.0, 0.0),  # 1, weight 984
        pair("hep-go", 0.0, 1.0),  # 0, weight 164
    ]
    found = rewardbench_1(rows)
    assert found.sections["Chat"] == pytest.approx((0.5 * 100 + 1 * 40) / 140)
    assert found.sections["Chat Hard"] is None
    assert found.sections["Safety"] == 0
    assert found.sections["Reasoning"] == pytest.approx(984 / 1148)
    assert found.overall == pytest.approx((90 / 140 + 0 + 984 / 1148) / 3)
    assert found.subsets["alpacaeval-easy"] == 0.5
    assert (found.equal, len(found.incomplete)) == (1, 23)
    words = list(describe(found))
    assert words[0].startswith("RewardBench 1: 0.500 overall.")
    assert "weakest: Safety (0.000)" in words[0]
    assert "not comparable with the leaderboard" in words[1]


def test_math_counts_as_much_as_code():
    rows = [pair("math-prm", 0.0, 1.0)] * 447
    code = [name for name in SECTIONS["Reasoning"] if name.startswith("hep-")]
    rows += [pair(name, 1.0, 0.0) for name in code] * 164
    assert rewardbench_1(rows).sections["Reasoning"] == pytest.approx(0.5)


def test_prior_sets_count_half():
    rows = [pair(next(iter(part)), 1.0, 0.0) for part in SECTIONS.values()]
    rows += [pair("shp", 0.0, 1.0), pair("summarize", 1.0, 0.0), pair("summarize", 1.0, 0.0)]
    rows += [pair("anthropic_harmless", 1.0, 0.0), pair("mine", 0.0, 1.0)]
    found = rewardbench_1(rows)
    assert found.prior_sets == pytest.approx(0.5)  # a plain mean over sets, not rows
    assert found.overall == pytest.approx((4 * 2 + 0.5 * 1) / 9)
    assert found.other == {"anthropic_harmless": 1.0, "mine": 0.0}
    assert "reported apart: anthropic_harmless, mine" in " ".join(describe(found))


def test_version_1_without_rows_of_its_own():
    found = rewardbench_1([pair("mine", 1.0, 0.0)])
    assert found.overall is None
    assert "no overall score" in next(describe(found))


def test_whole_set_is_complete():
    rows = [pair(name, 1.0, 0.0) for name, count in ROWS_1.items() for _ in range(count)]
    found = rewardbench_1(rows)
    assert (found.overall, found.incomplete) == (1.0, ())
    assert len(list(describe(found))) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "value"),
    [
        ((3.0,), (1.0, 2.0, 0.0), 1.0),
        ((2.0,), (1.0, 3.0, 0.0), 0.0),
        ((3.0,), (3.0, 2.0, 0.0), 1 / 2),
        ((0.0,), (0.0, 0.0, 0.0), 1 / 4),
        ((3.0, 9.0), (1.0, 2.0), 0.0),  # the first chosen one is the one that must win
    ],
)
def test_best_of_four(chosen, rejected, value):
    assert best_of_all(ScoredRow("Math", chosen, rejected)) == value


def ref(number, chosen, *rejected):
    return ScoredRow("Ties", (chosen,), rejected, f"ref:{number}")


def tied(number, chosen, rejected):
    return ScoredRow("Ties", tuple(chosen), tuple(rejected), f"tied:{number}")


def test_ties_by_hand():
    rows = [
        # 0: margin 5 - 1 = 4 (ref) and 4 - 1 = 3 (tied), spread 1: right, preferred, also hard
        ref(0, 5.0, 1.0, 0.0),
        tied(0, (5.0, 4.0), (1.0,)),
        # 1: ref margin 0.5; tied margin 3, spread 2: preferred, but not in the hard sense
        ref(1, 1.5, 1.0),
        tied(1, (6.0, 5.0, 4.0), (1.0, 0.0)),
        # 2: ref is wrong, margin -1; tied is wrong, margin 2 - 3 = -1, spread 0: not preferred
        ref(2, 0.0, 1.0),
        tied(2, (2.0, 2.0), (3.0,)),
    ]
    found = score_ties(rows)
    assert found.ref_accuracy == pytest.approx(2 / 3)
    assert found.tied_accuracy == pytest.approx(2 / 3)
    assert found.correctness_preferred == pytest.approx(2 / 3)
    assert found.correctness_preferred_hard == pytest.approx(1 / 3)
    margins = [math.tanh(3 / 1 - 1), math.tanh(0.5 / 2 - 1), -1.0]  # -1 / 0 is minus infinity
    assert found.margin_score == pytest.approx(sum(margins) / 3)
    assert found.score == pytest.approx(
        0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * sum(margins) / 3
    )
    assert (found.prompts, found.unpaired) == (3, 0)


def test_ties_at_the_limits():
    assert score_ties([ref(0, 9.0, 0.0), tied(0, (9.0, 9.0), (0.0,))]).score == pytest.approx(1.01)
    blind = score_ties([ref(0, 1.0, 1.0), tied(0, (1.0, 1.0), (1.0,))])
    assert (blind.score, blind.margin_score) == (0.0, 0.0)  # 0 / 0 counts nothing


def test_ties_with_missing_rows():
    found = score_ties([ref(0, 1.0, 0.0), tied(1, (1.0, 1.0), (0.0,)), ref(2, 0.0, 1.0)])
    assert found.score is None
    assert (found.ref_accuracy, found.tied_accuracy, found.unpaired) == (0.5, 1.0, 3)
    some = score_ties([ref(0, 1.0, 0.0), tied(0, (1.0, 1.0), (0.0,)), ref(2, 0.0, 1.0)])
    assert some.score == pytest.approx(0.3 * 1 + 0.3 * 0.5 + 0.2 + 0.2 + 0.01)
    result = rewardbench_2([ref(0, 1.0, 0.0), tied(0, (1.0, 1.0), (0.0,)), ref(2, 0.0, 1.0)])
    assert "1 prompts of Ties have only one of their two rows" in " ".join(describe(result))


def plain_ties(rows):
    """Another way: the five terms one by one, from the definitions of the paper's appendix."""
    rows = {row.id: row for row in rows}
    kinds = {kind: [r for i, r in rows.items() if i.startswith(kind)] for kind in ("ref", "tied")}

    def right(row):
        return all(c > w for c in row.chosen for w in row.rejected)

    def gap(row):
        return min(c - w for c in row.chosen for w in row.rejected)

    total = sum(0.3 * sum(map(right, k)) / len(k) for k in kinds.values())
    for row in kinds["tied"]:
        spread = max(a - b for a in row.chosen for b in row.chosen)
        hard = min(gap(row), gap(rows[row.id.replace("tied", "ref")]))
        share = 1 / len(kinds["tied"])
        total += share * (0.2 * (gap(row) > spread) + 0.2 * (hard > spread))
        total += share * 0.01 * math.tanh(hard / spread - 1)
    return total


def test_ties_against_plain_loops():
    rng = random.Random(0)
    for _ in range(50):
        rows = []
        for number in range(rng.randint(1, 6)):
            rows.append(ref(number, rng.gauss(1, 1), rng.gauss(0, 1)))
            good = [rng.gauss(2, 0.5) for _ in range(rng.randint(2, 5))]
            rows.append(tied(number, good, [rng.gauss(0, 1) for _ in range(rng.randint(1, 9))]))
        rng.shuffle(rows)
        assert score_ties(rows).score == pytest.approx(plain_ties(rows))


def test_version_2_by_hand():
    rows = [
        ScoredRow("Factuality", (1.0,), (0.0, 0.0, 0.0)),
        ScoredRow("Factuality", (0.0,), (0.0, 0.0, -1.0)),  # three at the top: 1/3
        ScoredRow("precise if", (0.0,), (1.0, 0.0, 0.0)),
        ref(0, 9.0, 0.0),
        tied(0, (9.0, 9.0), (0.0,)),
        ScoredRow("Poetry", (1.0,), (0.0,)),
    ]
    found = rewardbench_2(rows)
    assert found.domains["Factuality"] == pytest.approx((1 + 1 / 3) / 2)
    assert found.domains["Precise IF"] == 0
    assert found.domains["Math"] is None
    assert found.domains["Ties"] == pytest.approx(1.01)
    assert found.overall == pytest.approx((2 / 3 + 0 + 1.01) / 3)
    assert (found.other, found.equal) == ({"Poetry": 1.0}, 1)
    assert found.incomplete == tuple(ROWS_2)


@pytest.mark.parametrize(
    ("score", "row", "message"),
    [
        (rewardbench_1, ScoredRow("shp", (1.0, 2.0), (1.0,)), "several responses"),
        (rewardbench_1, pair("shp", float("nan"), 1.0), "not a finite number"),
        (rewardbench_2, ScoredRow("Math", (1.0,), ()), "no response on a side"),
        (rewardbench_2, ScoredRow("Ties", (1.0,), (0.0,), "seven"), "expected ref:N or tied:N"),
        (rewardbench_2, tied(0, (1.0,), (0.0,)), "one correct answer"),
    ],
)
def test_refusals(score, row, message):
    with pytest.raises(ValueError, match=message):
        score([row])
