"""Pairs made without labels: each way by definition, and what holds for all of them."""

import itertools
import random
import subprocess
import sys

import pytest

from shiftrm.data.languages import SENTENCES, language_of
from shiftrm.data.matching import CANDIDATES, match, near_in_length, style
from shiftrm.data.negatives import NEGATIVES, lacking, negative_pairs, two_way_pairs, with_own
from shiftrm.data.pairs import check_pair
from shiftrm.data.replies import Answer, reply
from shiftrm.errors import UserError

GROUPS = [
    {
        "prompt": f"What is the best way to number {n} in my house?",
        "responses": [
            f"You can paint door {n} at once. It is cheap, quick and looks good. Do use a brush!",
            f"I think that sign {n} must be made of wood, because wood lasts for many long years",
            f"Call someone who knows about number {n}.",
        ],
        "finished": [True, n % 2 == 0, True],
    }
    for n in range(6)
]
ODD = ["", " ", "x", "🙂", "e\u0301 o\u0308", "\ud800", "...", "\n\n", "你好。我很好。", "a" * 5000]


def chat(groups, *, parts=False):
    """The same groups as chats."""

    def content(words):
        return [{"type": "text", "text": words}] if parts else words

    return [
        {
            **row,
            "prompt": [{"role": "user", "content": content(row["prompt"])}],
            "responses": [
                [{"role": "assistant", "content": content(words)}] for words in row["responses"]
            ],
        }
        for row in groups
    ]


FORMS = {
    "text": lambda groups: groups,
    "chat": chat,
    "chat in parts": lambda groups: chat(groups, parts=True),
    "chat prompts": lambda groups: [
        {**row, "prompt": messages["prompt"]}
        for row, messages in zip(groups, chat(groups), strict=True)
    ],
}


def like_words(prompts, responses, *, finished):
    """A reward that is known: the number of letters, less 100 if cut off."""
    return [
        len(reply(r)) - 100 * (not f) for _, r, f in zip(prompts, responses, finished, strict=True)
    ]


@pytest.mark.parametrize("matching", ["random", "length", "style", "hard"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NEGATIVES.names())
def test_pairs_of_every_kind(kind, form, matching):
    groups = FORMS[form](GROUPS)
    keywords = {"matching": matching, "score": like_words if matching == "hard" else None}
    pairs = negative_pairs(groups, kind, 60, seed=3, **keywords)
    assert len(pairs) == 60
    own = {
        (str(row["prompt"]), str(text)): done
        for row in groups
        for text, done in zip(row["responses"], row["finished"], strict=True)
    }
    for pair in pairs:
        check_pair(pair, "pair")  # two usable, different sides of one kind
        assert own[str(pair["prompt"]), str(pair["chosen"])] == pair["chosen_finished"]
        assert type(pair["rejected"]) is type(pair["chosen"])
        if kind == "other_prompt":
            assert (str(pair["prompt"]), str(pair["rejected"])) not in own
        elif kind != "language":
            assert pair["rejected_finished"] == pair["chosen_finished"]
        if kind in ("cut", "language"):
            assert pair["chosen_finished"]
        if form == "chat in parts":
            [message] = pair["rejected"]
            assert message["content"] == [{"type": "text", "text": reply(pair["rejected"])}]
    assert pairs == negative_pairs(groups, kind, 60, seed=3, **keywords)
    assert pairs != negative_pairs(groups, kind, 60, seed=4, **keywords)


@pytest.mark.parametrize("form", ["text", "chat"])
def test_answers_that_differ_in_white_space_only_are_equal(form):
    stock = ["I cannot help.", "I cannot help. ", " I  cannot\nhelp."]
    groups = FORMS[form]([{"prompt": f"question {n}?", "responses": stock} for n in range(5)])
    assert lacking(groups, "other_prompt") == NEGATIVES.get("other_prompt").needs
    more = FORMS[form]([{"prompt": "last?", "responses": ["Yes, of course."]}])
    pairs = negative_pairs([*groups, *more], "other_prompt", 50)
    for pair in pairs:
        sides = {" ".join(reply(pair[side]).split()) for side in ("chosen", "rejected")}
        assert sides == {"I cannot help.", "Yes, of course."}


def test_only_the_last_answer_of_a_conversation_changes():
    turns = [
        {"role": "assistant", "content": "first answer of some words here"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "one two three four five six", "name": "a"},
    ]
    groups = [{"prompt": [{"role": "user", "content": "hi"}], "responses": [turns]}]
    for kind in ("repeated", "cut", "shuffled"):
        for pair in negative_pairs(groups, kind, 20):
            assert pair["rejected"][:2] == turns[:2]
            assert pair["rejected"][2]["name"] == "a"
            assert pair["chosen"] == turns  # and is not changed in place


@pytest.mark.parametrize("kind", NEGATIVES.names())
def test_odd_responses_never_stop_it(kind):
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    odd = [{"prompt": "What is the name of this?", "responses": ODD}]
    odd += [{"prompt": None, "responses": ["one two three four five six seven"]}]
    odd += [{"prompt": [], "responses": ["one two three four five six seven"]}]
    odd += [{"prompt": [{"role": "user", "content": "hi"}], "responses": [call, call]}]
    for seed in range(20):
        for pair in negative_pairs([*GROUPS, *odd], kind, 20, seed=seed):
            assert pair["prompt"]
            assert pair["chosen"] != pair["rejected"]
            assert reply(pair["rejected"]).strip() or kind == "other_prompt"


@pytest.mark.parametrize(
    ("kind", "responses", "message"),
    [
        ("other_prompt", ["a b c d", "e f g h"], "responses to at least two prompts"),
        ("repeated", ["two words", "", " "], "responses of three words or more"),
        ("cut", ["one two three four five"], "finished responses of six words"),
        ("shuffled", ["no no no no no no no"], "five different words"),
        ("language", ["of the and"], "prompts of a known language"),
    ],
)
def test_what_cannot_be_made_worse_is_one_error(kind, responses, message):
    groups = [{"prompt": "describe the garden :", "responses": responses}]
    assert lacking(groups, kind) == NEGATIVES.get(kind).needs
    assert lacking(GROUPS, kind) is None
    with pytest.raises(UserError, match=message):
        negative_pairs(groups, kind, 5)


@pytest.mark.parametrize(
    ("names", "own"),
    [
        (None, []),
        ("cut", []),
        (["cut", "other_prompt"], []),
        ("mine:WORSE", ["mine:WORSE"]),
        ("[cut, mine:WORSE, b.c:D]", ["mine:WORSE", "b.c:D"]),
        (["mine:WORSE", "cut", "mine:WORSE"], ["mine:WORSE"]),
    ],
)
def test_a_users_own_kinds_come_after_the_registered_ones(names, own):
    assert with_own(names) == [*NEGATIVES.names(), *own]


def test_responses_that_were_cut_off_cannot_be_cut():
    groups = [{"prompt": "p", "responses": ["one two three four five six"], "finished": [False]}]
    assert lacking(groups, "cut") == NEGATIVES.get("cut").needs
    assert lacking(groups, "shuffled") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: negative_pairs(GROUPS, "repeatd", 1), "did you mean 'repeated'"),
        (lambda: negative_pairs(GROUPS, "cut", 1, matching="near"), "matching is 'near'"),
        (lambda: negative_pairs(GROUPS, "cut", 1, matching="hard"), "needs a reward model"),
    ],
)
def test_bad_choices_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def letters(rng, count):
    return " ".join("ab"[rng.random() < 0.5] * rng.randint(1, 9) for _ in range(count))


