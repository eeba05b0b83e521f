"""Ensembles and Laplace approximations read by the one loader of reward models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.combined import Ensemble, EnsembleScorer, Member
from shiftrm.models.laplace import LaplaceScorer, PairTokens, fit_posterior
from shiftrm.models.loading import load_reward_model
from shiftrm.models.responses import Response
from shiftrm.models.rewards import hidden_states
from shiftrm.models.scoring import Scorer
from shiftrm.policies.loading import check_reward_model
from shiftrm.trainers.scored_pairs import tokens_of_pairs
from tests.byte_level import CHATML, TRL_TEMPLATES, byte_level
from tests.conftest import llama_config

PROMPTS = ["the red cat", "the red cat", [{"role": "user", "content": "a dog"}], "a", None]
RESPONSES = [" runs", "", [{"role": "assistant", "content": "sits the bird"}], " flies a fish", "a"]
FINISHED = [True, True, True, False, True]
SCALES = (("member-0", 0.3, 2.0), ("member-1", -1.0, 0.5), ("member-2", 0.0, 1.0))


def write_member(folder, tokenizer, seed):
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    with torch.no_grad():
        model.score.weight.mul_(20)  # rewards of different sizes
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def members(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    for seed, (name, *_) in enumerate(SCALES):
        write_member(folder / name, tokenizer, seed)
    return folder


@pytest.fixture
def ensemble(members, tmp_path):
    """`ensemble(kind, penalty)`: the folder of an ensemble of the three."""

    def make(kind="mean", penalty=0.0):
        folder = tmp_path / "ensemble"
        shutil.copytree(members, folder)
        Ensemble(kind, tuple(Member(*scale) for scale in SCALES), penalty).write(folder)
        return folder

    return make


@pytest.mark.parametrize(("kind", "penalty"), [("mean", 0.0), ("min", 0.0), ("variance", 0.7)])
def test_an_ensemble_scores_as_its_members_together(ensemble, kind, penalty):
    folder = ensemble(kind, penalty)
    each = []
    for name, mean, std in SCALES:
        rewards = Scorer.from_pretrained(folder / name)(PROMPTS, RESPONSES, finished=FINISHED)
        each.append([(r - mean) / std for r in rewards])
    expected = []
    for z in zip(*each, strict=True):
        middle = sum(z) / 3
        value = {
            "mean": middle,
            "min": min(z),
            "variance": middle - penalty * sum((v - middle) ** 2 for v in z) / 3,
        }[kind]
        expected.append((2.0 + 0.5 + 1.0) / 3 * value)
    scorer = Scorer.from_pretrained(str(folder))
    assert isinstance(scorer, EnsembleScorer)
    found = scorer(PROMPTS, RESPONSES, finished=FINISHED)
    assert found == pytest.approx(expected, abs=1e-5)
    assert scorer(PROMPTS, RESPONSES, finished=FINISHED, batch_size=1) == pytest.approx(
        found, abs=1e-5
    )
    assert found != scorer(PROMPTS, RESPONSES)  # the unfinished one has no end


@pytest.mark.parametrize(
    "broken",
    [
        "not json",
        json.dumps({"kind": "mean", "members": [], "penalty": 0}),
        json.dumps({"kind": "median", "members": [{"folder": "member-0", "mean": 0, "std": 1}]}),
        json.dumps(
            {"kind": "mean", "penalty": 0, "members": [{"folder": "..", "mean": 0, "std": 1}]}
        ),
        json.dumps(
            {"kind": "mean", "penalty": 0, "members": [{"folder": "member-0", "mean": 0, "std": 0}]}
        ),
    ],
)
def test_a_broken_file_is_one_line(ensemble, broken):
    folder = ensemble()
    (folder / "ensemble.json").write_text(broken)
    for read in (Scorer.from_pretrained, lambda path: check_reward_model(str(path))):
        with pytest.raises(UserError, match=r"ensemble\.json: is broken; train the ensemble again"):
            read(folder)


def test_missing_or_broken_members_are_one_line(ensemble):
    folder = ensemble()
    (folder / "member-2" / "model.safetensors").write_text("cut")
    with pytest.raises(UserError, match="member-2: cannot be loaded") as caught:
        Scorer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder / "member-1")
    for read in (Scorer.from_pretrained, lambda path: check_reward_model(str(path))):
        with pytest.raises(UserError, match="without its member 'member-1'"):
            read(folder)


def test_members_share_a_tokenizer(ensemble, tokenizer):
    folder = ensemble()
    words = json.loads((folder / "member-1" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (folder / "member-1" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="member-1 has another tokenizer than member-0"):
        Scorer.from_pretrained(folder)


def test_training_does_not_start_from_an_ensemble(ensemble):
    with pytest.raises(UserError, match="is an ensemble of reward models, and training starts"):
        load_reward_model(ensemble(), seed=0)


@pytest.mark.parametrize("name", ["laplace.json", "laplace.safetensors"])
def test_training_does_not_start_from_a_model_with_a_posterior(ensemble, name):
    folder = ensemble() / "member-0"
    load_reward_model(folder, seed=0)
    (folder / name).touch()
    with pytest.raises(UserError, match=r"lowers its rewards by a posterior.*give a copy of the"):
        load_reward_model(folder, seed=0)


# -- Laplace -----------------------------------------------------------------------------------


def pairs_of(scorer):
    """Eight pairs of one prompt, four of another, one without, in tokens."""
    encode = scorer.tokenizer.encode
    found = []
    for prompt, count in (("<s> the red cat", 8), ("<s> the", 4), ("", 1)):
        opening = tuple(encode(prompt)) if prompt else ()
        for k in range(count):
            sides = [tuple(encode(f"{w} runs" * (k % 3 + 1))) for w in (" a", " small bird")]
            found.append(PairTokens(opening + sides[0], opening + sides[1], opening))
    return found


def states(scorer, sequences):
    """The states under the head, each sequence by itself, in fp64."""
    one = [
        hidden_states(scorer.model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        for ids in sequences
    ]
    return torch.cat(one).double().detach()


@pytest.fixture
def plain(members):
    return Scorer.from_pretrained(members / "member-0")


def test_the_reward_minus_the_posterior_by_brute_force(plain, tmp_path, members):
    pairs = pairs_of(plain)
    posterior = fit_posterior(plain, pairs, prior=0.5, penalty=2.0, batch_size=3)
    w = plain.model.score.weight[0].double().detach()
    precision = 0.5 * torch.eye(len(w)).double()
    for pair in pairs:
        chosen, rejected = states(plain, [pair.chosen, pair.rejected])
        p = torch.sigmoid(w @ (chosen - rejected))
        precision += p * (1 - p) * torch.outer(chosen - rejected, chosen - rejected)
    covariance = torch.linalg.inv(precision)

    def mean(which):
        return states(plain, [s for p in which for s in (p.chosen, p.rejected)]).mean(0)

    long, short = pairs[0].prompt, pairs[8].prompt
    references = {
        long: mean([p for p in pairs if p.prompt == long]),
        short: mean([p for p in pairs if p.prompt == short]),
        (): mean(pairs),
    }
    assert set(posterior.prompts) == {long, short}  # the pair without a prompt names none
    encode = plain.tokenizer.encode
    tests = [
        (long, (*long, *encode(" flies"))),  # begins with the short prompt, too
        (short, (*short, *encode(" blue fish flies"))),
        ((), tuple(encode("a green bird"))),
    ]
    expected = []
    for prompt, ids in tests:
        state = states(plain, [ids])[0]
        away = state - references[prompt]
        expected.append(float(w @ state - 2.0 * (away @ covariance @ away).sqrt()))
    shutil.copytree(members / "member-0", tmp_path / "model")
    posterior.write(tmp_path / "model")
    scorer = Scorer.from_pretrained(tmp_path / "model")
    assert isinstance(scorer, LaplaceScorer)
    sequences = [ids for _, ids in tests]
    assert scorer.score_ids(sequences) == pytest.approx(expected, abs=1e-4)
    for ids, reward in zip(sequences, expected, strict=True):  # whatever else is scored
        assert scorer.score_ids([ids]) == pytest.approx([reward], abs=1e-4)
    response = Response("the red cat", " runs", finished=False)
    assert scorer.score([response])[0] < plain.score([response])[0]


def byte_scorer(template=CHATML, **options):
    tokenizer = byte_level(template, **options)
    torch.manual_seed(0)
    config = llama_config(len(tokenizer), num_labels=1, max_position_embeddings=1024)
    return Scorer(LlamaForSequenceClassification(config), tokenizer)


def fitted(scorer, rows):
    tokens = tokens_of_pairs(rows, scorer, name="pairs", max_length=None)
    return LaplaceScorer(scorer, fit_posterior(scorer, tokens, prior=1.0, penalty=1.0), "x")


def said(*words):
    roles = ["user", "assistant"] * len(words)
    return [{"role": r, "content": w} for r, w in zip(roles, words, strict=False)]


def rows_of(prompt, answers):
    return [{"prompt": prompt, "chosen": one, "rejected": two} for one, two in answers]


def reference(scorer, prompt, response):
    """The number of the prompt whose reference the response has; None: all responses' mean."""
    [found] = scorer._references([scorer.encode(prompt, response)])
    posterior = scorer.posterior
    if torch.equal(found, posterior.mean):
        return None
    return [torch.equal(found, mean) for mean in posterior.prompt_means].index(True)


