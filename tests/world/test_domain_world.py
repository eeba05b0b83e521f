"""The domains' files: drawn as said, without leaks, and of the kind that the method is for."""

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shiftrm.data.domains import Domain, check_leaks, load_split
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.world.build_domains import (
    DomainWorldConfig,
    build_domain,
    draft,
    read_table,
    split_prompts,
    write_domain_world,
)
from shiftrm.world.domain_gold import HELD_OUT, SOURCES, TABLE, TASTES, flipped, gold, measure
from shiftrm.world.language import CONTENT, TOPICS, build_tokenizer

SMALL = DomainWorldConfig(seed=3, support=40, pairs=30, eval_pairs=20, sft_examples=200)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_domain_world(tmp_path_factory.mktemp("domains") / "world", SMALL)


@pytest.fixture(scope="module")
def domains() -> dict[str, Domain]:
    """Of the default size."""
    return {name: build_domain(name, DomainWorldConfig()) for name in TOPICS}


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_files_load_as_domains_and_the_model_loads(world):
    split = load_split(world / "domains", support_batch=40, query_batch=30)
    assert tuple(d.name for d in split.source) == SOURCES
    assert tuple(d.name for d in split.held_out) == HELD_OUT
    for domain in split.all:
        assert domain == build_domain(domain.name, SMALL)
        sizes = [len(domain.support), len(domain.query), len(domain.eval_pairs)]
        assert sizes == [40, 30, 20]
        assert len(domain.prompts) == 30
        assert set(domain.support[0]) == {"prompt", "response", "finished"}
    assert read_table(world) == TABLE
    rows = read_jsonl(world / "sft.jsonl", required=("prompt", "completion", "domain"))
    assert len(rows) == 200
    assert {row["domain"] for row in rows} == set(TOPICS)
    tokenizer = AutoTokenizer.from_pretrained(world / "base_model")
    model = AutoModelForCausalLM.from_pretrained(world / "base_model")
    assert model.config.vocab_size == len(tokenizer)


def test_the_same_configuration_gives_the_same_bytes(world, tmp_path):
    random.seed(5)
    state = random.getstate()
    assert _files(write_domain_world(tmp_path / "again", SMALL)) == _files(world)
    assert random.getstate() == state
    with pytest.raises(UserError, match="base_model: already exists"):
        write_domain_world(world, SMALL)


def test_a_domain_depends_on_seed_and_name_and_sizes_do_not_mix():
    garden = build_domain("garden", SMALL)
    other = build_domain("garden", replace(SMALL, seed=4))
    assert (garden.support, garden.query, garden.eval_pairs) != (
        other.support,
        other.query,
        other.eval_pairs,
    )
    fewer = build_domain("garden", replace(SMALL, support=10, sft_examples=1))
    assert fewer.support == garden.support[:10]
    assert fewer.query == garden.query
    assert fewer.eval_pairs == garden.eval_pairs
    # Other tastes: the same drafts, other labels and another choice of what is kept.
    taste = build_domain("garden", replace(SMALL, table_seed=0))
    assert taste.query != garden.query
    assert {frozenset((r["chosen"], r["rejected"])) for r in taste.query} == {
        frozenset((r["chosen"], r["rejected"])) for r in garden.query
    }


def test_evaluation_asks_for_what_training_never_asked_for(domains):
    for domain in domains.values():
        train, evaluation = split_prompts(domain.name, seed=0)
        assert (len(train), len(evaluation)) == (60, 30)
        asked = [
            {frozenset(set(prompt.split()) & set(CONTENT[domain.name])) for prompt in prompts}
            for prompts in (train, evaluation)
        ]
        assert (len(asked[0]), len(asked[1])) == (10, 5)
        assert not asked[0] & asked[1]
        assert {r["prompt"] for r in (*domain.support, *domain.query)} <= set(train)
        assert {r["prompt"] for r in domain.eval_pairs} <= set(evaluation)
        assert list(domain.prompts) == evaluation


def test_no_word_of_a_held_out_domain_stands_in_a_source(domains, world):
    held_out = {word for name in HELD_OUT for word in (name, *CONTENT[name])}
    for name in SOURCES:
        rows = (*domains[name].support, *domains[name].query, *domains[name].eval_pairs)
        words = {w for row in rows for v in row.values() if isinstance(v, str) for w in v.split()}
        assert not words & held_out
    check_leaks(load_split(world / "domains"))


def test_drafts_fit_the_model():
    rng, tokenizer = random.Random(0), build_tokenizer()
    unfinished = 0
    for _ in range(300):
        row = draft(rng, "garden", "describe the garden with roses and soil :")
        words = row["response"].split()
        unfinished += not row["finished"]
        assert row["response"] == " " + " ".join(words)
        assert (3 <= len(words) <= 19) if row["finished"] else len(words) == 20
        assert tokenizer.unk_token_id not in tokenizer(row["response"])["input_ids"]
    assert 10 <= unfinished <= 40  # 24 expected
    assert all(draft(rng, "garden", "", cut_off=0.0)["finished"] for _ in range(100))


