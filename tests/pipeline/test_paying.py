"""What a round's reward model pays for, against rewards that are known sums of gold's terms."""

import random

import numpy as np
import pytest

from shiftrm.pipeline.paying import record_pays
from shiftrm.records import Recorder
from shiftrm.world.gold import FEATURES, explain, gold_reward
from shiftrm.world.registered.adverts import WORLD as ADVERTS
from shiftrm.world.world import WORLDS


def responses(seed, *, world=None, n=150):
    rng = random.Random(seed)
    world = WORLDS.get("topics") if world is None else world
    prompts = [world.draw_prompt(rng) for _ in range(n)]
    return [
        {
            "prompt": prompt,
            "responses": [world.demonstration(rng, prompt, rng.random()) for _ in range(3)],
            "finished": [rng.random() < 0.9 for _ in range(3)],
        }
        for prompt in prompts
    ]


def of(rows, reward):
    return [
        [
            reward(row["prompt"], text, finished=done)
            for text, done in zip(row["responses"], row["finished"], strict=True)
        ]
        for row in rows
    ]


def recorded(reward, *, gold="gold", truth=gold_reward, after=1):
    rows = {"sft": responses(0), "after": responses(after)}
    recorder = Recorder(stage="evaluate", method="m", round=1, seed=0)
    rewards = {name: of(found, reward) for name, found in rows.items()}
    golds = {name: of(found, truth) for name, found in rows.items()} if truth else None
    record_pays(recorder, rows, rewards, golds, gold)
    return {record.metric: record.value for record in recorder.records}


def test_gold_itself_overpays_nothing():
    found = recorded(lambda *row, finished: 5 + 3 * gold_reward(*row, finished=finished))
    over = {name: value for name, value in found.items() if name.startswith("overpays_")}
    assert len(over) == 3 * len(FEATURES)
    assert all(value == pytest.approx(0, abs=1e-6) for value in over.values())
    assert found["pays_topical"] > 0.2
    assert found["pays_off_topic"] < -0.1
    assert 0.9 < found["pays_explained"] <= 1, "weights differ a little between prompts"


def test_a_model_that_does_not_look_at_the_prompt_and_likes_repetition():
    def blind(prompt, text, *, finished):
        terms = explain(prompt, text, finished=finished)
        return sum(terms.values()) - terms["off_topic"] - 2 * terms["repeated_words"]

    found = recorded(blind)
    for feature in ("off_topic", "repeated_words"):
        assert found[f"overpays_low_{feature}"] > 0
        low, mid, high = (found[f"overpays_{end}{feature}"] for end in ("low_", "", "high_"))
        assert low < mid < high
    assert abs(found["pays_off_topic"]) < 0.05
    assert found["pays_repeated_words"] > 0.05


def test_prices_are_in_spreads_of_the_sft_responses():
    """A reward of 2 for each topical word, by plain least squares with a constant a prompt."""
    rows = {"sft": responses(0), "after": responses(1)}

    def topical(prompt, text, *, finished):
        return 2.0 * (explain(prompt, text)["topical"] != 0) * len(set(text.split()))

    found = recorded(topical, truth=None)
    assert not any(name.startswith("overpays") for name in found)

    def centred(values):
        return np.concatenate([np.array(v) - np.mean(v, axis=0) for v in values])

    def by_prompt(name):
        groups = {}
        for row, values in zip(rows[name], of(rows[name], topical), strict=True):
            groups.setdefault(row["prompt"], []).extend(values)
        return list(groups.values())

    sft = by_prompt("sft")
    unit = np.sqrt((centred(sft) ** 2).sum() / (sum(map(len, sft)) - len(sft)))
    tally = WORLDS.get("topics").tally
    groups = {}
    for row in rows["after"]:
        for text, done in zip(row["responses"], row["finished"], strict=True):
            counts = tally(row["prompt"], text, finished=done)
            groups.setdefault(row["prompt"], []).append([f.measure(counts) for f in FEATURES])
    x = centred(list(groups.values()))
    deviation = np.sqrt((x**2).sum(axis=0) / (len(x) - len(groups)))
    slopes = np.linalg.lstsq(x, centred(by_prompt("after")) / unit, rcond=None)[0]
    for feature, slope, spread in zip(FEATURES, slopes, deviation, strict=True):
        assert found[f"pays_{feature.name}"] == pytest.approx(slope * spread, abs=1e-6)


def test_another_world_has_its_own_terms():
    rows = {"sft": responses(0, world=ADVERTS), "after": responses(1, world=ADVERTS)}
    recorder = Recorder(stage="evaluate", method="m", round=1, seed=0)
    rewards = {name: of(found, ADVERTS.gold_reward) for name, found in rows.items()}
    record_pays(recorder, rows, rewards, rewards, "gold:adverts")
    names = {record.metric for record in recorder.records}
    assert {f"pays_{f.name}" for f in ADVERTS.features if f.name != "unfinished"} <= names


@pytest.mark.parametrize("gold", [None, "folder/of/a/judge"])
def test_elsewhere_the_features_are_those_of_the_text(gold):
    def words(prompt, text, *, finished):
        return float(len(text.split()))

    found = recorded(words, gold=gold, truth=gold and words)
    assert found["pays_length"] == pytest.approx(1, rel=0.2), "the responses are much like SFT's"
    assert found["pays_explained"] == pytest.approx(1)
    assert ("overpays_length" in found) == (gold is not None)


def test_nothing_is_recorded_where_nothing_varies():
    assert recorded(lambda *row, finished: 1.0) == {}
    rows = {"sft": responses(0), "after": []}
    recorder = Recorder(stage="evaluate", method="m", round=1, seed=0)
    record_pays(recorder, rows, {"sft": of(rows["sft"], gold_reward), "after": []}, None, None)
    assert recorder.records == []