ANSWERS = [(f" yes {k}", f" no {k}") for k in range(4)]
CHAT_ANSWERS = [tuple(said("", text)[1:] for text in pair) for pair in ANSWERS]


@pytest.mark.parametrize("name", ["chatml", "llama3_1", "phi3", "qwen3_training", "smolvlm"])
def test_a_later_turn_is_not_the_known_prompts(name):
    """A conversation goes on after the known prompt and an answer: its prompt is another one."""
    scorer = byte_scorer(CHATML if name == "chatml" else TRL_TEMPLATES[name])
    long = said("hi", "hello", "and then?")
    scorer = fitted(scorer, rows_of(said("hi"), CHAT_ANSWERS) + rows_of(long, CHAT_ANSWERS))
    assert len(scorer.posterior.prompts) == 2
    assert reference(scorer, said("hi"), said("", "a new answer")[1:]) == 0
    assert reference(scorer, long, said("", "a new answer")[1:]) == 1
    for other in (said("hi", "hello", "what?"), said("hi", "yes", "and then?"), said("hi there")):
        assert reference(scorer, other, said("", "a new answer")[1:]) is None
    assert reference(scorer, said("hi", "hello", "and then?", "a", "b"), said("", "c")[1:]) is None


def test_in_plain_text_the_longest_known_prompt_counts():
    rows = rows_of("Explain", ANSWERS) + rows_of("Explain rain.", ANSWERS)
    scorer = fitted(byte_scorer(None), rows)
    assert reference(scorer, "Explain", " it") == 0
    assert reference(scorer, "Explain rain.", " it") == 1
    assert reference(scorer, "Explain snow.", " it") == 0  # nothing shows where the prompt ends
    assert reference(scorer, "Expla", " it") is None


