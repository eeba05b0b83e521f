"""Labels that an arm buys: how many, which ones, and that random ones stay as they were."""

import random
from types import SimpleNamespace

import pytest
import torch

from shiftrm.cli import main
from shiftrm.core.acquisition import information_gain
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.laplace import PairTokens, fit_posterior
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.active_labels import informative_pairs
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.estimate import Sizes, disk_of
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.jobs import TrainReward
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.prepare import label_samples
from shiftrm.pipeline.run import read_recipe
from shiftrm.records import Record, Recorder, read_records
from shiftrm.report.results import Results
from tests.conftest import WORDS
from tests.demo.conftest import TINY

ACTIVE = "active_100: {reward: active_labels, labels: 100}"


def by_name(*words):
    return {stage.name: stage for stage in plan(read_recipe("gold_demo", list(words)))}


def test_random_labels_of_the_default_number_are_planned_as_before():
    words = ["methods=[fixed, fresh_labels]"]
    before = stage_keys(plan(read_recipe("gold_demo", words)), 0)
    found = stage_keys(plan(read_recipe("gold_demo", [*words, "world.label_pool=9"])), 0)
    assert found == before
    [settings] = by_name(*words)["methods/fresh_labels/round-2/labels"].settings.items()
    assert settings[0] == "files"


def test_an_arm_says_how_many_labels_it_buys():
    fifty = "fresh_50: {reward: fresh_labels, labels: 50}"
    found = by_name(f"methods={{fresh_labels: {{reward: fresh_labels}}, {fifty}}}")
    draws = found["data"].settings["draws"]
    assert draws["label_prompts-2"] == ["labels/2", 300]
    assert draws["label_prompts-2-50"] == ["labels/2", 50]
    prompts = {
        arm: job_of(found[f"methods/{arm}/round-2/samples"]).prompts.file
        for arm in ("fresh_labels", "fresh_50")
    }
    assert prompts == {
        "fresh_labels": "label_prompts-2.jsonl",
        "fresh_50": "label_prompts-2-50.jsonl",
    }


def test_active_labels_are_chosen_with_the_last_rounds_reward_model():
    found = by_name(f"methods={{{ACTIVE}}}")
    assert found["data"].settings["draws"]["label_prompts-1-400"] == ["labels/1", 400]
    first, second = (found[f"methods/active_100/round-{k}/labels"] for k in (1, 2))
    assert first.needs == ("methods/active_100/round-1/samples", "pairs", "reward_model")
    assert first.settings["choice"] == {
        "count": 100,
        "reward": {"stage": "reward_model", "file": "model"},
    }
    last = "methods/active_100/round-1/reward_model"
    assert second.settings["choice"]["reward"]["stage"] == last
    assert second.needs == (
        "methods/active_100/round-2/samples",
        "methods/active_100/round-1/labels",
        last,
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("methods={x: {reward: retrained, labels: 5}}", "methods.x.labels: 'retrained' buys no"),
        ("methods={x: {reward: fresh_labels, labels: 0}}", "methods.x.labels is 0; it must be at"),
        ("world.label_pool=0", "label_pool is 0; give a whole number of at least 1"),
    ],
)
def test_bad_numbers_are_one_line(word, message):
    with pytest.raises(UserError, match=message):
        read_recipe("gold_demo", [word])


def test_the_page_says_how_many_labels_an_arm_buys():
    methods = {
        "fresh_labels": {"reward": "fresh_labels"},
        "few": {"reward": "fresh_labels", "labels": 30},
        "active_labels": {"reward": "active_labels", "labels": 40},
    }
    records = [Record("evaluate", arm, 1, "kl", 1.0) for arm in methods]
    arms = Results(records, {"methods": methods, "world": {"labels": 200}}).arms
    assert arms["fresh_labels"].name == "Retrained with 200 fresh labels a round"
    assert arms["few"].name == "few (30 fresh labels)"
    assert arms["active_labels"].short == "40 active labels"


def test_the_chosen_pairs_are_those_of_most_information(tmp_path, reward_model, tokenizer):
    with torch.no_grad():
        reward_model.score.weight.mul_(20)
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rng = random.Random(0)

    def words(count):
        return "".join(f" {rng.choice(WORDS.split())}" for _ in range(count))

    pairs = [{"prompt": "the red cat", "chosen": words(3), "rejected": words(5)} for _ in range(30)]
    samples = [
        {"prompt": f"a{words(2)}", "responses": [words(k), words(6 - k)], "finished": [True, False]}
        for k in (1, 2, 3, 4)
        for _ in range(5)
    ]
    samples[3]["responses"] = [" the same", " the same"]
    samples[5]["responses"] = [" the", "  "]
    scorer = Scorer.from_pretrained(tmp_path)
    tokens = [
        PairTokens(*(tuple(scorer.encode(p["prompt"], p[side])) for side in ("chosen", "rejected")))
        for p in pairs
    ]
    root = fit_posterior(scorer, tokens, prior=1.0).root
    gains = []
    for row in samples:
        means = scorer([row["prompt"]] * 2, row["responses"], finished=row["finished"])
        states = [
            _state(scorer, scorer.encode(row["prompt"], text, finished=ended))
            for text, ended in zip(row["responses"], row["finished"], strict=True)
        ]
        variance = (root @ (states[0] - states[1])).pow(2).sum()[None]
        mean = torch.tensor([means[0] - means[1]], dtype=torch.float64)
        gains.append(float(information_gain(mean, variance)[0]))
    gains[3] = gains[5] = -1.0
    [best] = informative_pairs(str(tmp_path), pairs, samples, count=1)
    assert best == max(range(20), key=gains.__getitem__)
    several = informative_pairs(str(tmp_path), pairs, samples, count=6)
    assert len(several) == 6
    assert several == sorted(several)
    assert best in several
    everything = informative_pairs(str(tmp_path), pairs, samples, count=99)
    assert everything == [i for i in range(20) if i not in (3, 5)]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def reward(tmp_path, reward_model, tokenizer):
    reward_model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