def test_labels_are_bradley_terry_draws(domains):
    """The share of labels that agree with gold is the mean of sigmoid(|difference|)."""
    agree, expected = [], []
    for name, domain in domains.items():
        for row in domain.query:
            difference = gold(
                name, row["prompt"], row["chosen"], finished=row["chosen_finished"]
            ) - gold(name, row["prompt"], row["rejected"], finished=row["rejected_finished"])
            agree.append(difference > 0)
            expected.append(1 / (1 + math.exp(-abs(difference))))
    # 8,192 pairs: a standard error of at most 0.0055.
    assert statistics.mean(agree) == pytest.approx(statistics.mean(expected), abs=0.017)
    assert 0.75 < statistics.mean(agree) < 0.9


def _gold_of_support(domain: Domain) -> list[float]:
    return [
        gold(domain.name, row["prompt"], row["response"], finished=row["finished"])
        for row in domain.support
    ]


def test_fine_tuning_data_is_of_mixed_quality_and_leans_to_the_domains_taste(domains):
    for name in TOPICS:
        rng, prompts = random.Random(1), split_prompts(name, seed=0)[0]
        plain = []
        for _ in range(400):
            prompt = rng.choice(prompts)
            row = draft(rng, name, prompt)
            plain.append(gold(name, prompt, row["response"], finished=row["finished"]))
        kept = _gold_of_support(domains[name])
        worst, best = np.quantile(kept, [0.1, 0.9])
        assert best - worst > 4.0
        assert statistics.stdev(kept) > statistics.stdev(plain)
        # Half keep the best of four drafts, a quarter the worst: better than drafts on average.
        assert statistics.mean(kept) > statistics.mean(plain) + 0.2
        # The worst tenth is worse than the average draft by far: weights have work to do.
        assert worst < statistics.mean(plain) - 1.0


def _differences(domain: Domain, rows) -> np.ndarray:
    """Gold features of chosen minus those of rejected: [pairs, features]."""

    def counts(row, side):
        return list(
            measure(
                domain.name, row["prompt"], row[side], finished=row[f"{side}_finished"]
            ).values()
        )

    return np.array([np.subtract(counts(r, "chosen"), counts(r, "rejected")) for r in rows])


def _logistic(differences: np.ndarray) -> np.ndarray:
    """Bradley-Terry weights by Newton's method, with a little weight decay."""
    weights, decay = np.zeros(differences.shape[1]), 1e-3
    for _ in range(25):
        p = 1 / (1 + np.exp(-differences @ weights))
        gradient = decay * weights - differences.T @ (1 - p) / len(p)
        curvature = (differences * (p * (1 - p))[:, None]).T @ differences / len(p)
        weights -= np.linalg.solve(curvature + decay * np.eye(len(weights)), gradient)
    return weights


def test_a_pooled_fit_is_right_in_general_and_wrong_in_part(domains):
    """On held-out domains: above chance, below the domain's own fit, wrong in the flipped signs."""
    pooled = _logistic(
        np.concatenate([_differences(domains[n], domains[n].query) for n in SOURCES])
    )
    names = list(TABLE["garden"])
    pooled_accuracy, own_accuracy, gold_accuracy = [], [], []
    for name in HELD_OUT:
        weights = np.array(list(TABLE[name].values()))
        test = _differences(domains[name], domains[name].eval_pairs)
        own = _logistic(_differences(domains[name], domains[name].query))
        pooled_accuracy.append((test @ pooled > 0).mean())
        own_accuracy.append((test @ own > 0).mean())
        gold_accuracy.append((test @ weights > 0).mean())
        # The pooled fit has the general signs: wrong in the domain's two flips and nowhere else.
        wrong = {n for n, a, b in zip(names, pooled, weights, strict=True) if a * b < 0}
        assert wrong == set(flipped(TABLE[name]))
        assert pooled_accuracy[-1] > 0.65  # 256 pairs: chance is 0.5 +- 0.03
        assert own_accuracy[-1] > pooled_accuracy[-1] + 0.03
    assert statistics.mean(own_accuracy) > statistics.mean(pooled_accuracy) + 0.08
    assert statistics.mean(gold_accuracy) > statistics.mean(own_accuracy) - 0.02


def test_support_data_says_something_about_a_domains_taste(domains):
    """Features that count more often in the kept drafts than in plain ones are liked ones."""
    right = []
    for name in HELD_OUT:
        rng, prompts = random.Random(2), split_prompts(name, seed=0)[0]
        drafts = [(p, draft(rng, name, p)) for p in rng.choices(prompts, k=2000)]
        plain = [measure(name, p, d["response"], finished=d["finished"]) for p, d in drafts]
        kept = [
            measure(name, r["prompt"], r["response"], finished=r["finished"])
            for r in domains[name].support
        ]
        for taste in TASTES:
            shift = statistics.mean(c[taste] for c in kept) - statistics.mean(
                c[taste] for c in plain
            )
            right.append(shift * TABLE[name][taste] > 0)
    assert sum(right) >= 0.8 * len(right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 0}, "pairs is 0; give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"support": True}, "support is True"),
        ({"hidden_size": 10}, "hidden_size 10 with 4 heads"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DomainWorldConfig(**changes)


def test_bad_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"weights\.json: no such file"):
        read_table(tmp_path)
    (tmp_path / "weights.json").write_text('{"domains": 3}')
    with pytest.raises(UserError, match="not a table of domain weights"):
        read_table(tmp_path)
