"""The study of OODPL: its worlds, loops and tables by hand, and the signed world's gradients."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from oodpl_study import data, guiding, learning, plan, report, worlds
from plain_training import Schedule, train
from shiftrm.core.hypergradient import hypergradient
from shiftrm.core.inner_loop import InnerProblem
from shiftrm.core.losses import bradley_terry_loss, reward_weights
from shiftrm.errors import UserError
from shiftrm.models.rewards import sequence_rewards
from shiftrm.oodpl.batches import Encoder
from shiftrm.world.build_domains import DomainWorldConfig
from shiftrm.world.domain_gold import HELD_OUT, SOURCES
from tests.docs.test_build import ROOT

SMALL = DomainWorldConfig(support=256, pairs=256, eval_pairs=8, sft_examples=20)


@pytest.fixture(scope="module")
def start():
    """A signed world whose reference policy is not trained."""
    from transformers import LlamaForCausalLM

    model, world = SMALL.model(), worlds.WORLDS["signed"]
    tokenizer = data.tokenizer_of(world, model)
    torch.manual_seed(0)
    policy = LlamaForCausalLM(data.base_model_config(model, tokenizer)).eval()
    words = data.Words(tokenizer, world)
    domains = {name: world.domain(name, SMALL) for name in (*SOURCES, *HELD_OUT)}
    encoded = {name: data.encode(domain, words) for name, domain in domains.items()}
    return data.Start(world, 0, tokenizer, domains, encoded, policy)


def hand(text):
    return worlds.HANDS.index(" " + text.split()[0])


def test_words_are_read_as_the_encoder_reads_them(start):
    name = SOURCES[0]
    theirs = Encoder(start.tokenizer).domain(start.domains[name], query=True, eval_pairs=True)
    assert start.encoded[name] == theirs
    tastes = worlds.WORLDS["tastes"]
    domain = tastes.domain(name, SMALL)  # some responses are cut off
    tokenizer = data.tokenizer_of(tastes, SMALL.model())
    ours = data.encode(domain, data.Words(tokenizer, tastes))
    assert ours == Encoder(tokenizer).domain(domain, query=True, eval_pairs=True)


def test_models_of_the_signed_world_cannot_tell_its_domains(start):
    one, other = (start.domains[name].support[0]["prompt"].split()[2] for name in SOURCES[:2])
    assert (one, other) == SOURCES[:2]  # the texts can, and so can the gold reward
    read = start.tokenizer
    texts = [f"review the {name} with roses and soil :" for name in (*SOURCES, *HELD_OUT)]
    assert len({tuple(read(text).input_ids) for text in texts}) == 1
    assert read.decode(read(texts[3]).input_ids, skip_special_tokens=True).split()[2] == "garden"
    named = data.tokenizer_of(worlds.WORLDS["named"], SMALL.model())
    assert len({tuple(named(text).input_ids) for text in texts}) == len(texts)
    # All domains ask for the same things, in texts that the policy has learnt from.
    assert {" ".join(p.split()[3:]) for p in start.domains[HELD_OUT[0]].prompts} == {
        " ".join(p.split()[3:]) for p in start.domains[SOURCES[0]].prompts
    }
    rows = start.world.sft(SMALL)
    assert {row["prompt"].split()[2] for row in rows} == {row["domain"] for row in rows}
    assert len({row["domain"] for row in rows}) > 5


def test_splits_of_the_worlds():
    for world in worlds.WORLDS.values():
        assert (*world.sources, *world.watched) == SOURCES
    signed = worlds.WORLDS["signed"]
    for names in (signed.sources, signed.watched, HELD_OUT):
        signs = [np.sign(worlds.SIGNED_TABLE[name]["placed_praise"]) for name in names]
        assert sum(signs) == 0


def test_the_hand_tells_taste_in_fine_tuning_data_and_nothing_in_pairs(start):
    for name in (SOURCES[0], SOURCES[1]):
        domain, gold = start.domains[name], start.world.gold(name)
        values = [[], []]
        for row in domain.support:
            values[hand(row["response"])].append(gold(row["prompt"], row["response"]))
        assert np.mean(values[0]) > np.mean(values[1]) + 1
        assert all(hand(row["chosen"]) == hand(row["rejected"]) for row in domain.query)
    # The pool's preferences cancel: turned tastes give the opposite gold of the same text.
    one, other = (start.world.gold(name) for name in SOURCES[:2])
    text = start.domains[SOURCES[0]].support[0]["response"]
    assert one("", " lovely maybe boring") == -other("", " lovely maybe boring")
    assert one("", text.split(" ", 2)[2]) == pytest.approx(one("", text.removeprefix(" ")))


def test_a_pair_gives_no_gradient_along_the_hand():
    """Bradley-Terry of a reward linear in (taste, hand): the hand cancels in every pair."""
    taste_B2, hand_B = torch.randn(64, 2), torch.randint(0, 2, (64,)) * 2.0 - 1
    phi = torch.tensor([0.3, 0.7], requires_grad=True)
    rewards = phi[0] * taste_B2 + phi[1] * hand_B[:, None]
    bradley_terry_loss(*rewards.unbind(1)).mean().backward()
    assert phi.grad[0].abs() > 1e-3
    assert phi.grad[1].abs() < 1e-7


def linear_domain(sign, rng):
    """Support features (taste, hand), and pair differences in which the hand cancels."""
    hand_N = rng.integers(0, 2, 400) * 2.0 - 1
    taste_N = 0.8 * sign * hand_N + rng.normal(size=400)
    support = torch.tensor(np.stack([taste_N, hand_N], axis=1))
    taste_M = sign * np.abs(rng.normal(size=300))
    return support - support.mean(0), torch.tensor(np.stack([taste_M, 0 * taste_M], axis=1))


@pytest.mark.parametrize("signs", [(1.0, -1.0), (1.0, 1.0)])
def test_the_first_steps_of_both_trainings_in_a_linear_world(signs):
    """E_d[G_d] for pooled Bradley-Terry and (alpha / beta) E_d[C_d G_d] for the hypergradient."""
    alpha, beta, rng = 1e-4, 2.0, np.random.default_rng(0)
    domains = [linear_domain(sign, rng) for sign in signs]
    phi = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    outer, pooled = [], []
    for support, pairs in domains:
        weights = reward_weights(support @ phi, beta=beta, normalize=True)
        theta = alpha * (weights[:, None] * support).mean(0)  # one step from 0 on -w theta.f
        outer.append(torch.nn.functional.softplus(-pairs @ theta).mean())
        pooled.append(torch.nn.functional.softplus(-pairs @ phi).mean())
    found, plain = (-torch.autograd.grad(sum(x) / 2, phi)[0] for x in (outer, pooled))
    slopes = [pairs.mean(0) / 2 for _, pairs in domains]  # sigmoid(0) = 1/2
    spreads = [support.T @ support / len(support) for support, _ in domains]
    expected = alpha / beta * sum(C @ G for C, G in zip(spreads, slopes, strict=True)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(plain, sum(slopes) / 2, rtol=1e-6, atol=1e-12)
    assert plain[1] == 0  # no pair shows the hand
    if signs[0] != signs[1]:
        assert abs(plain[0]) < 0.05
        assert found[1] > 5 * abs(found[0])  # the hand is found, the taste cancels


def test_the_hypergradient_rewards_the_hand_in_domains_of_either_taste(start):
    meta = replace(learning.Meta(), support=128, tasks=1)
    query = start.encoded[SOURCES[0]].query
    model = data.fresh_reward_model(start)
    for name in SOURCES[:2]:  # they like the opposite of each other
        domain = start.encoded[name]
        batch, rows = learning.task_plan(start, meta).support_of(domain, role="test")
        pairs = learning.outer_batch(domain.query, policy_pad_id=start.pad)
        problem = InnerProblem(start.policy(), model, batch, sequence_rewards)
        found = hypergradient(problem, pairs, meta.inner())
        hands = [hand(start.domains[name].support[i]["response"]) for _, i in rows[0]]
        signs = torch.tensor([1.0 - 2 * h for h in hands])
        # Descent raises the reward of the first hand, which writes what this domain likes.
        assert float((found.reward_gradients[0] * signs).mean()) < 0
    assert len(query) == 256


def test_a_regression_takes_every_row_and_its_own_source(start, monkeypatch):
    """The scores are stubs: the first hand 1, the other -1, the sign of the source left out."""
    asked = []

    def scores(_, domain):
        asked.append(domain.name)
        hands = [hand(row["response"]) for row in start.domains[domain.name].support]
        return torch.tensor([1.0 - 2 * h for h in hands])

    monkeypatch.setattr(learning, "source_scores", scores)
    monkeypatch.setattr(learning, "REWARD", Schedule(25, 2e-3))
    rewards = data.text_rewards(learning.regressed(start), start)
    assert asked == list(start.world.sources)
    rows = start.domains[HELD_OUT[0]].support[:64]
    found = guiding.support_rewards(rewards, rows)
    first = [r for r, row in zip(found, rows, strict=True) if hand(row["response"]) == 0]
    second = [r for r, row in zip(found, rows, strict=True) if hand(row["response"]) == 1]
    assert min(first) > max(second)


def test_a_sources_own_model_knows_its_taste(start, monkeypatch):
    monkeypatch.setattr(learning, "OWN_STEPS", 12)
    domain = start.encoded[SOURCES[1]]
    scores = learning.source_scores(start, domain)
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.std() == pytest.approx(1, abs=1e-5)
    gold = [
        start.world.gold(domain.name)(row["prompt"], row["response"])
        for row in start.domains[domain.name].support
    ]
    assert np.corrcoef(scores, gold)[0, 1] > 0.2


def test_early_stopping_keeps_the_best_step():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    seen = []

    def watch():
        seen.append(model.weight.item())
        return abs(model.weight.item() - 0.2)

    schedule = Schedule(40, 0.05, every=2)
    found = train(model, lambda _: (model.weight - 1).square().sum(), schedule, watch=watch)
    assert len(seen) == 21
    best = min(seen, key=lambda w: abs(w - 0.2))
    assert model.weight.item() == best != seen[-1]
    assert found.losses[found.best] == abs(best - 0.2)


def test_pairs_of_a_step(start):
    domains = start.of(start.world.sources)
    balanced = learning.draw_pairs(domains, "x", balanced=True)
    drawn = balanced(3)
    assert drawn == balanced(3) != balanced(4)
    counts = np.bincount([k for k, _ in drawn])
    assert counts.sum() == learning.PAIRS
    assert counts.max() - counts.min() <= 1
    assert len(set(learning.draw_pairs(domains, "x", balanced=False)(0))) == learning.PAIRS


def first_loss(monkeypatch, call):
    """The loss of a training's first step, and the model with its gradient."""
    made = []

    def one(model, loss, *_, **__):
        value = loss(0)
        value.backward()
        made.append((value.item(), model))

    with monkeypatch.context() as patch:
        patch.setattr(learning, "train", one)
        call()
    return made[0]


