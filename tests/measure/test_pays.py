"""What a reward model pays for on files whose rewards are known functions of the text."""

import random

import numpy as np
import pytest

from shiftrm.measure.diagnosis.diagnosis import ScoredFile
from shiftrm.measure.diagnosis.pays import pays, prices
from shiftrm.measure.diagnosis.scored import ScoredGroup, ScoredPair, ScoredResponse

WORDS = ["roses", "soil", "tulips", "bees", "blossoms", "fountains", "perhaps", "gentle"]


def rows(n=60, k=3, seed=0):
    rng = random.Random(seed)
    return [
        {
            "prompt": f"describe number{i} :",
            "responses": [
                " ".join(rng.choices(WORDS, k=rng.randint(2, 12))) + rng.choice(["", "?", "!"])
                for _ in range(k)
            ],
            "finished": [rng.random() < 0.7 for _ in range(k)],
        }
        for i in range(n)
    ]


def scored(rows, reward, *, model="m", name="sft"):
    groups = [
        ScoredGroup(
            row["prompt"],
            tuple(
                ScoredResponse(reward(text, done) + 9 * i, 1, done, (text, done))
                for text, done in zip(row["responses"], row["finished"], strict=True)
            ),
        )
        for i, row in enumerate(rows)
    ]
    return ScoredFile(model, name, groups=tuple(groups))


def by_name(entry):
    return {price.feature: price for price in entry.prices}


def test_a_reward_that_is_one_feature():
    """Rewards are -3 a question mark for each hundred words: all of it, and of nothing else."""
    data = rows()
    (found,) = pays([scored(data, lambda t, _: -300 * t.count("?") / len(t.split()))], [data])
    assert found.explained == pytest.approx(1)
    for name, price in by_name(found).items():
        expected = -1.0 if name == "questions" else 0.0
        assert price.pays.value == pytest.approx(expected, abs=1e-8), name
        assert price.pays.high - price.pays.low < 1e-6
    assert {"digits", "list_lines", "prompt_used", "refusals"}.isdisjoint(by_name(found)), (
        "constant"
    )
    assert (found.prompts, found.responses, found.against) == (60, 180, None)


def test_two_features_by_least_squares_with_a_constant_for_every_prompt():
    data = rows()
    noise = random.Random(5)
    file = scored(data, lambda t, done: 0.5 * len(t.split()) - 2.0 * done + noise.gauss(0, 1))
    (found,) = pays([file], [data])
    texts = [(t, d) for row in data for t, d in zip(row["responses"], row["finished"], strict=True)]
    words = [t.split() for t, _ in texts]
    columns = {
        "length": [len(w) for w in words],
        "unfinished": [not d for _, d in texts],
    }
    rewards = np.array([r.reward for g in file.groups for r in g.responses])
    prompts = np.repeat(range(60), 3)
    few = prices(
        {k: np.array(v, dtype=float) for k, v in columns.items()}, rewards, prompts, unit=1.0
    )
    whole = np.column_stack([*columns.values(), *(prompts == p for p in range(60))]).astype(float)
    expected = np.linalg.lstsq(whole, rewards, rcond=None)[0][:2]
    for price, slope in zip(few[0], expected, strict=True):
        assert price.pays.value / price.spread == pytest.approx(slope)
    assert by_name(found)["length"].pays.low > 0
    assert by_name(found)["unfinished"].pays.low > 0
    for entry in (by_name(found)["exclamations"], by_name(found)["hedges"]):
        assert entry.pays.low < 0 < entry.pays.high


def test_the_unit_is_the_file_s_own_spread_so_that_louder_is_no_change():
    data = rows()
    noise = random.Random(1)
    values = {t: len(t) + noise.gauss(0, 5) for row in data for t in row["responses"]}
    files = [
        scored(data, lambda t, _: values[t], model="before"),
        scored(data, lambda t, _: 70 * values[t] + 3, model="after"),
        scored(data, lambda t, _: -values[t], model="turned"),
    ]
    before, after, turned = pays(files, [data] * 3)
    assert (before.against, after.against, turned.against) == (None, "before", "before")
    for one, other, against in zip(before.prices, after.prices, turned.prices, strict=True):
        assert one.change is None
        assert other.pays.value == pytest.approx(one.pays.value)
        assert other.change.value == pytest.approx(0, abs=1e-9)
        assert against.change.value == pytest.approx(-2 * one.pays.value)


def test_models_that_read_other_rows_are_not_compared():
    data = rows()
    files = [
        scored(data, lambda t, _: len(t), model="a"),
        scored(data[5:], lambda t, _: len(t), model="b"),
    ]
    found = pays(files, [data, data[5:]])
    assert [entry.against for entry in found] == [None, None]
    assert all(price.change is None for entry in found for price in entry.prices)


def test_repeated_responses_count_once():
    data = rows()
    twice = [{k: v * 2 if isinstance(v, list) else v for k, v in row.items()} for row in data]

    def reward(text, done):
        return float(len(text)) - done

    (one,), (other,) = (pays([scored(d, reward)], [d]) for d in (data, twice))
    assert one == other


def test_pairs_chats_and_transcripts():
    rng = random.Random(2)
    data, pairs = [], []
    for i in range(60):
        question = [{"role": "user", "content": f"why number{i} ?"}]
        sides = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2)]
        chats = [[*question, {"role": "assistant", "content": side}] for side in sides]
        data.append({"chosen": chats[0], "rejected": chats[1]})
        pairs.append(ScoredPair(i, *(ScoredResponse(len(s.split()), 1) for s in sides)))
    (found,) = pays([ScoredFile("m", "labels", pairs=tuple(pairs))], [data])
    assert by_name(found)["length"].pays.value == pytest.approx(1)


@pytest.mark.parametrize("case", ["flat", "rounding", "single", "empty", "few"])
def test_nothing_to_say(case):
    data = rows(n=3 if case == "few" else 40)
    if case == "empty":
        data = [{**row, "responses": [""] * 3, "finished": [True] * 3} for row in data]
    if case == "single":
        data = [{**row, "responses": ["the same"] * 3, "finished": [True] * 3} for row in data]
    rewards = {"flat": lambda t, _: 0.1, "rounding": lambda t, _: 1e-9 * len(t)}
    file = scored(data, rewards.get(case, lambda t, _: float(len(t))))
    assert pays([file], [data]) == []
