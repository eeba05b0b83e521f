"""sample, train and score on a user's files: real models, and one line for every mistake."""

import shutil

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import Scorer
from tests.cli.conftest import refused
from tests.conftest import llama_config, move_weights

TRAIN = "train --model policy --pairs pairs.jsonl --output out"
QUICK = ["max_steps=2", "logging_steps=1", "disable_tqdm=true"]


@pytest.fixture
def scoring(files, reward_model, tokenizer, monkeypatch):
    """A reward model beside the files, and the working folder among them."""
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    monkeypatch.chdir(files)
    return files


def test_from_a_policy_to_scores(files, shiftrm):
    """sample -> train with groups -> score, each reading what the one before wrote."""
    status, _ = shiftrm(
        "sample --policy policy --prompts prompts.jsonl --output sampled.jsonl "
        "--responses 3 --max-new-tokens 5"
    )
    assert status == 0
    assert [len(g["responses"]) for g in read_jsonl(files / "sampled.jsonl")] == [3, 3]

    status, output = shiftrm(
        "train --model policy --pairs pairs.jsonl --eval-pairs pairs.jsonl --groups "
        "sampled.jsonl --output reward preset=scale_free learning_rate=1e-3",
        *QUICK,
    )
    assert status == 0
    assert "Trained on 12 pairs (0 dropped) for 2 steps" in output.out
    assert "Accuracy on 12 held-out pairs:" in output.out
    assert "The meta step changed the gradient by" in output.out
    assert AutoModelForSequenceClassification.from_pretrained(files / "reward").num_labels == 1
    assert not [p for p in files.iterdir() if p.name.startswith(".")], "no work folder is left"

    status, _ = shiftrm("score --model reward --data sampled.jsonl --output scored.jsonl")
    assert status == 0
    scored = read_jsonl(files / "scored.jsonl")
    row = scored[1]
    sampled = [[*row["prompt_ids"], *ids] for ids in row["response_ids"]]
    expected = Scorer.from_pretrained(files / "reward").score_ids(sampled)
    assert row["rewards"] == pytest.approx(expected, abs=1e-6)


def test_the_three_kinds_of_rows(files, reward_model, tokenizer, shiftrm):
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    write_jsonl(
        files / "mixed.jsonl",
        [
            {"prompt": "the", "response": " red cat"},
            {"prompt": "the", "responses": [" red cat", " dog"]},
            {"chosen": "the red cat", "rejected": "the dog", "id": 7},
        ],
    )
    status, _ = shiftrm("score --model rm --data mixed.jsonl --output out.jsonl")
    assert status == 0
    one, several, pair = read_jsonl(files / "out.jsonl")
    assert one["reward"] == pytest.approx(several["rewards"][0], abs=1e-6)
    assert one["reward"] == pytest.approx(pair["reward_chosen"], abs=1e-6)
    assert several["rewards"][1] == pytest.approx(pair["reward_rejected"], abs=1e-6)
    assert pair["id"] == 7, "other columns stay"

    status, said = shiftrm("score --model rm --data out.jsonl --output again.jsonl")
    assert status == 0
    assert "replaced: reward (1), rewards (1), reward_chosen (1), reward_rejected (1)" in said.out
    assert read_jsonl(files / "again.jsonl") == read_jsonl(files / "out.jsonl")


