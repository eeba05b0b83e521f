"""Domains on disk: read as written, and refused in one line where none can learn from them."""

import errno
import json
import os
from dataclasses import replace

import pytest

from shiftrm.data.domains import (
    Domain,
    check_batches,
    check_leaks,
    drop_leaks,
    load_domain,
    load_split,
    split_domains,
    write_domains,
)
from shiftrm.errors import UserError


def _domain(name: str, **changes) -> Domain:
    domain = Domain(
        name=name,
        support=tuple({"prompt": f"{name} {i}", "response": f" r{i}"} for i in range(3)),
        query=tuple(
            {"prompt": f"{name} {i}", "chosen": " yes", "rejected": " no"} for i in range(2)
        ),
        eval_pairs=({"prompt": f"{name} e", "chosen": " yes", "rejected": " no"},),
        prompts=(f"{name} e", f"{name} f"),
    )
    return replace(domain, **changes)


@pytest.fixture
def folder(tmp_path):
    domains = [_domain(name) for name in ("a", "b", "c", "d")]
    return write_domains(tmp_path / "all", domains, held_out=["d"], validation=["c"])


def test_written_domains_are_read_as_they_were(folder):
    split = load_split(folder, support_batch=3, query_batch=2)
    assert [d.name for d in split.source] == ["a", "b"]
    assert [d.name for d in split.validation] == ["c"]
    assert [d.name for d in split.held_out] == ["d"]
    assert split.all == tuple(map(_domain, "abcd"))
    assert sorted(p.name for p in (folder / "a").iterdir()) == [
        "eval_pairs.jsonl",
        "finetune.jsonl",
        "pairs.jsonl",
        "prompts.jsonl",
    ]


def test_names_given_replace_those_of_the_file(folder):
    split = load_split(folder, held_out=["a"], validation=[])
    assert [d.name for d in split.source] == ["b"]  # of the file's sources; c and d are neither
    (folder / "splits.json").unlink()
    split = load_split(folder, held_out=["a", "c"])
    assert [d.name for d in split.source] == ["b", "d"]


def test_chats_are_domains_too(tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    reply = [{"role": "assistant", "content": "hi"}]
    other = [{"role": "assistant", "content": "no"}]
    chats = Domain(
        name="chats",
        support=({"prompt": chat, "response": reply, "finished": False},),
        query=({"prompt": chat, "chosen": reply, "rejected": other},),
    )
    folder = write_domains(tmp_path / "all", [chats, _domain("x")], held_out=["x"])
    assert load_split(folder).source == (chats,)
    with pytest.raises(UserError, match="also trained on in domain 'chats'"):
        check_leaks(split_domains([chats, _domain("x", prompts=(chat,))], **NAMES))


NAMES = {"source": ["chats"], "held_out": ["x"]}


def test_a_held_out_domain_needs_no_pairs_and_a_source_does(folder):
    for name in ("pairs", "eval_pairs", "prompts"):
        (folder / "d" / f"{name}.jsonl").unlink()
    (held_out,) = load_split(folder).held_out
    assert (held_out.query, held_out.eval_pairs, held_out.prompts) == ((), (), ())
    with pytest.raises(UserError, match=r"d/pairs\.jsonl: no such file; a source domain needs"):
        load_split(folder, source=["a", "d"], held_out=["b"], validation=[])
    assert load_domain(folder / "d", labelled=False).support


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": []}, "all: no held-out domain; name at least one"),
        ({"source": [], "held_out": ["a"]}, "no source domain is left"),
        ({"source": ["a", "d"]}, "domain 'd' is both source and held-out"),
        ({"source": ["a", "a"]}, "domain 'a' is twice source"),
        ({"held_out": ["d", "d"]}, "domain 'd' is twice held-out"),
        ({"source": ["a", "c"]}, "domain 'c' is both source and validation"),
        ({"held_out": ["e"]}, "all: no held-out domain 'e'; known: a, b, c, d"),
        ({"support_batch": 4}, "domain 'a': 3 fine-tuning rows, but a batch takes 4"),
        ({"query_batch": 3}, "domain 'a': 2 preference pairs, but a batch takes 3"),
    ],
)
def test_splits_that_cannot_be_trained_on(folder, options, message):
    with pytest.raises(UserError, match=message):
        load_split(folder, **options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a/finetune.jsonl", "", "a/finetune.jsonl: the file has no fine-tuning rows"),
        ("a/pairs.jsonl", "\n", "a/pairs.jsonl: the file has no preference pairs"),
        ("d/eval_pairs.jsonl", "", "d/eval_pairs.jsonl: the file has no preference pairs"),
        ("d/prompts.jsonl", "", "d/prompts.jsonl: the file has no prompts"),
        ("a/finetune.jsonl", '{"prompt": "x"}', "finetune.jsonl:1: column 'response' is missing"),
        ("a/finetune.jsonl", '{"prompt": "x", "response": 3}', "'response' holds int"),
        ("a/finetune.jsonl", '{"prompt": "x", "response": ""}', "jsonl:1: the response is empty"),
        ("a/finetune.jsonl", '{"prompt": "", "response": "x"}', "jsonl:1: the prompt is empty"),
        (
            "a/finetune.jsonl",
            '{"prompt": "x", "response": "y", "finished": 1}',
            "'finished' is 1; give true or false",
        ),
        ("a/pairs.jsonl", '{"chosen": "x", "rejected": "y"}', "pair 1 has no prompt"),
        ("a/prompts.jsonl", '{"prompt": ""}', "prompts.jsonl:1: the prompt is empty"),
        ("a/prompts.jsonl", '{"prompt": null}', "prompts.jsonl:1: column 'prompt' holds NoneType"),
        (
            "d/prompts.jsonl",
            '{"prompt": " a  0"}',
            "domain 'd': the evaluation prompt 'a 0' is also trained on in domain 'a'",
        ),
        ("splits.json", "[", "splits.json: not valid JSON"),
        ("splits.json", '{"sources": []}', "splits.json: expected an object with lists of names"),
        ("splits.json", '{"held_out": "d"}', "splits.json: expected an object with lists of names"),
    ],
)
def test_bad_files_are_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_split(folder)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path / "none")
    with pytest.raises(UserError, match="no domains; expected DOMAIN/finetune"):
        load_split(tmp_path)


