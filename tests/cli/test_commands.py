"""sample, train and score on a user's files: real models, and one line for every mistake."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

from shiftrm.cli import main
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.scoring import Scorer

QUICK = ["max_steps=2", "logging_steps=1", "disable_tqdm=true"]


@pytest.fixture
def files(tmp_path, policy, tokenizer, pairs, groups):
    """A policy checkpoint and data files, as a user would have them."""
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "groups.jsonl", groups)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the red"}, {"prompt": "a dog"}])
    return tmp_path


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, capsys.readouterr()


def test_from_a_policy_to_scores(files, capsys):
    """sample -> train with groups -> score, each reading what the one before wrote."""
    status, _ = run(
        capsys,
        "sample",
        "--policy",
        files / "policy",
        "--prompts",
        files / "prompts.jsonl",
        "--output",
        files / "sampled.jsonl",
        "--responses",
        3,
        "--max-new-tokens",
        5,
    )
    assert status == 0
    assert [len(g["responses"]) for g in read_jsonl(files / "sampled.jsonl")] == [3, 3]

    status, output = run(
        capsys,
        "train",
        "--model",
        files / "policy",
        "--pairs",
        files / "pairs.jsonl",
        "--eval-pairs",
        files / "pairs.jsonl",
        "--groups",
        files / "sampled.jsonl",
        "--output",
        files / "reward",
        "preset=scale_free",
        "learning_rate=1e-3",
        *QUICK,
    )
    assert status == 0
    assert "Trained on 12 pairs (0 dropped) for 2 steps" in output.out
    assert "Accuracy on 12 held-out pairs:" in output.out
    assert "The meta step changed the gradient by" in output.out
    assert AutoModelForSequenceClassification.from_pretrained(files / "reward").num_labels == 1
    assert not [p for p in files.iterdir() if p.name.startswith(".")], "no work folder is left"

    status, _ = run(
        capsys,
        "score",
        "--model",
        files / "reward",
        "--data",
        files / "sampled.jsonl",
        "--output",
        files / "scored.jsonl",
    )
    assert status == 0
    scored = read_jsonl(files / "scored.jsonl")
    row = scored[1]
    expected = Scorer.from_pretrained(files / "reward")(
        [row["prompt"]] * 3, row["responses"], finished=row["finished"]
    )
    assert row["rewards"] == pytest.approx(expected, abs=1e-6)


def test_the_three_kinds_of_rows(files, reward_model, tokenizer, capsys):
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
    status, _ = run(
        capsys,
        "score",
        "--model",
        files / "rm",
        "--data",
        files / "mixed.jsonl",
        "--output",
        files / "out.jsonl",
    )
    assert status == 0
    one, several, pair = read_jsonl(files / "out.jsonl")
    assert one["reward"] == pytest.approx(several["rewards"][0], abs=1e-6)
    assert one["reward"] == pytest.approx(pair["reward_chosen"], abs=1e-6)
    assert several["rewards"][1] == pytest.approx(pair["reward_rejected"], abs=1e-6)
    assert pair["id"] == 7, "other columns stay"


BAD_FILES = {
    "empty": ("", "the file has no"),
    "malformed": ('{"prompt": "a", "chosen": "b"', "bad.jsonl:1: not valid JSON"),
    "missing column": ('{"prompt": "a", "chosen": "b"}', "column 'rejected' is missing"),
    "equal sides": ('{"chosen": "b", "rejected": "b"}', "chosen and rejected are equal"),
    "one response": ('{"prompt": "a", "responses": ["b"]}', "the group has 1 response"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_one_line_and_status_2(files, capsys, kind):
    content, message = BAD_FILES[kind]
    (files / "bad.jsonl").write_text(content)
    before = sorted(files.iterdir())
    which = "--groups" if kind == "one response" else "--pairs"
    data = {"--pairs": files / "pairs.jsonl", which: files / "bad.jsonl"}
    arguments = [word for item in data.items() for word in item]
    status, output = run(
        capsys, "train", "--model", files / "policy", *arguments, "--output", files / "out", *QUICK
    )
    assert status == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert sorted(files.iterdir()) == before, "nothing half-written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rat=1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["output_dir=x"], "unknown setting 'output_dir'; this command sets it"),
        (["max_steps"], "'max_steps' is not a setting"),
        (["--groups", "groups.jsonl", "preset=papre"], "did you mean 'paper'?"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--output", "policy"], "policy: already there and not empty"),
    ],
)
def test_bad_settings(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    status, output = run(
        capsys,
        "train",
        "--model",
        "policy",
        "--pairs",
        "pairs.jsonl",
        "--output",
        "out",
        *arguments,
        *QUICK,
    )
    assert status == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_a_prompt_longer_than_the_context(files, capsys):
    write_jsonl(files / "long.jsonl", [{"prompt": "the"}, {"prompt": "the " * 70}])
    status, output = run(
        capsys,
        "sample",
        "--policy",
        files / "policy",
        "--prompts",
        files / "long.jsonl",
        "--output",
        files / "g.jsonl",
        "--max-new-tokens",
        5,
    )
    assert status == 2
    assert "prompt 1 has 70 tokens" in output.err
    assert not (files / "g.jsonl").exists()


def test_models_of_the_wrong_kind(files, reward_model, tokenizer, capsys):
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    status, output = run(
        capsys,
        "score",
        "--model",
        files / "policy",
        "--data",
        files / "groups.jsonl",
        "--output",
        files / "o.jsonl",
    )
    assert (status, "has no score head" in output.err) == (2, True)
    status, output = run(
        capsys,
        "sample",
        "--policy",
        files / "rm",
        "--prompts",
        files / "prompts.jsonl",
        "--output",
        files / "o.jsonl",
    )
    assert (status, "not a causal language model" in output.err) == (2, True)
    status, output = run(
        capsys,
        "sample",
        "--policy",
        files / "nowhere",
        "--prompts",
        files / "prompts.jsonl",
        "--output",
        files / "o.jsonl",
    )
    assert (status, "cannot be loaded" in output.err) == (2, True)
    (files / "x.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    status, output = run(
        capsys,
        "score",
        "--model",
        files / "rm",
        "--data",
        files / "x.jsonl",
        "--output",
        files / "o.jsonl",
    )
    assert (status, "x.jsonl:1: nothing to score" in output.err) == (2, True)
    assert not (files / "o.jsonl").exists()
