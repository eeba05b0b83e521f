"""What a round's reward model pays for, and what it pays too much for."""

from collections.abc import Mapping, Sequence

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.core.within import spread_within
from shiftrm.files import Row
from shiftrm.measure.diagnosis.findings import prompt_key
from shiftrm.measure.diagnosis.pays import prices
from shiftrm.measure.diagnosis.scored import NOISE
from shiftrm.measure.features import measure_all
from shiftrm.models.responses import Response, group_responses
from shiftrm.records import Recorder
from shiftrm.world.world import World, gold_world

Rewards = Sequence[Sequence[float]]


def record_pays(
    recorder: Recorder,
    rows: Mapping[str, Sequence[Row]],
    rewards: Mapping[str, Rewards],
    golds: Mapping[str, Rewards] | None,
    gold: str | None,
) -> None:
    """Record what one standard deviation more of each feature is worth on the responses "after".

    Rewards are in standard deviations of the same model's rewards on the SFT responses, so that a
    feature has the same price in every round unless the model changes; features are in standard
    deviations of the responses "after". All are within prompts.

    `pays_<feature>` is the reward model's price, `overpays_<feature>` that less gold's, with its
    95 % interval in `overpays_low_<feature>` and `overpays_high_<feature>`. Nothing is recorded
    where rewards or features do not vary enough (`core.within.fit_within`).

    Args:
        rows: responses "sft" and "after".
        rewards, golds: of the same responses, by the reward model and by gold.
        gold: name of gold. The features are a gold world's own terms, otherwise those of the text.
    """
    prompts = {name: _prompts(found) for name, found in rows.items()}
    flat = {name: _flat(found) for name, found in rewards.items()}
    unit = spread_within(flat["sft"], prompts["sft"])
    if unit <= NOISE:
        return
    against = None
    if golds is not None:
        theirs = {name: _flat(found) for name, found in golds.items()}
        gold_unit = spread_within(theirs["sft"], prompts["sft"])
        against = (theirs["after"], gold_unit) if gold_unit > NOISE else None
    responses = [response for row in rows["after"] for response in group_responses(row)]
    world = None if gold is None else gold_world(gold)
    features = measure_all(responses) if world is None else _terms(world, responses)
    found = prices(features, flat["after"], prompts["after"], unit=unit, against=against)
    if found is None:
        return
    priced, (explained, _, n) = found
    recorder.add("pays_explained", explained, n=n)
    for price in priced:
        recorder.add(f"pays_{price.feature}", price.pays.value, n=n)
        if price.change is not None:
            recorder.add(f"overpays_{price.feature}", price.change.value, n=n)
            recorder.add(f"overpays_low_{price.feature}", price.change.low, n=n)
            recorder.add(f"overpays_high_{price.feature}", price.change.high, n=n)


def _prompts(rows: Sequence[Row]) -> list[str]:
    """Return the prompt of every response."""
    return [key for row in rows for key in [prompt_key(row)] * len(row["responses"])]


def _flat(rewards: Rewards) -> Floats:
    return np.array([value for found in rewards for value in found], dtype=np.float64)


def _terms(world: World, responses: Sequence[Response]) -> dict[str, Floats]:
    """Return the terms of a world's gold reward, without their weights."""
    counts = [world.tally(r.prompt, r.text, finished=r.finished) for r in responses]
    return {
        feature.name: np.array([feature.measure(one) for one in counts], dtype=np.float64)
        for feature in world.features
    }