def test_a_domain_without_its_support_is_not_passed_over(folder):
    (folder / "b" / "finetune.jsonl").unlink()
    with pytest.raises(UserError, match="no source domain 'b'"):
        load_split(folder)
    (folder / "splits.json").unlink()
    with pytest.raises(UserError, match=r"b: it has pairs\.jsonl but no finetune\.jsonl"):
        load_split(folder, held_out=["d"])
    assert [d.name for d in load_split(folder, source=["a"], held_out=["d"]).source] == ["a"]


def test_checks_in_memory():
    domains = [_domain("a"), _domain("b")]
    split = split_domains(domains, source=["a"], held_out=["b"])
    check_batches(split, support_batch=3, query_batch=2)
    check_leaks(split)
    with pytest.raises(UserError, match="domain 'a': given twice"):
        split_domains([*domains, _domain("a")], source=["a"], held_out=["b"])
    # A held-out domain takes no query batch, but it is fine-tuned on.
    small = split_domains([_domain("a"), _domain("b", query=())], source=["a"], held_out=["b"])
    check_batches(small, support_batch=3, query_batch=2)
    with pytest.raises(UserError, match="domain 'b': 0 fine-tuning rows"):
        check_batches(
            split_domains([domains[0], _domain("b", support=())], source=["a"], held_out=["b"]),
            support_batch=1,
            query_batch=1,
        )


def test_dropped_leaks_are_counted():
    leaky = _domain("b", prompts=("b e", "a 0", "b  1"))
    pair = {"prompt": "a 1\n", "chosen": " x", "rejected": " y"}
    kept, dropped = drop_leaks([_domain("a", eval_pairs=(pair,)), leaky])
    assert dropped == 3
    assert (kept[0].eval_pairs, kept[1].prompts) == ((), ("b e",))
    assert kept[0].prompts == _domain("a").prompts
    check_leaks(split_domains(kept, source=["a"], held_out=["b"]))


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([_domain("a"), _domain("../b")], "not usable as a folder's name"),
        ([_domain("a"), _domain("")], "domain '': not usable"),
        ([_domain("a"), _domain("b", support=())], "domain 'b': no fine-tuning rows"),
        ([_domain("a", query=()), _domain("b")], "domain 'a': no preference pairs; hold"),
        ([_domain("a"), _domain("b", prompts=("a 0",))], "also trained on"),
    ],
)
def test_nothing_is_written_of_what_is_refused(tmp_path, domains, message):
    with pytest.raises(UserError, match=message):
        write_domains(tmp_path / "all", domains, held_out=[domains[1].name])
    assert not (tmp_path / "all").exists()


def test_a_folder_is_not_written_twice(folder):
    with pytest.raises(UserError, match=r"splits\.json: already exists"):
        write_domains(folder, [_domain("a"), _domain("z")], held_out=["z"])
    assert not (folder / "z").exists()
    assert json.loads((folder / "splits.json").read_text())["held_out"] == ["d"]


def test_splits_with_a_byte_order_mark(folder):
    """As editors on Windows write it; JSON lines and YAML may have one too."""
    path = folder / "splits.json"
    path.write_text('{"source": ["b"], "held_out": ["d"]}', encoding="utf-8-sig")
    split = load_split(folder)
    assert ([d.name for d in split.source], [d.name for d in split.held_out]) == (["b"], ["d"])


def test_a_full_disk_leaves_no_domain(tmp_path, monkeypatch):
    plain, calls = os.fsync, iter(range(9))

    def full(descriptor):
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    domains = [_domain(name) for name in ("a", "b", "d")]
    with pytest.raises(OSError, match="No space left"):
        write_domains(tmp_path / "all", domains, held_out=["d"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_domains(tmp_path / "all", domains, held_out=["d"])
    assert [d.name for d in load_split(tmp_path / "all").all] == ["a", "b", "d"]
