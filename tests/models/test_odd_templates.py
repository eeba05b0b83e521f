"""Templates and tokenizers of other shapes: where an answer begins and ends under each."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from shiftrm.data.groups import read_groups
from shiftrm.models.rendering import (
    decode_response,
    encode,
    encode_prompt,
    end_at_closing,
    stop_token_ids,
)
from shiftrm.models.responses import Response, encode_response, group_responses
from shiftrm.models.rope import LengthLimit
from shiftrm.models.sampling import Sample, as_samples, generation_config, group_row, load_policy
from shiftrm.models.scoring import Scorer
from shiftrm.policies.text_rewards import TextReward
from shiftrm.trainers.meta_groups import MetaGroups
from tests.byte_level import CHATML, TRL_TEMPLATES, byte_level
from tests.conftest import llama_config

USER = {"role": "user", "content": "hi"}
HI = [USER]
EOS, CLOSED = 2, 4
NO_LIMIT = LengthLimit(None, "", "")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def closed_by(closing):
    return CHATML.replace("<|im_end|>\n", closing)


@pytest.mark.parametrize(
    ("template", "answer", "stop"),
    [
        (closed_by("\n<|im_end|>"), "ok\n<|im_end|>", (EOS, CLOSED)),
        (closed_by("<eos><|im_end|>\n"), "ok<eos>", (EOS,)),  # nothing is said after EOS
        (closed_by("<|im_end|><eos>"), "ok<|im_end|><eos>", (EOS,)),
        (closed_by("\n### End\n<eos>\n"), "ok\n### End\n<eos>", (EOS,)),
        (closed_by("\n### End\n<|im_end|>\n"), "ok\n### End\n<|im_end|>", (EOS, CLOSED)),
        (closed_by("<|closed|>\n"), "ok<eos>", (EOS,)),  # not in the vocabulary: only letters
        ("{% if messages[0].role != 'system' %}{{ 1 / 0 }}{% endif %}" + CHATML, None, None),
        ({"default": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML}, None, None),
        ("{% for m in messages %}<bos>{{ m.content }}{% endfor %}", "ok<eos>", (EOS,)),
    ],
)
def test_what_ends_an_answer(template, answer, stop):
    tok = byte_level(CHATML)
    tok.chat_template = template
    prompt = [{"role": "system", "content": "s"}, USER] if "system" in str(template) else HI
    assert stop_token_ids(tok) == (stop or (EOS, CLOSED))
    opening = encode_prompt(tok, prompt)
    ids = encode(tok, prompt, "ok")
    assert ids[: len(opening)] == opening
    assert tok.decode(ids[len(opening) :]) == (answer or "ok<|im_end|>")
    end_at_closing(tok)
    theirs = tok.apply_chat_template([*prompt, said("ok")], return_dict=True)["input_ids"]
    assert theirs == encode(tok, None, [*prompt, said("ok")])
    assert theirs[-1] in stop_token_ids(tok)


@pytest.mark.parametrize(
    "text", ["ok", "ok<|im_end|>", "ok<|im_end|>\n"], ids=["plain", "closed", "closed with a line"]
)
def test_a_text_that_brings_its_closing_token_is_closed_once(text):
    tok = byte_level(CHATML)
    assert encode(tok, HI, text) == encode(tok, HI, "ok")
    inside = encode(tok, HI, "a<|im_end|>b")
    assert inside.count(CLOSED) == len(HI) + 2


def test_a_line_break_before_the_closing_token_is_written_once():
    tok = byte_level(closed_by("\n<|im_end|>"))
    opening = encode_prompt(tok, HI)
    sampled = [*tok("ok\n")["input_ids"], CLOSED]
    text = decode_response(tok, opening, sampled)
    assert (text, encode(tok, HI, text)) == ("ok\n", opening + sampled)
    message = encode(tok, HI, [said("ok\n")])
    assert tok.decode(message[len(opening) :]) == "ok\n\n<|im_end|>", "as the template has it"


def test_a_begun_answer_goes_on_to_further_turns():
    more = [said("x"), {"role": "user", "content": "more"}, said("y")]
    for template in (CHATML, TRL_TEMPLATES["qwen3"]):
        tok = byte_level(template)
        begun = [*HI, said("Sure, ")]
        opening = encode_prompt(tok, begun)
        for finished in (True, False):
            rest = tok.decode(encode(tok, begun, more, finished=finished)[len(opening) :])
            assert rest.startswith("x<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>")
            assert rest.endswith("y<|im_end|>" if finished else "y")


def test_what_a_tool_says_stands_after_its_call():
    tok = byte_level(TRL_TEMPLATES["qwen3"])
    called = [*HI, said("", tool_calls=[CALL])]
    results = [{"role": "tool", "name": "add", "content": "4"}, said("four")]
    assert encode(tok, called, results) == encode(tok, None, [*called, *results])
    cut = encode(tok, called, results, finished=False)
    assert [*cut, CLOSED] == encode(tok, called, results)


def test_an_opening_that_the_template_writes_otherwise_later_is_written_once():
    """This one closes a turn before the next only, and opens an answer right after the prompt."""
    closes = "{{ '' if loop.last else '<|im_end|>\n' }}"
    tok = byte_level(CHATML.replace("<|im_end|>\n' }}", "' }}" + closes))
    opening = encode_prompt(tok, HI)
    assert stop_token_ids(tok) == (EOS, CLOSED)
    for response in ("ok", [said("ok")]):
        ids = encode(tok, HI, response)
        assert ids[: len(opening)] == opening
        assert tok.decode(ids[len(opening) :]) == "ok<|im_end|>"
        cut = encode(tok, HI, response, finished=False)
        assert tok.decode(cut[len(opening) :]) == "ok"


@pytest.mark.parametrize("ends", ["csv", "parquet", "jsonl"])
def test_tokens_come_back_from_every_kind_of_file(ends, tmp_path):
    tok = byte_level(CHATML, merges=[("o", "k")])
    letters = Sample(
        encode_prompt(tok, HI), [*tok("o")["input_ids"], *tok("k")["input_ids"]], False
    )
    row = group_row(tok, HI, [letters, letters])
    path = tmp_path / f"rows.{ends}"
    if ends == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    elif ends == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
        with open(path, "w", newline="") as handle:
            csv.writer(handle).writerows([list(row), cells])
    [read] = read_groups(path)
    whole = letters.prompt_ids + letters.response_ids
    assert [encode_response(tok, r) for r in group_responses(read)] == [whole, whole]
    assert encode(tok, HI, "ok", finished=False) != whole


@pytest.mark.parametrize(
    ("configured", "more"),
    [
        (-1, ()),
        ([7, -1, None], (7,)),
        (10**6, (10**6,)),
        ((2, 2), ()),
        (torch.tensor([2, 9]), (9,)),
    ],
)
def test_odd_end_tokens_of_generation_configs(configured, more):
    config = SimpleNamespace(eos_token_id=configured)
    assert stop_token_ids(byte_level(CHATML), config) == (EOS, CLOSED, *more)


@pytest.mark.filterwarnings("ignore:.*generation.*")
def test_a_closed_template_marks_no_wrong_words_as_the_assistants():
    tok = byte_level(TRL_TEMPLATES["qwen3_training"])
    chat = [USER, said("ok"), USER, said("yes")]
    asked = {"return_dict": True, "return_assistant_tokens_mask": True}
    before = tok.apply_chat_template(chat, **asked)
    assert sum(before["assistant_masks"]) > 0
    end_at_closing(tok)
    after = tok.apply_chat_template(chat, **asked)
    assert after["input_ids"] == before["input_ids"][:-1]
    assert sum(after["assistant_masks"]) == 0


def test_fields_that_are_null_are_not_there():
    """As tables give them to every message of a column."""
    tok = byte_level(
        CHATML.replace("m['content']", "m['content'] + (m.name if 'name' in m else '')")
    )
    nothing = {"name": None, "tool_calls": None}
    part = {"type": "text", "text": "hi", "image": None}
    table = [{**USER, "content": [part], **nothing}, said("ok", **nothing)]
    assert encode(tok, None, table) == encode(tok, None, [USER, said("ok")])
    assert encode(tok, table[:1], table[1:]) == encode(tok, HI, "ok")


def test_reasoning_that_a_begun_conversation_brings():
    tok = byte_level(CHATML)
    cut = encode(tok, None, [said("so </think> x")], finished=False)
    assert tok.decode(cut) == "<|im_start|>assistant\nso </think> x"


SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [
    "hello world, how are you?",
    "the answer is four. yes, ok",
    "user assistant hi a b c\n",
] * 5


def _made(backend, trainer, before="<bos> ", added=("<|im_start|>", "<|im_end|>")):
    backend.train_from_iterator(WORDS, trainer)
    ids = [(word, backend.token_to_id(word)) for word in SPECIAL]
    backend.post_processor = TemplateProcessing(single=before + "$A <eos>", special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    made.add_tokens(list(added), special_tokens=True)
    made.chat_template = CHATML
    return made


def byte_fallback():
    """As Llama 2's: a space before every text, bytes for unknown letters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    pieces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return _made(backend, BpeTrainer(vocab_size=400, special_tokens=SPECIAL + byte_tokens))


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _made(
        backend, UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"), ""
    )


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _made(backend, WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))


