"""Sight tests: shares of toy rewards worked out by hand, and their rank correlation."""

import random

import pytest
from scipy import stats

from shiftrm.data.negatives import NEGATIVES
from shiftrm.errors import UserError
from shiftrm.measure.sight import Prediction, predicts, sight_tests
from shiftrm.models.scoring import Scorer
from shiftrm.records import Record
from tests.conftest import WORDS

PROMPTS = 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(rng, n):
    return ["".join(rng.choice(LETTERS) for _ in range(5)) for _ in range(n)]


def own_words(seed=0, *, chat=False, lengths=(8, 8)):
    """Groups whose responses hold words of their own prompt and of no other."""
    rng = random.Random(seed)
    groups = []
    for _ in range(PROMPTS):
        asked = words(rng, 6)
        answers = [" ".join(rng.sample(asked, 4) + words(rng, n - 4)) for n in lengths]
        prompt = " ".join(asked)
        if chat:
            prompt = [{"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        groups.append({"prompt": prompt, "responses": answers})
    return groups


def text(x):
    return x if isinstance(x, str) else " ".join(m["content"] for m in x)


def overlap(prompts, responses, *, finished):
    """Counts words of the prompt."""
    return [
        float(len({*text(p).split()} & {*text(r).split()}))
        for p, r in zip(prompts, responses, strict=True)
    ]


def fewest_words(prompts, responses, *, finished):
    return [-float(len(text(r).split())) for r in responses]


def different_words(prompts, responses, *, finished):
    """Repetition and length cost, order does not."""
    return [float(len(set(text(r).split())) - 2 * len(text(r).split())) for r in responses]


def constant(prompts, responses, *, finished):
    return [1.5] * len(responses)


def by_kind(tests):
    return {test.kind: test for test in tests}


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_that_looks_at_the_prompt_prefers_every_response_of_its_own(chat):
    found = by_kind(sight_tests(overlap, own_words(chat=chat), count=200, seed=1))
    own = found["other_prompt"]
    assert (own.share.value, own.share.low, own.share.high) == (1.0, 1.0, 1.0)
    assert own.prompts > 30
    assert (own.left_out, own.reason) == (0, "")
    # Order does not change which words occur.
    assert found["shuffled"].share.value == 0.5


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_that_ignores_the_prompt_is_a_coin_on_other_prompts(chat):
    """All responses have as many letters, so this reward ties: exactly one half."""
    groups = own_words(chat=chat)
    assert by_kind(sight_tests(fewest_words, groups, seed=1))["other_prompt"].share.value == 0.5
    rng = random.Random(0)
    drawn = {}

    def by_text(prompts, responses, *, finished):
        return [drawn.setdefault(text(r), rng.random()) for r in responses]

    share = by_kind(sight_tests(by_text, groups, seed=1))["other_prompt"].share
    assert share.low < 0.5 < share.high


def test_ties_count_one_half_in_every_test():
    found = sight_tests(constant, own_words(), count=50)
    shares = {t.kind: t.share.value for t in found if t.share is not None}
    assert set(shares) == {"other_prompt", "repeated", "cut", "shuffled"}
    assert set(shares.values()) == {0.5}
    for test in found:
        if test.share is not None:
            assert test.share.low == test.share.high == 0.5


def test_a_reward_that_dislikes_words():
    """A response cut off has fewer words, one with a part said again as many or more."""
    found = by_kind(sight_tests(fewest_words, own_words(), count=200))
    assert found["cut"].share.value == 0.0
    assert 0.5 < found["repeated"].share.value < 1.0  # one half where a part was replaced
    assert by_kind(sight_tests(different_words, own_words()))["repeated"].share.value == 1.0


def test_the_response_to_another_prompt_has_about_the_same_length():
    """A reward that counts words sees no difference, though responses have 5 to 60 words."""
    rng = random.Random(0)
    groups = []
    for i in range(200):
        n = rng.randint(5, 60)
        groups.append({"prompt": f"p{i}", "responses": [" ".join(words(rng, n)) for _ in range(2)]})
    lengths = {}

    def length(prompts, responses, *, finished):
        for prompt, response in zip(prompts, responses, strict=True):
            lengths.setdefault(prompt, []).append(len(response))
        return [float(len(r)) for r in responses]

    [test] = sight_tests(length, groups, kinds=["other_prompt"], count=200)
    assert test.share.low < 0.5 < test.share.high
    gaps = sorted(max(found) - min(found) for found in lengths.values())
    assert gaps[len(gaps) // 2] < 60  # of 30 to 360 letters


@pytest.mark.parametrize("of_first", [3, 600])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_that_is_the_length_is_a_coin_on_other_prompts(sign, of_first):
    """Lengths are log-normal, and one prompt may have most of the responses."""
    rng = random.Random(1)
    groups = [
        {
            "prompt": f"p{i}",
            "responses": [
                " ".join(words(rng, max(2, int(rng.lognormvariate(3, 1)))))
                for _ in range(3 if i else of_first)
            ],
        }
        for i in range(100)
    ]

    def length(prompts, responses, *, finished):
        return [sign * float(len(r)) for r in responses]

    [test] = sight_tests(length, groups, kinds=["other_prompt"], count=300)
    assert test.share.value == 0.5
    assert test.share.low < 0.5 < test.share.high
    assert 200 < test.pairs <= 300


def test_a_couple_is_left_out_as_a_whole(reward_model, tokenizer):
    """Of two answers one does not fit under the other one's longer prompt: neither pair counts."""
    scorer = Scorer(reward_model, tokenizer)
    groups = [
        {"prompt": "the " * 40, "responses": [" cat" * 20]},
        {"prompt": "a", "responses": [" dog" * 20, " fish" * 24]},
    ]
    room = reward_model.config.max_position_embeddings
    assert len(scorer.encode("the " * 40, " dog" * 20)) <= room < 40 + 24 + 1
    [test] = sight_tests(scorer, groups, kinds=["other_prompt"], count=60)
    assert (test.pairs, test.left_out) == (2, 2)  # those with dogs, and those with fish


def test_lengths_that_no_other_prompt_has_do_not_apply():
    groups = [{"prompt": p, "responses": [p * n, p * n + "b"]} for p, n in (("x", 10), ("y", 100))]
    [test] = sight_tests(constant, groups, kinds=["other_prompt"])
    assert (test.share, test.pairs) == (None, 0)
    assert "within a factor of 1.5" in test.reason


def test_the_interval_draws_prompts_with_all_their_pairs():
    """Two prompts, one always right and one always wrong: every share from 0 to 1 is drawn."""
    groups = [
        {"prompt": p, "responses": [f"{p} {a} c d e f g h" for a in LETTERS[:8]]} for p in "xy"
    ]

    def reward(prompts, responses, *, finished):
        return [float(r[0] == "x") for r in responses]

    [test] = sight_tests(reward, groups, kinds=["other_prompt"], count=60)
    assert test.prompts == 2
    assert test.pairs > 30
    assert (test.share.low, test.share.high) == (0.0, 1.0)


def test_equal_pairs_count_once_and_equal_texts_are_scored_once():
    groups = [{"prompt": p, "responses": [f"{p} one two three"]} for p in "xy"]
    asked = []

    def reward(prompts, responses, *, finished):
        asked.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    [test] = sight_tests(reward, groups, kinds=["other_prompt"], count=500)
    assert test.pairs == test.prompts == 2
    assert sorted(asked) == [(p, f"{r} one two three") for p in "xy" for r in "xy"]


def test_the_same_seed_gives_the_same_result():
    groups = own_words()
    first, again = (sight_tests(overlap, groups, count=50, seed=3) for _ in range(2))
    assert first == again != sight_tests(overlap, groups, count=50, seed=4)


def test_kinds_that_do_not_apply_say_why():
    found = by_kind(sight_tests(constant, [{"prompt": "hi", "responses": ["yes", ""]}]))
    assert set(found) == set(NEGATIVES.names())
    for test in found.values():
        assert test.share is None
        assert test.pairs == test.prompts == 0
        assert test.reason
        assert "\n" not in test.reason
    assert "two prompts" in found["other_prompt"].reason
    assert "language" in found["language"].reason
    [none] = sight_tests(constant, [{"prompt": None, "responses": ["a b c d e f"]}], kinds=["cut"])
    assert none.share is None
    assert none.reason


def test_another_language():
    groups = [
        {"prompt": f"What is the colour of the {w}?", "responses": ["It is what you think it is."]}
        for w in LETTERS
    ]

    def english(prompts, responses, *, finished):
        return [float("It is what" in r) for r in responses]

    [test] = sight_tests(english, groups, kinds=["language"], count=40)
    assert test.share.value == 1.0
    assert test.prompts > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_are_an_error_that_names_the_response(value):
    def reward(prompts, responses, *, finished):
        return [value if "bad" in r else 1.0 for r in responses]

    groups = [{"prompt": p, "responses": [f"{p} one two three"]} for p in ("x", "bad")]
    with pytest.raises(UserError, match=f"reward_fn gave {value} for the response 'bad") as error:
        sight_tests(reward, groups, count=20)
    assert "it must give finite numbers" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="did you mean 'repeated'"):
        sight_tests(constant, own_words(), kinds=["repeatd"])


def test_every_kind_says_what_a_low_share_means():
    meanings = [NEGATIVES.get(kind).low for kind in NEGATIVES.names()]
    assert len(set(meanings)) == len(meanings)
    assert all(text.startswith("A number") and text.endswith(".") for text in meanings)


# -- a real model and tokenizer --------------------------------------------------------------


def test_pairs_beyond_the_context_are_left_out_and_counted(reward_model, tokenizer):
    """A word is a token. The responses fill the context; with words added they do not fit."""
    scorer = Scorer(reward_model, tokenizer)
    room = reward_model.config.max_position_embeddings
    rng = random.Random(0)
    vocabulary = WORDS.split()
    groups = []
    for first in vocabulary[:6]:
        prompt = f"the {first}"
        count = room - len(scorer.encode(prompt, " cat")) + 1
        response = "".join(f" {rng.choice(vocabulary)}" for _ in range(count))
        assert len(scorer.encode(prompt, response)) == room
        groups.append({"prompt": prompt, "responses": [response]})
    [test] = sight_tests(scorer, groups, kinds=["repeated"], count=60)
    assert test.left_out > 0
    assert test.pairs + test.left_out <= 60
    [cut] = sight_tests(scorer, groups, kinds=["cut"], count=60)
    assert cut.left_out == 0
    assert cut.share is not None


def test_a_scorer_and_a_function_agree(reward_model, tokenizer):
    scorer = Scorer(reward_model, tokenizer)
    rng = random.Random(0)
    vocabulary = WORDS.split()
    groups = [
        {"prompt": f"the {i}", "responses": [" " + " ".join(rng.choices(vocabulary, k=8))]}
        for i in range(12)
    ]

    def one_by_one(prompts, responses, *, finished):
        return [
            scorer([p], [r], finished=[f])[0]
            for p, r, f in zip(prompts, responses, finished, strict=True)
        ]

    assert sight_tests(scorer, groups, count=20) == sight_tests(one_by_one, groups, count=20)


# -- do they predict accuracy? ---------------------------------------------------------------


def record(metric, value, seed, method, round_=1, stage="evaluate"):
    return Record(stage, method, round_, metric, value, seed=seed)


def points(rows):
    for seed, method, sight, accuracy in rows:
        yield record("sight_cut_after", sight, seed, method)
        yield record("accuracy_policy_after", accuracy, seed, method)


def test_predictions_by_hand():
    rows = [(0, "a", 0.5, 0.50), (0, "b", 0.7, 0.55), (1, "a", 0.6, 0.60), (1, "b", 0.8, 0.65)]
    [found] = predicts(points(rows))
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (1 + 1) / (4 * 15).
    assert found.rho == pytest.approx(0.8)
    assert (found.kind, found.n, found.seeds) == ("cut", 4, 2)
    # Each seed alone is in order, so draws of one seed give 1.
    assert (found.low, found.high) == (pytest.approx(0.8), pytest.approx(1.0))


def test_predictions_agree_with_scipy_and_draw_seeds():
    rng = random.Random(0)
    rows = []
    for seed in range(12):
        shift = rng.gauss(0, 1)
        for arm in "abcd":
            x = rng.gauss(0, 1)
            rows.append((seed, arm, x + shift, x + shift + rng.gauss(0, 0.5)))
    [found] = predicts(points(rows))
    expected = stats.spearmanr([r[2] for r in rows], [r[3] for r in rows]).statistic
    assert found.rho == pytest.approx(expected)
    assert found.low < expected < found.high
    assert found.low > 0
    assert predicts(points(rows)) == [found]


def test_predictions_need_both_numbers_and_variation():
    lone = [record("sight_cut_after", 0.5, 0, "a"), record("sight_cut_before", 0.5, 0, "a")]
    assert predicts(lone) == [Prediction("cut", None, None, None, 0, 0)]
    same = predicts(points([(0, "a", 0.5, 0.5), (1, "a", 0.5, 0.6)]))
    assert same == [Prediction("cut", None, None, None, 2, 2)]
    [one_seed] = predicts(points([(0, "a", 0.5, 0.5), (0, "b", 0.6, 0.4)]))
    assert (one_seed.rho, one_seed.low, one_seed.high) == (pytest.approx(-1), None, None)


def test_predictions_of_another_number_and_time():
    records = [
        r
        for i in range(4)
        for r in (
            record("sight_other_prompt_before", 0.1 * i, i, "a"),
            record("rank_policy_before", -0.1 * i, i, "a"),
            record("sight_other_prompt_after", 0.1 * i, i, "a"),
            record("rank_policy_before", 0.9, i, "a", stage="train"),
        )
    ]
    [found] = predicts(records, when="before", target="rank_policy")
    assert (found.kind, found.n) == ("other_prompt", 4)
    assert found.rho == pytest.approx(-1)
    [after] = predicts(records)
    assert after.n == 0