@torch.no_grad()
def log_likelihood(policy, tokens):
    """The sum over a response's tokens, and their number."""
    logs = policy(torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
    places = range(tokens.start, len(tokens.ids))
    return sum(float(logs[t - 1, tokens.ids[t]]) for t in places), len(places)


def test_first_steps_of_the_baselines(start, monkeypatch):
    balanced, plain = first_loss(monkeypatch, lambda: learning.bradley_terry(start, balanced=True))
    robust, dro = first_loss(monkeypatch, lambda: learning.bradley_terry(start, dro=True))
    # All rewards are 0 and domains have as many pairs: the weights are still equal.
    assert balanced == pytest.approx(np.log(2)) == pytest.approx(robust)
    torch.testing.assert_close(dro.score.weight.grad, plain.score.weight.grad)
    on = copy.deepcopy(plain)
    torch.nn.init.ones_(on.score.weight)
    value, same = first_loss(monkeypatch, lambda: learning.bradley_terry(start, on=on))
    assert same is on
    assert value != pytest.approx(np.log(2))
    value, _ = first_loss(monkeypatch, lambda: learning.policy_on_pairs(start, "dpo"))
    assert value == pytest.approx(np.log(2), abs=1e-5)
    value, _ = first_loss(monkeypatch, lambda: learning.policy_on_pairs(start, "cpl"))
    domains = start.of(start.world.sources)
    draw = learning.draw_pairs(domains, f"pairs/{start.seed}", balanced=False)
    by_hand = []
    for pair in (domains[k].query[i] for k, i in draw(0)):
        (chosen, count), (rejected, _) = (log_likelihood(start.reference, side) for side in pair)
        by_hand.append(-chosen / count + 0.1 * np.log1p(np.exp(rejected - chosen)))
    assert value == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_meta_training_adds_the_hypergradient_and_the_pooled_loss(start):
    """One step's gradient is the mean over tasks plus 0.1 of Bradley-Terry on their pairs."""
    meta = replace(learning.Meta(), steps=1, support=8, bt=0.1)
    made = []
    original = learning.train
    try:
        learning.train = lambda model, loss, *_, **__: made.append((model, loss(0)))
        learning.meta_train(start, meta, stop=False)
    finally:
        learning.train = original
    model, _ = made[0]
    expected = copy.deepcopy(model)
    expected.zero_grad()
    sources = start.of(start.world.sources)
    for index in range(meta.tasks):
        task = learning.task_plan(start, meta).draw(sources, step=0, index=index)
        problem = InnerProblem(start.policy(), expected, task.inner_batches, sequence_rewards)
        found = hypergradient(problem, task.outer_batch, meta.inner())
        pairs = learning.reward_loss(expected, task.outer_batch).mean()
        own = torch.autograd.grad(pairs, list(expected.parameters()), allow_unused=True)
        for (name, p), g in zip(expected.named_parameters(), own, strict=True):
            part = found.gradients[name] / 2 + (0 if g is None else 0.05 * g)
            p.grad = part if p.grad is None else p.grad + part
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_measures_of_a_reward_model_by_hand():
    groups = [
        {"prompt": "p", "responses": ["a", "b", "c"], "finished": [True] * 3,
         "gold": [1.0, 2.0, 4.0]},
        {"prompt": "q", "responses": ["a", "b", "c"], "finished": [True] * 3,
         "gold": [0.0, 3.0, 6.0]},
    ]  # fmt: skip
    rewards = {("p", "a"): 3.0, ("p", "b"): 2.0, ("p", "c"): 1.0}

    def of(prompts, responses, *, finished):
        return [rewards.get(key, 0.0) for key in zip(prompts, responses, strict=True)]

    found = guiding.of_reward_model(guiding.Targets((), groups, []), of)
    assert found == {"rank": pytest.approx(-0.5), "best_of": pytest.approx((1.0 + 3.0) / 2)}


def test_rows_are_made_once(tmp_path, monkeypatch):
    results, made = tmp_path / "results.jsonl", []
    monkeypatch.setattr(plan, "Seed", lambda *_: None)
    monkeypatch.setitem(
        plan.KINDS, "arms", (lambda _, name: made.append(name) or {"gold": 1 / 3}, ("a", "b"))
    )
    call = {"folder": tmp_path, "results": results}
    assert len(list(plan.make_rows("arms", "tastes", [0], ["a"], **call))) == 1
    assert len(list(plan.make_rows("arms", "tastes", range(2), [], **call))) == 3
    assert made == ["a", "b", "a", "b"]
    assert [r["gold"] for r in plan.read_results(results)] == [0.3333] * 4
    assert not list(plan.make_rows("arms", "tastes", [0], [], **call))
    late = list(plan.make_rows("arms", "signed", [0], ["a"], until=0.0, **call))
    assert late == ["arms signed 0 a: left out"]
    with pytest.raises(UserError, match="unknown name 'c'"):
        list(plan.make_rows("arms", "tastes", [0], ["c"], **call))


def test_differences_by_hand():
    rows = [
        {"kind": "arms", "world": "tastes", "seed": seed, "name": name, "best_of": value}
        for name, values in (("pooled", (1.0, 2.0)), ("oodpl", (1.5, 3.5)))
        for seed, value in enumerate(values)
    ]
    # Differences 0.5 and 1.5: mean 1, half an interval 12.706 * sqrt(1/2) / sqrt(2).
    assert "+1.00 (-5.35 to +7.35) | 2 of 2" in report.differences_table(rows)
    assert "| pooled BT | " in report.arms_table(rows)
    assert report.running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_every_setting_of_the_sweep_is_another():
    assert len({repr(meta) for meta in plan.SWEEP.values()}) == len(plan.SWEEP)
    assert {arm for pair in report.COMPARED for arm in pair} <= set(plan.ARMS)
    assert json.dumps(list(plan.SWEEP))


def test_seeds_and_norms_by_hand():
    rows = [
        {"name": "pooled", "seed": 3, "best_of": 1.0, "weighted_gold": 0.256},
        {"name": "oodpl", "seed": 3, "best_of": 2.0},
        {"name": "pooled", "seed": 1, "best_of": -0.5},
    ]
    assert report.seeds_table(rows).splitlines() == [
        "| method | way of guiding | 1 | 3 |",
        "| --- | --- | --- | --- |",
        "| pooled BT | best of 16 | -0.50 | 1.00 |",
        "| pooled BT | weighted fine-tuning |  | 0.26 |",
        "| OODPL | best of 16 |  | 2.00 |",
    ]
    norms = [
        {"name": "beta 4", "norm": [0.1] * 10 + [0.2] * 10},
        {"name": "beta 0.5", "norm": [0.8] * 20},
        {"name": "beta 4", "norm": [0.3] * 10 + [0.2] * 10},
    ]
    assert report.norms_table(norms).splitlines()[2:] == [
        "| 0.5 | 0.800 | 0.800 | 0.400 |",
        "| 4 | 0.200 | 0.200 | 0.800 |",
    ]


def test_the_page_says_what_the_results_say():
    """The page's tables are made from the rows that lie beside the study."""
    rows = plan.read_results(ROOT / "benchmarks" / "oodpl_study" / "results.jsonl")
    page = (ROOT / "docs" / "oodpl.md").read_text(encoding="utf-8")
    for name, text in report.blocks(rows).items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in page
