"""The language: classes of words, prompts, tokenizer round trips, demonstrations."""

import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from shiftrm.errors import UserError
from shiftrm.world import language
from shiftrm.world.language import (
    CONTENT,
    MAX_RESPONSE_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    TASKS,
    TOPIC_OF,
    TOPICS,
    VOCABULARY,
    build_tokenizer,
    demonstration,
    draw_prompt,
    parse_prompt,
    prompt_text,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer after a save and a load, as everybody else sees it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_word_belongs_to_one_class():
    words = [
        *(word for content in CONTENT.values() for word in content),
        *language.PRAISE,
        *language.NEGATIVE,
        *language.FILLERS,
        *language.TOXIC,
        *language.HEDGES,
        *TOPICS,
        *TASKS,
        language.COLON,
    ]
    assert len(words) == len(set(words)) == 16 * 6 + 10 + 10 + 20 + 5 + 6 + 16 + 3 + 1
    assert set(words) == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))


def test_there_is_one_prompt_per_topic_and_task():
    assert len(PROMPTS) == 48
    for prompt, (task, topic) in PROMPTS.items():
        assert prompt == f"{task} the {topic} :" == prompt_text(task, topic)
        assert parse_prompt(f" {task}  the {topic} : ") == (task, topic)


@pytest.mark.parametrize("text", ["", "describe the moon :", "describe the garden"])
def test_other_text_is_no_prompt(text):
    with pytest.raises(UserError, match="not a prompt of the gold world"):
        parse_prompt(text)


def test_every_word_is_one_token_and_ids_are_dense(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token is None
    ids = [tokenizer(word)["input_ids"] for word in VOCABULARY]
    assert ids == [[i] for i in range(3, 3 + len(VOCABULARY))]
    assert len(tokenizer) == 3 + len(VOCABULARY)


def test_round_trip_is_exact_for_any_sequence_of_words(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3, len(tokenizer)) for _ in range(rng.randrange(1, 25))]
        text = tokenizer.decode(ids)
        assert text == " ".join(VOCABULARY[i - 3] for i in ids)
        assert tokenizer(text)["input_ids"] == ids


def test_prompt_and_response_concatenate_as_text_and_as_ids(tokenizer):
    rng = random.Random(1)
    for prompt in PROMPTS:
        response = demonstration(rng, prompt, rng.random())
        prompt_ids = tokenizer(prompt)["input_ids"]
        response_ids = tokenizer(response)["input_ids"]
        assert len(prompt_ids) == PROMPT_TOKENS
        assert tokenizer(prompt + response)["input_ids"] == prompt_ids + response_ids
        whole = tokenizer.decode([*prompt_ids, *response_ids, 1, 0, 0], skip_special_tokens=True)
        assert whole == prompt + response
        assert whole.startswith(tokenizer.decode(prompt_ids))
        # Glued to the colon, as after decoding a response alone, it still reads the same.
        glued = prompt + tokenizer.decode(response_ids)
        assert tokenizer(glued)["input_ids"] == prompt_ids + response_ids


def test_end_unknown_words_and_columns(tokenizer):
    encoded = tokenizer(" lovely dragons<eos>")
    assert encoded["input_ids"] == [tokenizer.convert_tokens_to_ids("lovely"), 2, 1]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer(["roses", "roses soil"], padding=True)["attention_mask"] == [[1, 0], [1, 1]]


def test_demonstrations_are_words_of_the_language_and_fit():
    rng = random.Random(2)
    lengths = []
    for _ in range(2000):
        text = demonstration(rng, draw_prompt(rng), rng.random())
        assert text[0] == " "
        assert text == " " + " ".join(text.split())
        words = text.split()
        assert set(words) <= set(VOCABULARY)
        lengths.append(len(words))
    assert min(lengths) >= 3
    assert max(lengths) <= MAX_RESPONSE_TOKENS - 1
    assert 9.5 < sum(lengths) / len(lengths) < 10.5


def _share(words: list[str], members: set[str]) -> float:
    return sum(word in members for word in words) / len(words)


def test_demonstrations_follow_the_generator_of_the_prototype():
    """Shares of phrases at quality 0 and 1, from the probabilities of the generator by hand."""
    flaws = {*language.NEGATIVE, *language.TOXIC}
    rng = random.Random(3)
    prompt = "describe the garden :"

    def phrases(quality: float) -> list[str]:
        return [" ".join(language._phrase(rng, "garden", quality)) for _ in range(20_000)]

    good, poor = phrases(1.0), phrases(0.0)
    tolerance = 4 * 0.5 / 20_000**0.5
    # Quality 1: u < 0.30 praise + topic word; u < 0.45 topic word; no flaws.
    assert abs(sum(" " in p for p in good) / 20_000 - 0.30) < tolerance
    assert abs(_share(good, set(CONTENT["garden"])) - 0.15) < tolerance
    assert _share(good, flaws) == 0.0
    # Quality 0: 0.05 praised; 0.15 topic word + 0.15 / 16 by straying; 0.10 negative;
    # 0.05 * 5/11 toxic.
    assert abs(sum(" " in p for p in poor) / 20_000 - 0.05) < tolerance
    assert abs(_share(poor, set(CONTENT["garden"])) - (0.15 + 0.15 / 16)) < tolerance
    strayed = set(TOPIC_OF) - set(CONTENT["garden"])
    assert abs(_share(poor, strayed) - 0.15 * 15 / 16) < tolerance
    assert abs(_share(poor, set(language.NEGATIVE)) - 0.10) < tolerance
    assert abs(_share(poor, set(language.TOXIC)) - 0.05 * 5 / 11) < tolerance
    assert demonstration(random.Random(4), prompt, 0.5) == demonstration(
        random.Random(4), prompt, 0.5
    )


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_quality_outside_its_range_is_refused(quality):
    with pytest.raises(ValueError, match="quality"):
        demonstration(random.Random(0), "describe the garden :", quality)


def test_language_and_gold_import_without_torch_or_transformers():
    code = (
        "import sys, shiftrm.world.gold, shiftrm.world.language; "
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