def spread_groups():
    rng = random.Random(0)
    return [
        {"prompt": f"p{n}", "responses": [letters(rng, rng.randint(3, 30)) for _ in range(4)]}
        for n in range(20)
    ]


def gap(pairs, measure):
    return sum(abs(measure(p["chosen"]) - measure(p["rejected"])) for p in pairs) / len(pairs)


def test_matching_by_length_and_style_takes_near_ones():
    groups = spread_groups()
    pairs = {
        matching: negative_pairs(groups, "other_prompt", 300, matching=matching)
        for matching in ("random", "length", "style")
    }
    assert gap(pairs["length"], len) < 0.2 * gap(pairs["random"], len)
    assert gap(pairs["style"], len) < 0.6 * gap(pairs["random"], len)

    def word_length(text):
        return style(text)[4]

    assert gap(pairs["style"], word_length) < 0.6 * gap(pairs["length"], word_length)


SKEWED = {
    "log-normal": lambda rng: max(3, int(rng.lognormvariate(5, 1))),
    "exponential": lambda rng: 3 + int(rng.expovariate(1 / 150)),
    "many at a limit": lambda rng: min(200, max(3, int(rng.lognormvariate(5, 0.7)))),
    "two sizes": lambda rng: int(rng.gauss(*rng.choice([(50, 10), (50, 10), (400, 40)]))),
}


def skewed_groups(lengths, *, of_first=4):
    rng = random.Random(0)
    return [
        {
            "prompt": f"p{n}",
            "responses": [
                "".join(rng.choice("abcdefgh ") for _ in range(SKEWED[lengths](rng) - 2)) + "ab"
                for _ in range(4 if n else of_first)
            ],
        }
        for n in range(60)
    ]


def share_longer(pairs):
    signs = [len(p["chosen"]) - len(p["rejected"]) for p in pairs]
    return sum(0.5 if d == 0 else d > 0 for d in signs) / len(signs)


