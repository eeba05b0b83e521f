"""shiftrm convert: rows, what was dropped, and nothing written when something is wrong."""

import json
import os

import pytest

from shiftrm.cli import main
from shiftrm.data.named import FORMATS
from shiftrm.files import read_jsonl, write_jsonl
from tests.cli.conftest import refused
from tests.data.public_schemas import (
    hh_row,
    hh_rows,
    write_hh,
    write_hh_folder,
    write_oasst1,
    write_rows,
)
from tests.gguf_files import model_and_tokenizer, write_gguf


@pytest.fixture
def shiftrm(tmp_path, capsys, monkeypatch):
    """shiftrm("convert", ...) -> (status, output), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(words, *arguments):
        status = main([*words.split(), *map(str, arguments)])
        return status, capsys.readouterr()

    return run


def test_pairs_with_what_was_dropped(shiftrm, tmp_path):
    rows = [
        *hh_rows(17),
        hh_row("a", chosen="b", rejected="b"),
        hh_row("x", chosen="", rejected="y"),
    ]
    write_rows(tmp_path / "hh.jsonl.gz", [*rows, rows[0]])
    status, output = shiftrm(
        "convert hh_rlhf hh.jsonl.gz --kind pairs --output out/pairs.jsonl --dropped "
        "out/dropped.jsonl responses=single"
    )
    assert (status, output.err) == (0, "")
    assert output.out == (
        "17 pairs kept: out/pairs.jsonl\n"
        "3 dropped (15.0%): equal sides 1 (5.0%), empty response 1 (5.0%), duplicate 1 (5.0%)\n"
    )
    assert len(read_jsonl("out/pairs.jsonl")) == 17
    assert read_jsonl("out/dropped.jsonl") == [
        {"where": "hh.jsonl.gz:18", "reason": "equal_sides"},
        {"where": "hh.jsonl.gz:19", "reason": "empty_response"},
        {"where": "hh.jsonl.gz:20", "reason": "duplicate"},
    ]
    assert sorted(os.listdir("out")) == ["dropped.jsonl", "pairs.jsonl"]


def test_splits_and_evaluation(shiftrm, tmp_path):
    write_hh_folder(tmp_path / "hh", 30)
    words = ["convert", "hh_rlhf", "hh", "--kind", "prompts", "subset=harmless"]
    status, output = shiftrm(*words, "--split=test", "--output", "test.jsonl")
    assert (status, output.out) == (0, "6 prompts kept: test.jsonl\nNothing was dropped.\n")
    test = read_jsonl("test.jsonl")
    write_rows(tmp_path / "hh/harmless-base/train.jsonl.gz", hh_rows(40))
    write_jsonl("known.jsonl", [*test, {"prompt": [{"role": "user", "content": "z"}]}])
    known = read_prompts_of(hh_rows(40), 2)
    write_jsonl("more.jsonl", known)
    status, output = shiftrm(
        *words,
        *("--output", "train.jsonl", "--evaluation", "known.jsonl", "--evaluation", "more.jsonl"),
        *("--eval-output", "eval.jsonl", "--eval-share", "0.3", "--dropped", "dropped.jsonl"),
    )
    assert status == 0
    train, held_out = read_jsonl("train.jsonl"), read_jsonl("eval.jsonl")
    assert len(train) + len(held_out) == 38
    assert output.out.splitlines() == [
        f"{len(train)} prompts kept: train.jsonl",
        f"2 dropped ({2 / (len(train) + 2):.1%}): in evaluation 2 ({2 / (len(train) + 2):.1%})",
        f"{len(held_out)} prompts to evaluate on: eval.jsonl",
    ]
    keys = [{json.dumps(row["prompt"]) for row in rows} for rows in (train, held_out, known)]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]


def read_prompts_of(rows, count):
    from shiftrm.data.formats.hh_rlhf import hh_pair

    return [{"prompt": hh_pair(row, "")["prompt"]} for row in rows[:count]]


def test_options_may_stand_anywhere(shiftrm, tmp_path):
    write_oasst1(tmp_path / "oasst.jsonl", 5)
    status, output = shiftrm(
        "convert --kind pairs lang=en oasst1 --output pairs.jsonl oasst.jsonl limit=4"
    )
    assert (status, output.out.splitlines()[0]) == (0, "4 pairs kept: pairs.jsonl")


GOOD = ("convert", "hh_rlhf", "hh.jsonl", "--kind", "pairs", "--output", "pairs.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "hh", *GOOD[2:]), "unknown format 'hh'"),
        ((*GOOD, "subst=helpful"), "hh_rlhf: no option 'subst'; did you mean 'subset'?"),
        ((*GOOD, "subset=helpful"), "hh.jsonl: is one file, so subset=helpful has no effect"),
        ((*GOOD, "limit=0"), "limit is 0"),
        ((*GOOD, "--split", "test"), "hh.jsonl: is one file, so --split has no effect"),
        (
            ("convert", "tldr", *GOOD[2:]),
            "tldr: gives no 'pairs'; it gives demonstrations, prompts",
        ),
        (("convert", "pku", *GOOD[2:]), "preference is not given; give preference=helpful"),
        (("convert", "pku", *GOOD[2:], "preference=helpful"), "hh.jsonl:1: column 'better_resp"),
        ((*GOOD[:-1], "hh.jsonl"), "hh.jsonl: this command already reads or writes it"),
        (
            (*GOOD, "--dropped", "./pairs.jsonl"),
            "./pairs.jsonl: this command already reads or writes",
        ),
        ((*GOOD[:-1], "pairs.csv"), "pairs.csv: the output is JSON lines"),
        ((*GOOD, "--eval-share", "0.1"), "--eval-share needs --eval-output"),
        ((*GOOD, "--eval-output", "e.jsonl", "--eval-share", "2"), "the share to evaluate on is 2"),
        ((*GOOD, "--evaluation", "gone.jsonl"), "gone.jsonl: no such file"),
        ((*GOOD, "--evaluation", "hh.jsonl"), "hh.jsonl:1: no prompt"),
        (("convert", "hh_rlhf", "gone.jsonl", *GOOD[3:]), "gone.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(shiftrm, tmp_path, arguments, message):
    write_hh(tmp_path / "hh.jsonl", 6)
    refused(shiftrm, arguments, message)


OWN_FORMAT = """
from dataclasses import dataclass