BAD_FILES = {
    "empty": ("", "the file has no"),
    "malformed": ('{"prompt": "a", "chosen": "b"', "bad.jsonl:1: not valid JSON"),
    "missing column": ('{"prompt": "a", "chosen": "b"}', "column 'rejected' is missing"),
    "equal sides": ('{"chosen": "b", "rejected": "b"}', "chosen and rejected are equal"),
    "one response": ('{"prompt": "a", "responses": ["b"]}', "the group has 1 response"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_one_line_and_status_2(files, shiftrm, kind):
    content, message = BAD_FILES[kind]
    (files / "bad.jsonl").write_text(content)
    which = "--groups" if kind == "one response" else "--pairs"
    words = f"train --model policy --pairs pairs.jsonl {which} bad.jsonl --output out"
    refused(shiftrm, [words, *QUICK], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rat=1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["output_dir=x"], "unknown setting 'output_dir'; this command sets it"),
        (["max_steps"], "'max_steps' is not a setting"),
        (["--groups", "groups.jsonl", "preset=papre"], "did you mean 'paper'?"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--output", "policy"], "policy: already there and not empty"),
        (["--output", "pairs.jsonl"], "pairs.jsonl: is not a folder"),
        (["--output", "pairs.jsonl/out"], "pairs.jsonl is not a folder"),
        (["learning_rate=[1"], "learning_rate=[1: the value is not valid YAML"),
        (["learning_rate=fast"], "learning_rate is 'fast'; expected a number"),
        (["learning_rate=-1"], "learning_rate is -1; it must be at least 0"),
        (["weight_decay=null"], "weight_decay is 'null'; expected a number"),
        (["adam_beta1=1"], "adam_beta1 is 1; it must be below 1"),
        (["center_rewards_coefficient=x"], "center_rewards_coefficient is 'x'; expected a number"),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps is 0; it must be at"),
        (["gradient_accumulation_steps=1.5"], "is '1.5'; expected a whole number"),
        (["max_length=0"], "max_length is 0; it must be at least 1"),
        (["pad_to_multiple_of=0"], "pad_to_multiple_of is 0; it must be at least 1"),
        (["bf16=maybe"], "bf16 is 'maybe'; expected true or false, or null"),
        (["eos_token=foo"], "`eos_token` ('foo') is not found"),
        (["--groups", "groups.jsonl", "meta_batch_size=0"], "meta_batch_size is 0"),
    ],
)
def test_bad_settings(shiftrm, arguments, message):
    refused(shiftrm, [TRAIN, *arguments, *QUICK], message)


def test_a_prompt_longer_than_the_context(files, shiftrm):
    write_jsonl(files / "long.jsonl", [{"prompt": "the"}, {"prompt": "the " * 70}])
    words = "sample --policy policy --prompts long.jsonl --output g.jsonl --max-new-tokens 5"
    refused(shiftrm, words, "long.jsonl:2: the prompt has 70 tokens")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("score --model policy --data groups.jsonl", "has no score head"),
        ("sample --policy rm --prompts prompts.jsonl", "not a causal language model"),
        ("sample --policy nowhere --prompts prompts.jsonl", "cannot be loaded"),
    ],
)
def test_models_of_the_wrong_kind(scoring, shiftrm, words, message):
    refused(shiftrm, f"{words} --output o.jsonl", message)


CHAT = [{"role": "assistant", "content": "the cat"}]
AT = "bad.jsonl:2: column '{}', message 1 has no '{}'"
BAD_PAIRS = {
    "mixed": (
        {"prompt": [], "chosen": CHAT, "rejected": [{"role": "user", "content": "a"}]},
        "bad.jsonl:2: column 'prompt' is a list of messages, but text at",
    ),
    "margin": ({"chosen": "a", "rejected": "b", "margin": 1}, "bad.jsonl:2: column 'margin'"),
    "no role": (
        {"chosen": [{"content": "a"}], "rejected": CHAT},
        "bad.jsonl:2: column 'chosen', message 1 has no 'role'",
    ),
    "no content": (
        {"chosen": CHAT, "rejected": [{"role": "a"}]},
        "bad.jsonl:2: column 'rejected', message 1 has no 'content'",
    ),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_bad_pairs_are_named(files, shiftrm, kind):
    row, message = BAD_PAIRS[kind]
    write_jsonl(files / "bad.jsonl", [{"prompt": "the", "chosen": "a", "rejected": "b"}, row])
    refused(shiftrm, ["train --model policy --pairs bad.jsonl --output out", *QUICK], message)


@pytest.mark.parametrize("word", ["None", "none", "null", "~"])
def test_null_settings_and_columns_of_ones_own(files, shiftrm, pairs, word):
    """`max_length=None` keeps pairs of any length; an `id` of two types is nobody's business."""
    rows = [
        {**row, "id": number if number % 2 else str(number)} for number, row in enumerate(pairs)
    ]
    write_jsonl(files / "pairs.jsonl", rows)
    status, output = shiftrm(TRAIN, f"max_length={word}", "max_steps=1e0", *QUICK[1:])
    assert status == 0
    assert "Trained on 12 pairs (0 dropped) for 1 steps" in output.out


def test_models_that_cannot_be_trained(files, shiftrm, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(files / "policy")
    two = LlamaForSequenceClassification(llama_config(num_labels=2))
    two.save_pretrained(files / "two")
    tokenizer.save_pretrained(files / "two")
    for model, message in (
        ("policy", "policy: the tokenizer has neither a pad nor an EOS token"),
        ("two", "two: its weights do not fit a reward model of one label"),
    ):
        status, output = shiftrm(TRAIN, "--model", model, *QUICK)
        assert status == 2
        assert message in output.err.splitlines()[-1]
        assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": "red"}, "d.jsonl:2: column 'responses' holds str; expected a list"),
        ({"responses": []}, "d.jsonl:2: column 'responses' is an empty list"),
        ({"responses": ["a", None]}, "d.jsonl:2: response 2 holds NoneType"),
        ({"responses": ["a", "b"], "finished": [True]}, "d.jsonl:2: 'finished' has 1 entries"),
        ({"responses": ["a"], "finished": "yes"}, "d.jsonl:2: column 'finished' must be a list"),
        ({"response": None}, "d.jsonl:2: column 'response' holds NoneType"),
        ({"response": 3}, "d.jsonl:2: column 'response' holds int"),
        ({"response": "a", "finished": "no"}, "d.jsonl:2: column 'finished' is 'no'"),
        ({"prompt": {}, "response": "a"}, "d.jsonl:2: column 'prompt' holds dict"),
        ({"chosen": "a", "rejected": None}, "d.jsonl:2: column 'rejected' holds NoneType"),
        ({"response": [{"role": "user"}]}, "d.jsonl:2: column 'response', message 1 has no"),
        ({"response": "", "finished": False}, "d.jsonl:2: prompt and response are empty"),
        ({"response": "the " * 70}, "d.jsonl:2: prompt and response have 71 tokens"),
        ({"text": "a"}, "d.jsonl:2: nothing to score"),
        (None, "d.jsonl: the file has no rows"),
    ],
)
def test_rows_that_cannot_be_scored(scoring, shiftrm, row, message):
    rows = [{"prompt": "the", "response": " cat"}, row] if row is not None else []
    write_jsonl("d.jsonl", rows)
    refused(shiftrm, "score --model rm --data d.jsonl --output scored.jsonl", message)


