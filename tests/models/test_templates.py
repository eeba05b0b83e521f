"""Every chat template that TRL ships, and what each must give: the same tokens from every side."""

import pytest
import torch
from transformers import GenerationConfig, LlamaForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.rendering import (
    decode_response,
    encode,
    encode_prompt,
    end_at_closing,
    stop_token_ids,
)
from shiftrm.models.scoring import Scorer
from shiftrm.models.templates import render
from tests.byte_level import CHATML, TRL_TEMPLATES, byte_level
from tests.conftest import llama_config

HI = [{"role": "user", "content": "hi"}]
ENDS = {  # read by a person in each model's documentation, by how the template's name begins
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "qwen": "<|im_end|>",
    "nemotron": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
    "llava_next": "</s>",
}


@pytest.fixture(params=TRL_TEMPLATES)
def name(request):
    return request.param


@pytest.fixture
def tok(name):
    return byte_level(TRL_TEMPLATES[name])


def end_of(name, tok):
    text = next(end for start, end in ENDS.items() if name.startswith(start))
    return tok.convert_tokens_to_ids(text)


ANSWERS = ["ok", " a b\n\n", "<b>bold</b>", "", "é \n"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_tokens_of_the_prompt_stand_first(tok, answer):
    opening = encode_prompt(tok, HI)
    for response in (answer, [{"role": "assistant", "content": answer or "x"}]):
        for finished in (True, False):
            ids = encode(tok, HI, response, finished=finished)
            assert ids[: len(opening)] == opening


def test_the_prompt_is_what_transformers_makes_of_it(tok, name):
    if name.startswith(("idefics3", "smolvlm", "llava")):  # they want their texts as parts
        chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    else:
        chat = HI
    theirs = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert encode_prompt(tok, HI) == theirs["input_ids"]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    assert encode_prompt(tok, parts) == theirs["input_ids"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_sampled_tokens_come_back_from_their_text(tok, name, answer):
    opening = encode_prompt(tok, HI)
    said = tok(answer, add_special_tokens=False)["input_ids"]
    for ids, finished in ((said, False), ([*said, end_of(name, tok)], True)):
        if name.startswith("cohere2") and finished:
            ids = [*said, tok.convert_tokens_to_ids("<|END_RESPONSE|>"), ids[-1]]
        text = decode_response(tok, opening, ids, finished=finished)
        if not name.startswith("cohere2"):
            assert text == answer
        assert encode(tok, HI, text, finished=finished) == opening + ids


def test_what_ends_an_answer(tok, name):
    assert stop_token_ids(tok) == tuple(sorted({end_of(name, tok), tok.eos_token_id}))
    config = GenerationConfig(eos_token_id=[7, 9])
    assert {7, 9, *stop_token_ids(tok)} == set(stop_token_ids(tok, config))
    finished = encode(tok, HI, "ok")
    assert finished[-1] == end_of(name, tok)
    assert finished.count(tok.eos_token_id) <= 1
    assert not set(stop_token_ids(tok)) & set(encode(tok, HI, "ok", finished=False)[-2:])


@pytest.mark.parametrize("words", ["Four, I", "Four\n\n", "<think>\nadd</think>\nFour, I"])
def test_an_unfinished_answer_is_its_own_words(tok, words):
    said = tok(words, add_special_tokens=False)["input_ids"]
    assert encode(tok, HI, words, finished=False) == encode_prompt(tok, HI) + said
    message = [{"role": "assistant", "content": words}]
    ids = encode(tok, HI, message, finished=False)
    assert ids[-len(said) :] == said
    assert ids[: len(encode_prompt(tok, HI))] == encode_prompt(tok, HI)


def test_a_begun_answer_is_continued(tok, name):
    begun = [*HI, {"role": "assistant", "content": "Sure,"}]
    opening = encode_prompt(tok, begun)
    said = tok("Sure,", add_special_tokens=False)["input_ids"]
    assert opening[-len(said) :] == said
    assert opening[: len(encode_prompt(tok, HI))] == encode_prompt(tok, HI)
    for rest in (" ok", [{"role": "assistant", "content": " ok"}]):
        ids = encode(tok, begun, rest)
        assert ids[: len(opening)] == opening
        assert ids[-1] == end_of(name, tok)
        assert encode(tok, begun, rest, finished=False) == opening + tok(" ok")["input_ids"]


def test_rewards_are_finite(tok):
    torch.manual_seed(0)
    config = llama_config(len(tok), num_labels=1, max_position_embeddings=4096)
    scorer = Scorer(LlamaForSequenceClassification(config), tok)
    rewards = scorer([HI, HI, HI], ["ok", "ok", ""], finished=[True, False, True])
    assert all(abs(reward) < 100 for reward in rewards)
    assert rewards[0] != rewards[1]


def test_a_closed_template_gives_our_tokens_to_others(tok, name):
    """Rendered by transformers alone, a finished answer ends with the token that ends it."""
    chat = [*HI, {"role": "assistant", "content": "ok"}]
    before = render(tok, chat, {})
    prompt, ours = encode_prompt(tok, HI), encode(tok, None, chat)
    end_at_closing(tok)
    after = render(tok, chat, {})
    if encode(tok, HI, chat[1:])[: len(prompt)] == tok(before)["input_ids"][: len(prompt)]:
        assert tok(after, add_special_tokens=False)["input_ids"] == ours
    assert ours[-1] == end_of(name, tok)
    assert tok(after, add_special_tokens=False)["input_ids"][-1] == end_of(name, tok)
    assert encode_prompt(tok, HI) == prompt
    assert encode(tok, None, chat) == ours
    closed = tok.chat_template
    end_at_closing(tok)
    assert tok.chat_template == closed


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "cannot render this chat \\(TemplateSyntaxError"),
        ("{{ raise_exception('only one system message') }}", "only one system message"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
        ("{{ messages[0]['content'] / 2 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message):
    tok = byte_level(template)
    for call in (lambda: encode_prompt(tok, HI), lambda: encode(tok, HI, "ok")):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_parts_that_are_no_text_are_named():
    tok = byte_level()
    image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    with pytest.raises(UserError, match="message 1 holds a part of type 'image'"):
        encode_prompt(tok, image)


def test_tool_calls_that_a_template_leaves_out_are_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(UserError, match="message 2 calls the tool 'add', but the chat template"):
        encode(byte_level(), None, chat)
    assert encode(byte_level(TRL_TEMPLATES["qwen3"]), None, chat)


def test_special_tokens_inside_an_answer_stay():
    tok = byte_level(TRL_TEMPLATES["qwen3"])
    tok.add_tokens(["<answer>"], special_tokens=True)
    opening = encode_prompt(tok, HI)
    ids = [*tok("so <answer> , 4 .", add_special_tokens=False)["input_ids"]]
    assert tok.convert_tokens_to_ids("<answer>") in ids
    text = decode_response(tok, opening, ids, finished=False)
    assert text == "so <answer> , 4 ."
    assert encode(tok, HI, text, finished=False) == opening + ids


@pytest.mark.parametrize("clean", [True, False])
def test_clean_up_of_spaces_changes_nothing(clean):
    tok = byte_level()
    tok.clean_up_tokenization_spaces = clean
    ids = tok("a , b . it 's n't", add_special_tokens=False)["input_ids"]
    assert decode_response(tok, encode_prompt(tok, HI), ids, finished=False) == "a , b . it 's n't"


@pytest.mark.parametrize(
    ("post", "before"),
    [
        ("<bos> $A <eos>", [1]),
        ("<bos> $A", [1]),
        ("$A <eos>", []),
        ("<bos> <pad> $A <eos>", [1, 0]),
    ],
)
def test_tokenizers_that_add_tokens_of_their_own(post, before):
    """BOS once, EOS once after what is finished and nowhere else."""
    tok = byte_level(post=post)
    plain = tok("Q: a", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tok, "Q: a") == [*before, *plain]
    assert encode(tok, "Q:", " a", finished=False) == [*before, *plain]
    assert encode(tok, "Q:", " a") == [*before, *plain, 2]
    assert encode(tok, "Q:", " a<eos>") == [*before, *plain, 2]
    if before == [1]:
        assert encode(tok, "<bos>Q:", " a") == [*before, *plain, 2]
    chat = encode(tok, HI, "ok")
    assert (
        chat
        == tok(
            tok.apply_chat_template(
                [*HI, {"role": "assistant", "content": "ok"}], tokenize=False
            ).rstrip(),
            add_special_tokens=False,
        )["input_ids"]
    )


def test_a_template_without_a_closing_token_ends_by_eos():
    tok = byte_level(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert tok.decode(encode(tok, HI, "ok")) == "user: hi\n\nassistant: ok<eos>"
    assert tok.decode(encode(tok, HI, "ok", finished=False)) == "user: hi\n\nassistant: ok"
    assert stop_token_ids(tok) == (2,)
    end_at_closing(tok)
    assert tok.apply_chat_template(
        [*HI, {"role": "assistant", "content": "ok"}], tokenize=False
    ) == ("user: hi\n\nassistant: ok<eos>")


def test_chatml_on_a_base_model_stops_at_the_end_of_the_turn():
    tok = byte_level(CHATML)
    assert stop_token_ids(tok) == (2, 4)
    assert stop_token_ids(byte_level(None)) == (2,)
    nothing = byte_level(None)
    nothing.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        stop_token_ids(nothing)