PAIRS = [{"prompt": "the red cat", "chosen": " runs", "rejected": " sits the fish"}]
CHAT = [{"role": "user", "content": "the red cat"}]


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [{"prompt": "the", "responses": [" cat", " cat"]}] * 3,
        [{"prompt": "the", "responses": [" cat", " "]}] * 3,
        [{"prompt": CHAT, "responses": [said(" \n"), said("a fish")]}],
        [{"prompt": "the", "responses": [" cat", " dog" * 70]}],  # beyond the context of 64
    ],
)
def test_without_a_pair_to_label_none_is_chosen(samples, reward):
    assert informative_pairs(str(reward), PAIRS, samples, count=2) == []
    good = [{"prompt": CHAT, "responses": [said("runs"), said("a fish")]}]
    assert informative_pairs(str(reward), PAIRS, [*samples, *good], count=2) == [len(samples)]


def test_fewer_labels_are_bought_of_a_policy_that_collapsed(tmp_path, reward, caplog):
    prompt = "describe the garden :"
    samples = [{"prompt": prompt, "responses": ["a rose", "a rose"], "finished": [True, True]}] * 3
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    write_jsonl(tmp_path / "samples.jsonl", samples)
    files = {"samples": str(tmp_path / "samples.jsonl"), "role": "labels/1"}
    settings = {
        "choice": {"count": 2, "reward": str(reward)},
        "files": {"pairs": {**files, "after": [str(tmp_path / "pairs.jsonl")], "metric": "labels"}},
    }
    (tmp_path / "out").mkdir()
    stage = SimpleNamespace(settings=settings)
    recorder = Recorder(stage="labels", method="active", round=1, seed=0)
    label_samples(
        SimpleNamespace(
            stage=stage, root=tmp_path, out=tmp_path / "out", recorder=recorder,
            random_seed=lambda role: 0,
        )
    )  # fmt: skip
    assert read_jsonl(tmp_path / "out" / "pairs.jsonl") == PAIRS
    assert [(r.metric, r.value) for r in recorder.records] == [("labels", 0.0)]
    assert "pairs: 0 of 2 labels are bought" in caplog.text


def _state(scorer, ids):
    kept = []
    hook = scorer.model.score.register_forward_hook(lambda m, i, o: kept.append(i[0][0, -1]))
    with torch.no_grad():
        scorer.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return kept[0].double()


def test_several_models_take_as_many_steps_and_as_much_disk():
    words = ["methods=[retrained, ensemble_mean, warm]", "reward.settings.max_steps=10"]
    found = by_name(*words)
    sizes = Sizes(1000, 1000)
    kept = {}
    for arm in ("retrained", "ensemble_mean", "warm"):
        stage = found[f"methods/{arm}/round-1/reward_model"]
        assert isinstance(job_of(stage), TrainReward)
        kept[arm] = disk_of(stage, sizes, 10 if arm == "retrained" else 40)
    assert kept["ensemble_mean"].kept == 4 * kept["retrained"].kept
    assert kept["ensemble_mean"].checkpoints == kept["retrained"].checkpoints
    assert kept["warm"].kept == kept["retrained"].kept


def test_a_run_with_active_labels_and_an_ensemble(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arms = ["active: {reward: active_labels, labels: 5}"]
    arms += [f"{name}: {{reward: {name}}}" for name in ("ensemble_min", "laplace")]
    words = [*TINY, f"methods={{{', '.join(arms)}}}", "execution.workers=1"]
    assert main(["run", "gold_demo", *words, "--output", "run"]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    labels = read_records(run / "methods/active/round-1/labels/records.jsonl")
    assert [r.value for r in labels if r.metric == "labels"] == [5.0]
    pool = read_jsonl(run / "methods/active/round-1/samples/responses.jsonl")
    assert len(pool) == 20
    before = len(read_jsonl(run / "pairs/pairs.jsonl"))
    rows = read_jsonl(run / "methods/active/round-1/labels/pairs.jsonl")
    assert len(rows) == before + 5
    known = [{row["prompt"], *row["responses"]} for row in pool]
    for row in rows[before:]:
        assert {row["prompt"], row["chosen"], row["rejected"]} in known
    made = run / "methods/ensemble_min/round-1/reward_model/model"
    assert sorted(p.name for p in made.glob("member-*")) == [f"member-{k}" for k in range(4)]
    scorer = Scorer.from_pretrained(made)
    scored = read_jsonl(run / "methods/ensemble_min/round-1/evaluation/scored.jsonl")
    found = scorer(
        [scored[0]["prompt"]] * 2, scored[0]["responses"], finished=scored[0]["finished"]
    )
    assert found == pytest.approx(scored[0]["rewards"], abs=1e-4)
    page = (run / "report.html").read_text()
    assert "5 active labels" in page
    assert "Ensemble of 4, minimum" in page