from shiftrm.data.loaded import Options, each, option, pair_of, prompts_of
from shiftrm.data.named import Format
from shiftrm.data.sources import iterate_rows

@dataclass(frozen=True)
class VoteOptions(Options):
    least: int = option(1, "votes by which the better answer must lead")
    side: str = option("both", "who voted", choices=("both", "experts"))

def read(source, kind, split, options):
    def pair(row, where):
        better, worse = sorted(row["answers"], key=lambda answer: -answer["votes"])
        if better["votes"] - worse["votes"] < options.least:
            return "close_vote"
        return pair_of(row["question"], better["text"], worse["text"])

    pairs = each(pair, iterate_rows(source, required=("question", "answers"), split=split))
    return pairs if kind == "pairs" else prompts_of(pairs)

VOTES = Format("questions with two answers", ("pairs", "prompts"), read, VoteOptions)
"""


def test_a_format_defined_outside_the_package(shiftrm, tmp_path):
    (tmp_path / "my_votes.py").write_text(OWN_FORMAT)
    answers = [{"text": "no", "votes": 1}, {"text": "yes", "votes": 4}]
    rows = [
        {"question": "a?", "answers": answers},
        {"question": "b?", "answers": answers[:1] * 2},
    ]
    write_jsonl("votes.jsonl", rows)
    given = ("convert", "my_votes:VOTES", "votes.jsonl", "--output", "out.jsonl", "--kind")
    refused(shiftrm, (*given, "demonstrations"), "my_votes:VOTES: gives no 'demonstrations'")
    refused(shiftrm, (*given, "pairs", "lest=3"), "no option 'lest'; did you mean 'least'?")
    refused(shiftrm, (*given, "pairs", "side=all"), "side is 'all'; give 'both' or 'experts'")
    status, output = shiftrm(*given, "pairs", "least=3")
    assert (status, output.err) == (0, "")
    assert "1 dropped (50.0%): close vote 1" in output.out
    assert read_jsonl("out.jsonl") == [{"prompt": "a?", "chosen": "yes", "rejected": "no"}]


def test_a_policy_from_a_gguf_file(shiftrm, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = model_and_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind="Q8_0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    here = ("convert", "gguf", "tiny.gguf", "--output")
    refused(shiftrm, (*here, "full"), "full: already there and not empty")
    refused(shiftrm, (*here, "tiny.gguf"), "tiny.gguf: is not a folder")
    refused(shiftrm, (*here, "policy", "--kind", "pairs"), "--kind has no effect on a GGUF file")
    refused(shiftrm, (*here, "policy", "--eval-share", "0.1"), "--eval-share has no effect on a GG")
    refused(shiftrm, (*here, "policy", "limit=3"), "limit=3 has no effect on a GGUF file")
    refused(shiftrm, ("convert", "gguf", "gone.gguf", *here[3:], "p"), "gone.gguf: no such file")
    status, output = shiftrm(*here, "models/policy")
    assert (status, output.err) == (0, "")
    assert output.out.splitlines() == [
        f"LlamaForCausalLM with {model.num_parameters():,} parameters: models/policy",
        "Its weights were read back from Q8_0, so they are not exactly the published ones.",
        "The file fills rows with its end token; here '<pad>' fills them.",
    ]
    assert os.listdir("models") == ["policy"]
    AutoModelForCausalLM.from_pretrained("models/policy")


def test_data_needs_a_kind(shiftrm, tmp_path):
    write_hh(tmp_path / "hh.jsonl", 6)
    refused(shiftrm, ("convert", "hh_rlhf", "hh.jsonl", "--output", "p"), "--kind is missing; see")


def test_everything_evaluated_is_refused(shiftrm, tmp_path):
    write_hh(tmp_path / "hh.jsonl", 6)
    assert shiftrm(*GOOD)[0] == 0
    again = (*GOOD[:-1], "other.jsonl", "--evaluation", "pairs.jsonl")
    refused(shiftrm, again, "every prompt is also in --evaluation")


def test_help_lists_the_formats_with_their_options(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for name in FORMATS.names():
        form = FORMATS.get(name)
        assert f"\n  {name} " in text
        for option in form.option_help():
            assert f"\n    {option} " in text
        for hub in form.hub:
            assert hub in text
    assert max(map(len, text.splitlines())) <= 100


THREE = (
    "convert preference pairs.jsonl --kind pairs --output disk/o.jsonl --dropped disk/d.jsonl "
    "--eval-output disk/e.jsonl"
)


def write_many(count):
    rows = [{"prompt": f"p{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(count)]
    write_jsonl("pairs.jsonl", [*rows, rows[0]])


def test_a_full_disk_leaves_none_of_the_files_and_the_command_works_afterwards(shiftrm, disk):
    write_many(2000)  # the rows to evaluate on and those dropped fit, the others do not
    folder = disk("60k")
    status, output = shiftrm(THREE)
    assert (status, output.err) == (
        2,
        "shiftrm: error: disk/o.jsonl: No space left on device; free space, or choose another "
        "output, then give the same command again\n",
    )
    assert os.listdir(folder) == []
    disk("1m")
    assert shiftrm(THREE)[0] == 0
    assert sorted(os.listdir(folder)) == ["d.jsonl", "e.jsonl", "o.jsonl"]
    assert [len(read_jsonl(folder / f"{n}.jsonl")) for n in "deo"] == [1, 205, 1795]


@pytest.mark.parametrize("call", ["link", "unlink"])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_killed_while_the_files_get_their_names(shiftrm, tmp_path, call, which):
    """Afterwards the command works, unless all files are complete."""
    write_many(20)
    (tmp_path / "disk").mkdir()
    child = os.fork()
    if not child:
        plain, calls = getattr(os, call), iter(range(1, 99))
        setattr(os, call, lambda *x, **y: os._exit(9) if next(calls) == which else plain(*x, **y))
        main(THREE.split())
        os._exit(0)
    os.waitpid(child, 0)
    status, output = shiftrm(THREE)
    assert status == 0 or "o.jsonl: already there" in output.err
    assert [len(read_jsonl(f"disk/{n}.jsonl")) for n in "deo"] == [1, 1, 19]