def stripping():
    """A space before every text, and special tokens that take the spaces around them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=letters)
    greedy = [AddedToken(word, lstrip=True, rstrip=True) for word in ("<|im_start|>", "<|im_end|>")]
    return _made(backend, trainer, added=greedy)


@pytest.mark.parametrize("make", [byte_fallback, unigram, wordpiece, stripping])
def test_other_kinds_of_tokenizers_give_back_what_was_sampled(make):
    tok = make()
    stop = stop_token_ids(tok)
    tok.chat_template = closed_by("\u2603\u2603")  # letters unknown to the vocabulary end nothing
    assert stop_token_ids(tok) == (tok.eos_token_id,)
    tok.chat_template = CHATML
    assert set(stop) == {tok.eos_token_id, tok.convert_tokens_to_ids("<|im_end|>")}
    for prompt in (HI, "how are", "how ", "", [*HI, said("yes, ")]):
        opening = encode_prompt(tok, prompt)
        if not opening:
            continue
        whole = tok("\u00e9\U0001f642 four</think> \n", add_special_tokens=False)["input_ids"]
        for length in range(1, len(whole) + 1):  # cut inside the letters, too
            for ids, finished in ((whole[:length], False), ([*whole[:length], stop[-1]], True)):
                row = json.loads(
                    json.dumps(group_row(tok, prompt, [Sample(opening, ids, finished)]))
                )
                assert encode_response(tok, group_responses(row)[0]) == opening + ids
                assert as_samples(tok, [row]) == [Sample(opening, ids, finished)]
        for text in ("ok", " ok\n", "", "</think>"):
            for finished in (True, False):
                ids = encode(tok, prompt, text, finished=finished)
                assert ids.count(tok.eos_token_id) == (finished and isinstance(prompt, str))
                if not isinstance(prompt, str):
                    assert ids[: len(opening)] == opening
                assert (ids[-1] in stop) == finished


def test_a_row_edited_by_hand_is_read_as_it_stands():
    tok = byte_level(CHATML)
    opening = encode_prompt(tok, HI)
    ids = [*tok("ok")["input_ids"], CLOSED]
    row = group_row(tok, HI, [Sample(opening, ids, True)])
    edits = [
        {"responses": ["no"]},
        {"finished": [False]},
        {"response_ids": [ids[:-1]]},
        {"tokenizer": "another"},
        {"response_ids": None},
        {"prompt": [{"role": "user", "content": "you"}]},
    ]
    for edit in edits:
        edited = {**row, **edit}
        expected = encode(
            tok, edited["prompt"], edited["responses"][0], finished=edited["finished"][0]
        )
        [sample] = as_samples(tok, [edited])
        assert sample.prompt_ids + sample.response_ids == expected
        assert encode_response(tok, group_responses(edited)[0]) == expected


def scorer_of(tokenizer, vocabulary):
    torch.manual_seed(0)
    config = llama_config(vocabulary, num_labels=1)
    return Scorer(LlamaForSequenceClassification(config), tokenizer)


def test_tokens_that_a_reader_does_not_know_are_read_as_text():
    """A policy with more embeddings than tokens, or with a closing token of its own."""
    tok, other = byte_level(CHATML), byte_level(CHATML)
    other.add_tokens(["<|end_of_mine|>"], special_tokens=True)
    other.chat_template = closed_by("<|end_of_mine|>")
    prompt = encode_prompt(other, HI)
    mine = Sample(prompt, [*other("ok")["input_ids"], len(tok)], True)
    [response] = group_responses(group_row(other, HI, [mine]))
    assert encode_response(tok, response) == encode(tok, HI, "ok")
    beyond = Sample(prompt, [*tok("ok")["input_ids"], len(tok) + 7], False)
    [response] = group_responses(group_row(tok, HI, [beyond]))
    assert response.text == "ok"
    small, large = scorer_of(tok, len(tok)), scorer_of(tok, len(tok) + 8)
    assert small.encode_response(response) == encode(tok, HI, "ok", finished=False)
    assert large.encode_response(response) == encode_prompt(tok, HI) + beyond.response_ids
    row = group_row(tok, HI, [beyond, mine])
    groups = MetaGroups([row], tok, limit=NO_LIMIT, seed=0, vocabulary=len(tok)).groups
    assert groups[0][0] == encode(tok, HI, "ok", finished=False)


def test_the_reward_reads_the_opening_that_the_policy_was_given():
    """Templates take options, and with them another opening."""
    tok = byte_level(TRL_TEMPLATES["qwen3"])
    options = {"enable_thinking": False}
    scorer = scorer_of(tok, len(tok))
    seen = []
    scorer.score_ids = lambda sequences, **_: seen.extend(sequences) or [0.0] * len(sequences)
    opening = encode_prompt(tok, HI, template_options=options)
    assert opening != encode_prompt(tok, HI)
    sampled = [*tok("ok")["input_ids"], stop_token_ids(tok)[-1]]
    TextReward(scorer, tok, options)(prompts=[HI], completion_ids=[sampled])
    assert seen == [opening + sampled]


def test_the_generation_config_is_found_inside_wrappers():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(llama_config(16))
    wanted = model.generation_config
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for outer in (model, wrapped, torch.nn.DataParallel(wrapped)):
        assert generation_config(outer) is wanted
    assert generation_config(torch.nn.Linear(1, 1)) is None


def test_a_policy_that_asks_for_the_date_is_prompted_the_same_tomorrow(tmp_path):
    tok = byte_level("{{ strftime_now('%d %b %Y') }}" + CHATML)
    LlamaForCausalLM(llama_config(len(tok))).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    _, loaded = load_policy(tmp_path)
    assert tok.decode(encode_prompt(loaded, HI)).startswith("26 Jul 2024<|im_start|>")
    assert encode_response(loaded, Response(HI, "ok")) == encode(loaded, HI, "ok")