@pytest.mark.parametrize("prompt", ["", " ", None, []])
def test_a_blank_prompt_is_nobodys(prompt):
    scorer = fitted(byte_scorer(None, post="<bos> $A"), rows_of(prompt, ANSWERS))
    assert scorer.posterior.prompts == ()
    assert reference(scorer, "Explain", " it") is None


@pytest.mark.parametrize("post", [None, "<bos> $A"])
def test_a_prompt_whose_last_token_joins_the_answers_is_known_without_it(post):
    scorer = byte_scorer(None, merges=[("b", "c"), ("a", "c")], post=post)
    joined = [(f"c{k}", f"cc{k}") for k in range(4)]
    scorer = fitted(scorer, rows_of("ab", joined) + rows_of("a", joined))
    [known] = scorer.posterior.prompts  # of "a" nothing would be left
    assert scorer.tokenizer.decode(known).removeprefix("<bos>").strip() == "a"
    assert reference(scorer, "ab", "c7") == 0
    assert reference(scorer, "zz", "c7") is None


def same(one, other):
    """Posteriors of the same numbers; `pairs` and `penalty` aside."""
    assert one.prompts == other.prompts
    for name in ("root", "mean", "prompt_means"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_a_pairs_weight_says_how_often_it_counts(plain):
    pairs = pairs_of(plain)
    twice = [pair._replace(weight=2.0) for pair in pairs[:8]] + pairs[8:]
    same(
        fit_posterior(plain, twice, prior=1.0, batch_size=3),
        fit_posterior(plain, pairs[:8] + pairs, prior=1.0),
    )
    none = [pair._replace(weight=0.0) for pair in pairs[8:]]
    found = fit_posterior(plain, pairs[:8] + none, prior=1.0)
    same(found, fit_posterior(plain, pairs[:8], prior=1.0))
    assert found.pairs == 8
    prior = fit_posterior(plain, none, prior=4.0)
    assert (prior.pairs, prior.mean.isfinite().all()) == (0, True)
    torch.testing.assert_close(prior.root, torch.eye(len(prior.root)).double() / 2)


def test_rows_weights_and_margins_reach_the_posterior(plain):
    """p (1 - p) is about exp(-|w . d - m|) far from 0: a margin of 60 leaves the prior alone."""
    rows = [{"prompt": "the red", "chosen": f" cat{' runs' * k}", "rejected": " a"} for k in (1, 2)]
    found = {}
    for extra in ({}, {"margin": 60.0}, {"weight": 3.0, "margin": None}):
        tokens = tokens_of_pairs(
            [{**row, **extra} for row in rows], plain, name="pairs", max_length=None
        )
        root = fit_posterior(plain, tokens, prior=4.0).root
        found[tuple(extra)] = torch.linalg.inv(root.T @ root) - 4 * torch.eye(len(root))
    torch.testing.assert_close(found["weight", "margin"], 3 * found[()])
    assert float(found[("margin",)].abs().max()) < 1e-8 < float(found[()].abs().max())


def test_without_a_penalty_the_reward_is_the_models(plain):
    scorer = LaplaceScorer(plain, fit_posterior(plain, pairs_of(plain), prior=1.0), "x")
    found = scorer(PROMPTS, RESPONSES, finished=FINISHED)
    assert found == pytest.approx(plain(PROMPTS, RESPONSES, finished=FINISHED), abs=1e-6)


def test_broken_posteriors_are_one_line(plain, tmp_path, members):
    folder = tmp_path / "model"
    shutil.copytree(members / "member-0", folder)
    posterior = fit_posterior(plain, pairs_of(plain), prior=1.0)

    def refused(words):
        with pytest.raises(UserError, match=words):
            Scorer.from_pretrained(folder)
        posterior.write(folder)

    posterior.write(folder)
    (folder / "laplace.json").write_text("[]")
    refused(r"laplace\.json or laplace\.safetensors is missing or broken; train it again")
    (folder / "laplace.safetensors").unlink()
    refused("is missing or broken")
    tensors = load_file(folder / "laplace.safetensors")
    save_file({**tensors, "root": tensors["root"] * torch.nan}, folder / "laplace.safetensors")
    refused("is missing or broken")
    smaller = {k: v[..., :4].contiguous() for k, v in tensors.items()}
    save_file({**smaller, "root": torch.eye(4)}, folder / "laplace.safetensors")
    refused("is of a head with 4 inputs, and the model's has 32")


def test_no_pairs_no_posterior(plain):
    with pytest.raises(UserError, match="no pairs to fit the posterior"):
        fit_posterior(plain, [], prior=1.0)
