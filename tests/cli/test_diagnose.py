"""`shiftrm diagnose` on real tiny reward models of known quality, and on bad input."""

import json
import random
from dataclasses import asdict

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaForSequenceClassification

from shiftrm.cli import main
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.measure.diagnosis.findings import read_data, score_data
from shiftrm.measure.sight import sight_tests
from shiftrm.models.scoring import Scorer
from tests.conftest import WORDS, llama_config

N = 40


def text(rng, low=1, high=9):
    return "".join(f" {rng.choice(WORDS.split())}" for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models with heads that are sharp, zero and tiny, one that counts tokens, and data."""
    path = tmp_path_factory.mktemp("diagnose")
    for name, scale in (("sharp", 30.0), ("zero", 0.0), ("tiny", 1e-4)):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(llama_config(num_labels=1))
        with torch.no_grad():
            model.score.weight.mul_(scale)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    length_loving().save_pretrained(path / "length")
    tokenizer.save_pretrained(path / "length")
    rng = random.Random(0)
    groups = [
        {"prompt": f"the{text(rng)}", "responses": [text(rng) for _ in range(4)]} for _ in range(N)
    ]
    write_jsonl(path / "groups.jsonl", groups)
    scorer = Scorer.from_pretrained(path / "sharp")
    rows = []
    while len(rows) < 3 * N:
        prompt, first, second = f"the{text(rng)}", text(rng), text(rng)
        a, b = scorer([prompt] * 2, [first, second])
        if first != second:
            chosen, rejected = (first, second) if a > b else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(path / "pairs.jsonl", rows)
    return path


def length_loving():
    """A real GPT-2 whose reward is its number of tokens, up to a factor and one part in 10^4.

    The position t is embedded as (t, -t, 1000, -1000): the layer norm divides by nearly the same
    number everywhere, and the head reads the first entry.
    """
    model = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=32, n_positions=64, n_embd=4, n_layer=1, n_head=1, num_labels=1,
            pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        position = torch.arange(64.0)
        far = torch.full_like(position, 1000.0)
        model.transformer.wpe.weight.copy_(torch.stack([position, -position, far, -far], dim=1))
        model.transformer.ln_f.weight.fill_(1000.0)
        model.score.weight[0, 0] = 1.0
    return model


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}
    yield folder
    assert {path.name for path in folder.iterdir()} == before, "nothing is left behind"


def run(capsys, *arguments):
    status = main(["diagnose", *map(str, arguments)])
    return status, capsys.readouterr()


def refused(capsys, message, *arguments):
    status, output = run(capsys, *arguments)
    assert status == 2
    assert message in output.err
    assert (output.err.count("\n"), output.out) == (1, "")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("sharp", ("tells apart", "sees")),
        ("zero", ("blind", "blind")),
        ("length", ("follows length", "follows length")),
    ],
)
def test_verdicts_on_real_models(here, tmp_path, capsys, model, words):
    status, output = run(
        capsys, "--model", model, "--data", "groups.jsonl", "labelled=pairs.jsonl",
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert (status, output.err) == (0, "")
    found = json.loads((tmp_path / "x.json").read_text())
    assert tuple(file["verdict"]["word"] for file in found["files"]) == words
    assert [(file["name"], file["kind"]) for file in found["files"]] == [
        ("groups", "groups"), ("labelled", "pairs"),
    ]  # fmt: skip
    assert f"groups: {words[0]}" in output.out
    assert f"labelled: {words[1]}" in output.out


def test_a_tiny_head_is_blind_by_its_own_account(here, capsys):
    status, output = run(capsys, "--model", "tiny", "--data", "groups.jsonl")
    assert (status, "groups: blind" in output.out) == (0, True)
    assert "100 % of the 240 comparisons" in " ".join(output.out.split())


def test_numbers_are_those_of_the_rewards(here, capsys, tmp_path):
    """Against Scorer and plain arithmetic."""
    run(capsys, "--model", "sharp", "--data", "pairs.jsonl", "--json", tmp_path / "n.json")
    (found,) = json.loads((tmp_path / "n.json").read_text())["files"]
    rows = read_jsonl("pairs.jsonl")
    scorer = Scorer.from_pretrained("sharp")
    prompts = [row["prompt"] for row in rows]
    chosen = scorer(prompts, [row["chosen"] for row in rows])
    rejected = scorer(prompts, [row["rejected"] for row in rows])
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    labels, spread = found["labels"], found["spread"]
    assert labels["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert labels["margin_mean"]["value"] == pytest.approx(sum(margins) / len(margins), rel=1e-5)
    assert spread["difference_variance"]["value"] == pytest.approx(
        sum(m * m for m in margins) / len(margins), rel=1e-4
    )
    assert found["lengths"]["length_mean"] == pytest.approx(
        sum(len((r["chosen"] + r["rejected"]).split()) + 2 for r in rows) / (2 * len(rows))
    ), "words and the end token; the prompt does not count"


def test_what_a_model_that_counts_tokens_pays_for(here, capsys, tmp_path):
    """Its reward is the number of words, the end token apart: one standard deviation for one."""
    status, output = run(
        capsys, "--model", "length", "--data", "groups.jsonl", "--output", tmp_path / "d"
    )
    (found,) = json.loads((tmp_path / "d" / "diagnosis.json").read_text())["pays"]
    assert status == 0
    prices = {price["feature"]: price["pays"]["value"] for price in found["prices"]}
    assert prices.pop("length") == pytest.approx(1, abs=0.01)
    assert all(abs(value) < 0.01 for value in prices.values())
    assert found["explained"] == pytest.approx(1, abs=0.01)
    said = "rises by 1.00 standard deviations with one standard deviation more words."
    assert said in " ".join(output.out.split())
    assert said in " ".join((tmp_path / "d" / "diagnosis.html").read_text().split())


def test_sight_tests_are_those_of_the_rewards(here, capsys, tmp_path):
    """A model that counts tokens: longer is better, whatever the prompt."""
    arguments = ("--model", "length", "--data", "groups.jsonl", "labelled=pairs.jsonl")
    _, output = run(capsys, *arguments, "--sight-pairs", "80", "--json", tmp_path / "n.json")
    groups, pairs = json.loads((tmp_path / "n.json").read_text())["files"]
    assert pairs["sight"] == []
    tests = {test["kind"]: test for test in groups["sight"]}
    assert tests["cut"]["share"]["value"] == 1.0
    assert tests["shuffled"]["share"]["value"] == pytest.approx(0.5, abs=0.15), "rounding"
    # Repeated: longer (worth 0) or of the same length (worth about one half).
    assert tests["repeated"]["share"]["value"] < 0.5
    assert tests["other_prompt"]["share"]["low"] < 0.5 < tests["other_prompt"]["share"]["high"]
    assert tests["language"]["share"] is None
    assert tests["language"]["reason"]
    assert all(test["pairs"] <= 80 for test in tests.values())
    said = " ".join(output.out.split())
    assert "Sight tests: how often the response is preferred" in said
    assert "! Sight test: the response beats a response to another prompt in" in said
    assert "> Adapt the model to these responses (shiftrm adapt --method contrast_all" in said
    # The same, by the library.
    scorer = Scorer.from_pretrained("length")
    again = sight_tests(scorer, read_jsonl("groups.jsonl"), count=80)
    assert [asdict(test) for test in again] == list(tests.values())


def test_sight_tests_can_be_switched_off(here, capsys, tmp_path):
    arguments = ("--model", "sharp", "--data", "groups.jsonl", "--json", tmp_path / "n.json")
    _, output = run(capsys, *arguments, "--sight-pairs", "0")
    assert json.loads((tmp_path / "n.json").read_text())["files"][0]["sight"] == []
    assert "Sight test" not in output.out
    status, output = run(capsys, *arguments, "--sight-pairs", "-1")
    assert (status, len(output.err.splitlines())) == (2, 1)


def test_page_and_numbers_in_a_folder(here, capsys, tmp_path):
    status, output = run(
        capsys, "--model", "before=tiny", "--model", "after=sharp",
        "--data", "sft=groups.jsonl", "labelled=pairs.jsonl", "--output", tmp_path / "d",
    )  # fmt: skip
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "diagnosis.html", "diagnosis.json",
    ]  # fmt: skip
    assert f"Page: {tmp_path / 'd' / 'diagnosis.html'}" in output.out
    found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert [file["model"] for file in found["files"]] == ["before", "before", "after", "after"]
    sft, labelled = found["comparisons"]
    assert sft["reading"].startswith("louder; whether")
    assert labelled["reading"] == "louder, not sharper", "a smaller head ranks the same"
    assert labelled["accuracy_change"]["value"] == 0.0
    assert found["thresholds"]["SEES_ACCURACY"] == 0.6


def test_chats_and_whole_transcripts(here, capsys, tmp_path):
    """Messages, and pairs without a prompt: lengths are of what comes after the shared start."""
    user = {"role": "user", "content": "the red"}

    def says(content):
        return [{"role": "assistant", "content": content}]

    chats = tmp_path / "chats.jsonl"
    write_jsonl(
        chats,
        [
            {"prompt": [user], "responses": [says("cat"), says("dog runs"), "fish"]}
            for _ in range(2)
        ],
    )
    whole = tmp_path / "whole.jsonl"
    write_jsonl(
        whole,
        [
            {"chosen": [user, *says("cat")], "rejected": [user, *says("a dog")]},
            {"chosen": [user, *says("bird")], "rejected": [user, *says("a dog")]},
        ],
    )
    text_only = tmp_path / "text.jsonl"
    write_jsonl(text_only, [{"chosen": "the red cat sits", "rejected": "the red dog"}])
    scorer = Scorer.from_pretrained("sharp")

    def score(path):
        return score_data(scorer, read_data(str(path), "x"), model="m")[0]

    # the template's opening "<s> assistant" is the prompt's; the words and " </s>" are left
    lengths = [r.length for r in score(chats).groups[0].responses]
    assert lengths == [2, 3, 2]
    pairs = score(whole).pairs
    assert (pairs[0].chosen.length, pairs[0].rejected.length) == (2, 3)
    assert pairs[0].prompt == pairs[1].prompt, "both begin with the same messages"
    pair = score(text_only).pairs[0]
    assert (pair.chosen.length, pair.rejected.length) == (3, 2), "cat sits </s> against dog </s>"
    status, _ = run(capsys, "--model", "sharp", "--data", chats, whole, text_only)
    assert status == 0


def test_unfinished_and_repeated_responses(here):
    data = read_data("groups.jsonl", "x")
    row = {"prompt": "the", "responses": [" cat", " cat", " cat"], "finished": [True, True, False]}
    data = type(data)("x", "x", "groups", (("x:1", row),))
    scored, _ = score_data(Scorer.from_pretrained("sharp"), data, model="m")
    first, second, third = scored.groups[0].responses
    assert first == second, "the same tokens: the same key, to the last bit the same reward"
    assert (third.finished, third.key == first.key) == (False, False), "left open: other tokens"


def test_rows_that_are_too_long_are_left_out_and_counted(here, capsys, tmp_path):
    rows = [*read_jsonl("groups.jsonl"), {"prompt": "the", "responses": [" cat" * 70, " dog"]}]
    write_jsonl(tmp_path / "long.jsonl", rows)
    status, output = run(capsys, "--model", "sharp", "--data", tmp_path / "long.jsonl")
    assert status == 0
    assert "1 row(s) longer than the model's context left out" in output.out
    assert f"{N} groups" in output.out
    write_jsonl(tmp_path / "all.jsonl", rows[-1:])
    message = "every row is longer than the model's context (64 tokens)"
    refused(capsys, message, "--model", "sharp", "--data", tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.jsonl: the file has no rows; expected groups or preference pairs"),
        ('{"prompt": "a", "responses": ["b"]}', "bad.jsonl:1: the group has 1 response(s)"),
        ('{"text": "a"}', "bad.jsonl:1: neither a group (columns 'prompt', 'responses')"),
        ('{"chosen": "a", "rejected": "a"}', "bad.jsonl:1: chosen and rejected are equal"),
        ('{"chosen": "a", "rejected": "b"}\n{"prompt": "a", "responses": ["a", "b"]}',
         "bad.jsonl:2: column 'chosen' is missing"),
        ('{"prompt": "a"', "bad.jsonl:1: not valid JSON"),
        ('{"prompt": [{"role": "user"}], "responses": ["a", "b"]}', "message 1 has no 'content'"),
    ],
)  # fmt: skip
def test_bad_files(here, capsys, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    data = ["--data", "groups.jsonl", tmp_path / "bad.jsonl", "--output", tmp_path / "o"]
    refused(capsys, message, "--model", "sharp", *data)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "x=groups.jsonl", "x=pairs.jsonl"], "--data: two are called 'x'"),
        (["--data", "=groups.jsonl"], "--data '=groups.jsonl': expected PATH or NAME=PATH"),
        (["--model", "nowhere"], "nowhere: cannot be loaded as a reward model"),
        (["--model", "sharp"], "--model: two are called 'sharp'"),
        (["--output", "groups.jsonl"], "groups.jsonl: is not a folder"),
        (["--output", "groups.jsonl/x.html"], "groups.jsonl is not a folder"),
        (["--json", "."], ".: is a folder"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_options(here, capsys, arguments, message):
    base = ["--model", "sharp"]
    if "--data" not in arguments:
        base += ["--data", "groups.jsonl"]
    refused(capsys, message, *base, *arguments)


def test_models_of_the_wrong_kind(here, capsys, tmp_path, policy, tokenizer):
    policy.save_pretrained(tmp_path / "policy")
    LlamaForSequenceClassification(llama_config(num_labels=3)).save_pretrained(tmp_path / "three")
    broken = LlamaForSequenceClassification(llama_config(num_labels=1))
    with torch.no_grad():
        broken.score.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "nan")
    for name in ("policy", "three", "nan"):
        tokenizer.save_pretrained(tmp_path / name)
    for name, message in (
        ("policy", "has no score head"),
        ("three", "three has num_labels=3"),
        ("nan", "groups.jsonl:1: nan gives a reward that is not a number"),
    ):
        refused(capsys, message, "--model", tmp_path / name, "--data", "groups.jsonl")


def test_names_are_shown_as_they_are(here, capsys, monkeypatch):
    """Square brackets are markup to rich."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    status, output = run(capsys, "--model", "[/b]=zero", "--data", "[red]=groups.jsonl")
    assert (status, "[red]: blind" in output.out) == (0, True)


def test_a_full_disk_leaves_neither_page_nor_numbers(folder, tmp_path, monkeypatch, capsys, disk):
    monkeypatch.chdir(tmp_path)
    command = ["diagnose", "--model", folder / "sharp", "--data", folder / "pairs.jsonl"]
    command = [str(word) for word in [*command, "--output", "disk/x", "--sight-pairs", 0]]
    mounted = disk("60k")
    assert main(command) == 2
    assert "disk/x/diagnosis.html: No space left on device" in capsys.readouterr().err
    assert list(mounted.iterdir()) == []
    disk("9m")
    assert main(command) == 0
    assert sorted(p.name for p in (mounted / "x").iterdir()) == ["diagnosis.html", "diagnosis.json"]