SCORE = ["score", "--model", "rm", "--data", "groups.jsonl", "--output", "o.jsonl"]
SAMPLE = ["sample", "--policy", "policy", "--prompts", "prompts.jsonl", "--output", "o.jsonl"]


@pytest.mark.parametrize("command", [SCORE, SAMPLE])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--output", "policy"], "policy: is a folder; give the name of a file"),
        (["--output", "."], ".: is a folder; give the name of a file"),
        (["--output", ""], ".: is a folder; give the name of a file"),
        (["--output", "pairs.jsonl/o"], "pairs.jsonl is not a folder; choose another --output"),
        (["--output", "o.csv"], "o.csv: the output is JSON lines; call it o.jsonl"),
        (["--output", "pairs.jsonl/o/p"], "pairs.jsonl is not a folder; choose another --output"),
    ],
)
def test_outputs_that_cannot_be(scoring, shiftrm, command, arguments, message):
    refused(shiftrm, [*command, *arguments], message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "p.jsonl:2: the prompt is empty: there are no tokens to continue"),
        (None, "p.jsonl:2: column 'prompt' holds NoneType"),
        ([], "p.jsonl:2: column 'prompt' is an empty list"),
        ([{"role": "user"}], "p.jsonl:2: column 'prompt', message 1 has no 'content'"),
    ],
)
def test_prompts_that_cannot_be_continued(scoring, shiftrm, prompt, message):
    write_jsonl("p.jsonl", [{"prompt": "the"}, {"prompt": prompt}])
    refused(shiftrm, [*SAMPLE, "--prompts", "p.jsonl", "--max-new-tokens", "4"], message)


def test_a_group_file_that_is_there(scoring, shiftrm):
    options = ["--max-new-tokens", "4", "--responses", "2"]
    assert shiftrm(*SAMPLE, *options)[0] == 0
    content = (scoring / "o.jsonl").read_bytes()
    status, output = shiftrm(*SAMPLE, *options)
    assert (status, "o.jsonl: already there, 2 groups" in output.out) == (0, True)
    assert "left as it is" in output.out
    shutil.copytree("policy", "moved")
    move_weights("moved")
    for other in (["--policy", "moved"], ["--temperature", "0.5"], ["--seed", "1"]):
        status, output = shiftrm(*SAMPLE, *options, *other)
        assert status == 2
        assert "o.jsonl: already there with groups of another policy, or sampled" in output.err
    status, output = shiftrm(*SAMPLE, *options, "--responses", "3")
    assert (status, "already there with groups of 2 responses, not 3" in output.err) == (2, True)
    write_jsonl("prompts.jsonl", [{"prompt": "the red"}])
    status, output = shiftrm(*SAMPLE, *options)
    assert (status, "already there with 2 groups, not 1" in output.err) == (2, True)
    assert (scoring / "o.jsonl").read_bytes() == content