@pytest.mark.parametrize("of_first", [4, 1000])
@pytest.mark.parametrize("lengths", SKEWED)
def test_matched_by_length_or_style_no_reward_of_the_text_alone_is_a_cue(lengths, of_first):
    """Exactly one half, also where one prompt has most of the responses."""
    groups = skewed_groups(lengths, of_first=of_first)
    for matching in ("length", "style"):
        pairs = negative_pairs(groups, "other_prompt", 300, matching=matching)
        assert len(pairs) == 300
        assert share_longer(pairs) == 0.5
        for one, other in zip(pairs[::2], pairs[1::2], strict=True):
            assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
            assert one["prompt"] != other["prompt"]
    assert len(negative_pairs(groups, "other_prompt", 7, matching="length")) == 7


def test_the_nearest_length_is_a_ratio():
    """To 100 letters 40 are nearer in number, 190 in ratio."""
    texts = {"a": "x" * 100, "b": "y" * 40, "c": "z" * 190}
    answers = {k: Answer(k, k, text, True) for k, text in texts.items()}
    [found] = match([(answers["a"], [answers["b"], answers["c"]])], "length")
    assert found == answers["c"]
    assert near_in_length(answers["a"], answers["a"]._replace(text="x" * 150))
    assert not near_in_length(answers["a"], answers["a"]._replace(text="x" * 152))


def test_couples_of_one_length_are_each_preferred_once():
    groups = skewed_groups("log-normal")
    own = {(g["prompt"], text) for g in groups for text in g["responses"]}
    couples = two_way_pairs(groups, 200, seed=3)
    assert 150 < len(couples) <= 200
    for one, other in couples:
        for pair in (one, other):
            assert (pair["prompt"], pair["chosen"]) in own
            assert (pair["prompt"], pair["rejected"]) not in own
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
        short, long = sorted(map(len, (one["chosen"], one["rejected"])))
        assert long + 1 <= 1.5 * (short + 1)
    rows = [str(pair) for couple in couples for pair in couple]
    assert len(set(rows)) == len(rows)


def test_without_a_response_of_about_the_length_there_are_no_couples():
    groups = [{"prompt": p, "responses": [p * n, p * n + "b"]} for p, n in (("x", 10), ("y", 100))]
    with pytest.raises(UserError, match=r"within a factor of 1\.5"):
        two_way_pairs(groups, 50)


def test_repeated_matched_by_length_replaces():
    pairs = negative_pairs(GROUPS, "repeated", 100, matching="length")
    assert gap(pairs, len) < 0.5 * gap(negative_pairs(GROUPS, "repeated", 100), len)


def test_hard_takes_what_the_reward_likes_best():
    groups, asked = spread_groups(), []

    def score(prompts, responses, *, finished):
        asked.append(list(zip(prompts, responses, strict=True)))
        return like_words(prompts, responses, finished=finished)

    pairs = negative_pairs(groups, "other_prompt", 200, matching="hard", score=score)
    [requests] = asked  # one call, no request twice
    assert len(set(requests)) == len(requests) <= CANDIDATES * 200
    texts = sorted(len(text) for row in groups for text in row["responses"])
    lengths = [len(pair["rejected"]) for pair in pairs]
    assert min(lengths) >= texts[len(texts) // 2]  # the longest of 16 is above the median
    assert all((pair["prompt"], pair["rejected"]) in requests for pair in pairs)


def test_style_by_hand():
    text = "- One two!\n- two?\n1. one one"
    found = style(text)  # words: - One two! - two? 1. one one
    assert found[1:4] == (3 / 8, 2 / 8, 2 / 8)  # "-" and "one" come again
    assert found[4] == (1 + 3 + 4 + 1 + 4 + 2 + 3 + 3) / 8
    assert style("")[1:] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "English"),
        ("Wie heißt die Hauptstadt und was kann man dort sehen?", "German"),
        ("Quelle est la capitale de la France ?", "French"),
        ("¿Cuál es la capital de España y por qué?", "Spanish"),
        ("Qual è la capitale di questo paese e come ci si arriva?", "Italian"),
        ("Qual é a capital do Brasil e como é que eu vou para lá?", "Portuguese"),
        ("describe the garden :", None),  # the gold world
        ("法国的首都是什么", None),
        ("", None),
    ],
)
def test_language_of(text, language):
    assert language_of(text) == language


def test_the_sentences_are_in_their_language():
    for name, sentences in SENTENCES.items():
        assert len(set(sentences)) == 12
        assert language_of(" ".join(sentences)) == name
        assert sum(language_of(s) in (None, name) for s in sentences) >= 10
    for a, b in itertools.combinations(SENTENCES.values(), 2):
        assert not set(a) & set(b)


def test_language_is_another_one_of_about_the_length():
    for pair in negative_pairs(GROUPS, "language", 100):
        text = pair["rejected"]
        foreign = [name for name, given in SENTENCES.items() if any(s in text for s in given)]
        assert len(foreign) == 1
        assert foreign != ["English"]
        assert abs(len(text) - len(pair["chosen"])) < 50


def test_pairs_are_made_without_torch():
    """Loading it takes a second of every command that only names the kinds."""
    code = "import sys, shiftrm.data.negatives; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
