"""Inputs that meta-train must refuse, or report, instead of failing late or training on them."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.cli import main
from shiftrm.data.domains import Domain, DomainSplit, load_split, write_domains
from shiftrm.data.shp import shp_pair
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.oodpl.batches import Encoder
from shiftrm.oodpl.meta_config import OODPLConfig
from shiftrm.oodpl.trainer import OODPLTrainer
from shiftrm.world.build_domains import read_table
from tests.conftest import llama_config
from tests.oodpl.domains import interrupt_training, make_domain, make_split, write_animals

TRAIN = ["meta-train", "--model", "policy", "--domains", "domains", "--output", "out"]
SMALL = ["max_steps=1", "support_batch_size=3", "query_batch_size=2", "inner_learning_rate=0.05"]


@pytest.fixture
def folder(tmp_path, policy, tokenizer, monkeypatch):
    """A policy, another reference and four domains, in the current folder."""
    for name in ("policy", "otherref"):
        policy.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_animals(tmp_path / "domains")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """run(word, ...) -> (status, output)"""

    def run(*words):
        capsys.readouterr()
        return main([str(word) for word in words]), capsys.readouterr()

    return run


def refused(run, *words, message):
    """One line, status 2, and nothing written."""
    before = sorted(os.listdir())
    status, said = run(*words)
    assert status == 2, said
    assert message in said.err
    assert said.err.count("\n") == 1, said.err
    assert sorted(os.listdir()) == before
    return said.err


def name_splits(**roles):
    path = "domains/splits.json"
    with open(path) as handle:
        kept = json.load(handle)
    with open(path, "w") as handle:
        json.dump(kept | roles, handle)


# -- resuming --------------------------------------------------------------------------------


def other_policy():
    torch.manual_seed(9)
    LlamaForCausalLM(llama_config()).save_pretrained("otherref")


def moved_rows():
    """Move the first evaluation pairs to the end of the pairs: all rows in order are the same."""
    pairs, watched = (read_jsonl(f"domains/cats/{n}.jsonl") for n in ("pairs", "eval_pairs"))
    write_jsonl("domains/cats/pairs.jsonl", pairs + watched[:2])
    write_jsonl("domains/cats/eval_pairs.jsonl", watched[2:])


def test_an_interrupted_run_continues_only_with_the_same_inputs(run, folder, monkeypatch):
    watched = read_jsonl("domains/cats/eval_pairs.jsonl")
    for i, row in enumerate(watched):
        row["prompt"] = f"a large cat {'the ' * i}"
    write_jsonl("domains/cats/eval_pairs.jsonl", watched)
    write_jsonl("domains/cats/prompts.jsonl", [{"prompt": "a small small cat"}])
    steps = interrupt_training(monkeypatch, at=3)
    words = [*TRAIN, "--policy", "otherref", *SMALL, "max_steps=3", "save_steps=1"]
    assert run(*words, "beta=1", "micro_batch_size=2")[0] == 130

    for change, differs in (
        (other_policy, "files.policy"),
        (lambda: name_splits(source=["dogs", "cats"]), "data.source: ['cats', 'dogs'] ->"),
        (moved_rows, "data.rows.cats.pairs.jsonl"),
    ):
        kept = {name: folder / "kept" / name for name in ("domains", "otherref")}
        for name, path in kept.items():
            shutil.copytree(name, path)
        change()
        error = refused(run, *words, "beta=1", message="unfinished training with other settings")
        assert differs in error
        for name, path in kept.items():
            shutil.rmtree(name)
            shutil.move(path, name)

    spelt = [word if word != "otherref" else "./otherref/" for word in words]
    status, said = run(*spelt, "beta=1.0", "micro_batch_size=1")
    assert status == 0, said.err
    assert steps == [0, 1, 2, 2], "it continued where it was interrupted"


# -- what is watched -------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("reference",), ("a", "a_reference")])
def test_names_that_would_give_two_metrics_one_name_are_refused(names, tmp_path):
    domains = tuple(Domain(name, (), eval_pairs=({},)) for name in names)
    args = OODPLConfig(str(tmp_path / "out"), use_cpu=True)
    for split in (make_split(validation=domains), DomainSplit(domains, domains[:1])):
        with pytest.raises(UserError, match=r"_accuracy' would be that of .* rename the domain's"):
            OODPLTrainer(None, None, args, split=split)
    assert not (tmp_path / "out").exists()


def long_pair():
    return {"prompt": "a large bird", "chosen": " small" * 70, "rejected": " a"}


def test_the_summary_counts_what_was_measured_and_what_was_dropped_is_said(run, caplog):
    name_splits(source=["cats"], validation=["birds", "dogs"])
    os.remove("domains/dogs/eval_pairs.jsonl")
    pairs = read_jsonl("domains/birds/eval_pairs.jsonl")
    write_jsonl("domains/birds/eval_pairs.jsonl", [*pairs, long_pair()])
    status, said = run(*TRAIN, *SMALL)
    assert status == 0, said.err
    assert "A_PL on 1 validation domains" in said.out
    assert "validation domain dogs: not measured, because it has no eval_pairs" in caplog.text
    assert "domain birds: dropped 1 rows of more than 64 tokens" in caplog.text


def test_evaluation_pairs_that_are_all_too_long_are_not_called_missing(run, caplog):
    write_jsonl("domains/birds/eval_pairs.jsonl", [long_pair()])
    message = "no evaluation pair of a validation domain has at most 64 tokens"
    refused(run, *TRAIN, *SMALL, "eval_strategy=steps", "eval_steps=1", message=message)
    assert not caplog.text
    status, said = run(*TRAIN, *SMALL)
    assert status == 0, said.err
    assert "domain birds: not measured, because no pair of eval_pairs.jsonl fits" in caplog.text
    assert "A_PL" not in said.out


# -- models ----------------------------------------------------------------------------------


def write(name, text):
    def change(folder):
        (folder / name).write_text(text)

    return change


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def three_labels(folder):
    LlamaForSequenceClassification(llama_config(num_labels=3)).save_pretrained(folder)


def not_finite(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    model.save_pretrained(folder)


@pytest.mark.parametrize("option", ["--model", "--policy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write("config.json", "{}"), "cannot be loaded as a"),
        (write("tokenizer.json", "{}"), "cannot be loaded as a"),
        (without_tokenizer, ""),
        (three_labels, ""),
        (write("adapter_config.json", "{}"), "is an adapter, which would stay as it is"),
        (write("ensemble.json", "{}"), "is an ensemble of reward models"),
        (write("laplace.json", "{}"), "lowers its rewards by a posterior"),
        (not_finite, "holds NaN or infinite numbers"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_named_in_one_line(run, folder, option, change, message):
    change(folder / "otherref")
    words = [option, "otherref", *(["--policy", "policy"] if option == "--model" else [])]
    error = refused(run, *TRAIN, *words, *SMALL, message=message)
    assert error.startswith("shiftrm: error: otherref: ")
    if change is three_labels:
        expected = {"--model": "num_labels=1", "--policy": "not a causal language model"}
        assert expected[option] in error


# -- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim=lomo"], "You need to install `lomo_optim`"),
        (["optim_args=foo"], "optim_args is 'foo'; give NAME=VALUE,NAME=VALUE"),
        (["lr_scheduler_type=cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (["lr_scheduler_kwargs={bad: 1}"], "lr_scheduler_kwargs: get_linear_schedule_with_warmup("),
        (["report_to=bogus"], "bogus is not supported, only"),
        (["report_to=wandb"], "WandbCallback requires wandb to be installed"),
        (["log_level=inf"], "log_level is 'inf'; did you mean 'info'?"),
        (["save_strategy=best"], "`args.metric_for_best_model` must be provided"),
        (
            [
                *("load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=1"),
                *("save_strategy=steps", "save_steps=1", "metric_for_best_model=nope"),
            ],
            "`metric_for_best_model` training argument is set to 'eval_nope'",
        ),
        (["train_sampling_strategy=group_by_length"], "cannot be trained with these settings"),
        (["parallelism_config=1"], "parallelism_config: OODPL trains under DDP or on one process"),
        (["num_train_epochs=7"], "num_train_epochs: training takes max_steps steps"),
        (["label_names=[a]"], "label_names: tasks have no label columns"),
    ],
)
def test_settings_that_transformers_rejects_late_are_one_line(run, words, message):
    refused(run, *TRAIN, *SMALL, "save_strategy=no", *words, message=message)


# -- data ------------------------------------------------------------------------------------


def test_the_template_sees_the_tools_of_a_pair(tokenizer, monkeypatch):
    template = (
        "{% if tools %}blue {% endif %}{% if kind %}{{ kind }} {% endif %}"
        "{% for m in messages %}{{ m.content }} </s> {% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)

    def chat(text, role):
        return [{"role": role, "content": text}]

    row = {
        "prompt": chat("the cat", "user"),
        "chosen": chat("runs", "assistant"),
        "rejected": chat("sits", "assistant"),
    }
    options = {"tools": '[{"name": "x"}]', "chat_template_kwargs": {"kind": "red"}}
    encoder = Encoder(tokenizer)
    plain, told = (encoder.pair(row | more, 0) for more in ({}, options))
    added = tokenizer.convert_tokens_to_ids(["blue", "red"])
    for without, with_tools in zip(plain, told, strict=True):
        assert with_tools.ids == [*added, *without.ids]
        assert with_tools.start == without.start + 2


@pytest.mark.parametrize("name", ["fi\nsh\x1b[31m", os.fsdecode(b"fi\xff"), "nul\0"])
def test_names_that_cannot_be_printed_are_refused(folder, name, tmp_path):
    with pytest.raises(UserError, match="a name that cannot be printed; rename the domain"):
        load_split("domains", held_out=[name])
    if "\0" not in name:
        os.rename("domains/cats", f"domains/{name}")
        os.remove("domains/splits.json")
        with pytest.raises(UserError, match="cannot be printed"):
            load_split("domains", held_out=["fishes"])
    domains = [Domain(name, make_domain("cats").support), make_domain("dogs")]
    with pytest.raises(UserError, match="cannot be printed"):
        write_domains(tmp_path / "new", domains, held_out=[name])
    assert not (tmp_path / "new").exists()


def test_hidden_folders_are_not_domains(folder):
    shutil.copytree("domains/cats", "domains/.ipynb_checkpoints")
    os.remove("domains/splits.json")
    assert [d.name for d in load_split("domains", held_out=["fishes"]).source] == [
        *("birds", "cats", "dogs")
    ]
    os.remove("domains/.ipynb_checkpoints/finetune.jsonl")
    load_split("domains", held_out=["fishes"])


PAIR = {"prompt": "the cat", "chosen": " a", "rejected": " b"}
WORDS = {"prompt": "the cat", "response": " a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "splits.json"}, "not usable as a folder's name"),
        ({"name": "n" * 300}, "not usable as a folder's name"),
        ({"query": ({"chosen": " a", "rejected": " b"},)}, "pairs.jsonl, row 1 has no prompt"),
        ({"eval_pairs": ({**PAIR, "rejected": " a"},)}, "chosen and rejected are equal"),
        ({"support": (WORDS, {**WORDS, "response": ""})}, "finetune.jsonl, row 2: the response is"),
        ({"support": ({**WORDS, "x": float("nan")},)}, "row 1: cannot be written as JSON"),
        ({"support": ({**WORDS, "x": {1}},)}, "row 1: cannot be written as JSON"),
        ({"prompts": ("",)}, "prompts.jsonl, row 1: the prompt is empty"),
    ],
)
def test_domains_that_could_not_be_read_again_are_not_written(tmp_path, changes, message):
    bad = Domain(**{"name": "a", "support": (WORDS,), "query": (PAIR,), **changes})
    with pytest.raises(UserError) as caught:
        write_domains(tmp_path / "new", [make_domain("dogs"), bad], held_out=["dogs"])
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_files_of_names_and_weights_that_cannot_be_read(folder):
    splits, deep = folder / "domains" / "splits.json", "[" * 100000
    splits.write_text(deep)
    with pytest.raises(UserError, match="nested too deep"):
        load_split("domains")
    splits.unlink()
    splits.mkdir()
    with pytest.raises(UserError, match="is a folder; make it a file"):
        load_split("domains")
    (folder / "weights.json").write_text(deep)
    with pytest.raises(UserError, match="not a table of domain weights"):
        read_table(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"score_ratio": float("nan")}, "low_score_ratio"), ({"score_A": float("nan")}, "equal_")],
)
def test_numbers_of_shp_that_are_not_numbers_are_not_kept(changes, reason):
    row = {
        "post_id": "p",
        "domain": "askx_train",
        "history": "h",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": 0,
        "score_A": 3,
        "score_B": 30,
        "score_ratio": 10.0,
    }
    assert not isinstance(shp_pair(row, "f:1", score_ratio=2.0), str)
    assert shp_pair(row | changes, "f:1", score_ratio=2.0).startswith(reason)
