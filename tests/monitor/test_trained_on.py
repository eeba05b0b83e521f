"""Signals from the reward model's training pairs, against brute force."""

import json

import numpy as np
import pytest
import torch

from shiftrm.core.ensembles import KINDS
from shiftrm.errors import UserError
from shiftrm.models.combined import Ensemble, EnsembleScorer, Member
from shiftrm.models.responses import Response
from shiftrm.models.rewards import score_head
from shiftrm.models.scoring import Scorer
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import Step, measure_step
from shiftrm.monitor.trained_on import MOST, PRIOR, RIDGE, TrainingStates

NAMES = ["distance", "expected_errors"]


@pytest.fixture
def scorer(reward_model, tokenizer):
    return Scorer(reward_model, tokenizer)


def last_states(scorer, texts):
    """States at the end of each text, one row at a time, by transformers alone."""
    found = []
    for prompt, response, finished in texts:
        ids = torch.tensor([scorer.encode(prompt, response, finished=finished)])
        with torch.no_grad():
            out = scorer.model.model(input_ids=ids)
        found.append(out.last_hidden_state[0, -1].double().numpy())
    return np.array(found)


def sides_of(pairs):
    return [(pair["prompt"], pair[side], True) for pair in pairs for side in ("chosen", "rejected")]


def test_mahalanobis_distance(scorer, pairs, groups):
    known = TrainingStates(scorer, pairs)
    trained = last_states(scorer, sides_of(pairs))
    covariance = np.cov(trained.T)
    inverse = np.linalg.inv(covariance + RIDGE * np.trace(covariance) / 32 * np.eye(32))

    def brute(states):
        away = states - trained.mean(0)
        return np.sqrt(np.einsum("nh,hk,nk->n", away, inverse, away))

    usual = brute(trained).mean()
    texts = [(g["prompt"], r, True) for g in groups for r in g["responses"]]
    states = last_states(scorer, texts)
    found = known.distances(known.states([Response(*text) for text in texts]))
    assert found == pytest.approx(brute(states) / usual, rel=1e-4)
    again = known.states([Response(*text) for text in sides_of(pairs)])
    assert known.distances(again).mean() == pytest.approx(1.0, rel=1e-4)
    (signals,) = [measured(known, groups)]
    ends = np.cumsum([len(g["responses"]) for g in groups])
    by_group = np.split(brute(states) / usual, ends[:-1])
    assert signals["distance"] == pytest.approx(np.mean([d.mean() for d in by_group]), rel=1e-4)


def test_expected_errors_are_those_of_drawn_heads(scorer, pairs, groups):
    """Heads drawn from the posterior, whose precision is written out, order pairs otherwise."""
    known = TrainingStates(scorer, pairs)
    head = score_head(scorer.model).weight[0].detach().double().numpy()
    chosen, rejected = np.split(last_states(scorer, sides_of(pairs)).reshape(-1, 2, 32), 2, axis=1)
    d = (chosen - rejected)[:, 0]
    p = 1 / (1 + np.exp(-d @ head))
    precision = (d * (p * (1 - p))[:, None]).T @ d + PRIOR * np.eye(32)
    heads = np.random.default_rng(0).multivariate_normal(head, np.linalg.inv(precision), 40_000)
    states = last_states(scorer, [("a red dog", r, True) for r in groups[1]["responses"]])
    i, j = np.triu_indices(len(states), k=1)
    gaps = (states[i] - states[j]) @ head
    drawn = (states[i] - states[j]) @ heads.T
    expected = (np.sign(drawn) != np.sign(gaps)[:, None]).mean(1)
    found = known.error_probabilities(torch.as_tensor(states), i, j)
    assert found == pytest.approx(expected, abs=0.01)
    assert 0.1 < found.mean() < 0.5  # 12 pairs say little
    assert measured(known, groups[1:2])["expected_errors"] == pytest.approx(found.mean(), abs=1e-5)


def measured(known, groups):
    rows = [
        {"finished": [True] * len(g["responses"]), "rewards": [0.0] * len(g["responses"]), **g}
        for g in groups
    ]
    return measure_step(Step(1, rows, lambda *_, **__: [], trained_on=known), NAMES)


def test_equal_texts_are_no_pair(scorer, pairs):
    group = {"prompt": "a red dog", "responses": [" runs", " runs"]}
    assert set(measured(TrainingStates(scorer, pairs), [group])) == {"distance"}
    assert measured(None, [group]) == {}


def test_chat_messages_and_sampled_tokens(scorer, pairs):
    prompt = [{"role": "user", "content": "a red dog"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("runs", "sits the")]
    group = {"prompt": prompt, "responses": answers}
    assert set(measured(TrainingStates(scorer, pairs), [group])) == set(NAMES)


def test_many_pairs_are_drawn_from(scorer, pairs, monkeypatch):
    monkeypatch.setattr("shiftrm.monitor.trained_on.MOST", 5)
    few = [TrainingStates(scorer, pairs, seed=seed)._mean_H for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    assert MOST > 1000


def test_what_has_no_states(scorer, pairs, tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        TrainingStates(scorer, [])
    ensemble = Ensemble(KINDS[0], (Member("a", 0.0, 1.0), Member("b", 0.0, 1.0)))
    with pytest.raises(UserError, match="ensemble; give one member"):
        TrainingStates(EnsembleScorer([scorer, scorer], ensemble, "e"), pairs)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(UserError):
        TrainingStates.from_pretrained(tmp_path, tmp_path / "pairs.jsonl")


def test_in_a_run(scorer, reward_model, tokenizer, pairs, tmp_path):
    """From folders; after a change of the model its old pairs say nothing more."""
    for thing in (reward_model, tokenizer):
        thing.save_pretrained(tmp_path / "model")
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(text)
    known = TrainingStates.from_pretrained(tmp_path / "model", tmp_path / "pairs.jsonl")
    monitor = DriftMonitor(
        scorer, tmp_path / "m", MonitorConfig(budget=0, sight_pairs=4), trained_on=known
    )
    prompts, texts = ["a red dog"] * 2 + ["the cat"] * 2, [" runs", " sits the", " flies", " swims"]
    rows = [
        {"prompt": p, "responses": texts[k : k + 2], "finished": [True] * 2, "rewards": [0.0, 1.0]}
        for k, p in ((0, "a red dog"), (2, "the cat"))
    ]
    assert set(NAMES) <= set(monitor.see(rows))
    assert monitor(prompts, texts) == scorer(prompts, texts)
    monitor.model_changed(scorer)
    assert not set(NAMES) & set(monitor.see(rows))
    monitor.model_changed(trained_on=known)
    assert set(NAMES) <= set(monitor.see(rows))
    assert monitor.errors == 0
