"""What a row becomes, token by token."""

import inspect

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shiftrm.errors import UserError
from shiftrm.models.rendering import (
    NOT_FOR_TEMPLATES,
    check_template_options,
    check_text,
    decode_response,
    encode,
    encode_prompt,
    pin_template,
    stop_token_ids,
)
from tests.byte_level import byte_level


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_text_is_concatenated_and_closed_once(tokenizer):
    assert tokens(tokenizer, encode(tokenizer, "the red", " cat")) == ["the", "red", "cat", "</s>"]
    closed = encode(tokenizer, "the red", " cat </s>")
    assert closed == encode(tokenizer, "the red", " cat")


def test_a_truncated_response_stays_open(tokenizer):
    assert tokens(tokenizer, encode(tokenizer, "the", " cat", finished=False)) == ["the", "cat"]
    chat = [{"role": "user", "content": "the cat"}]
    closed = encode(tokenizer, chat, "runs")
    opened = encode(tokenizer, chat, "runs", finished=False)
    assert tokens(tokenizer, closed)[-2:] == ["runs", "</s>"]
    assert tokens(tokenizer, opened)[-1] == "runs"


def test_chat(tokenizer):
    chat = [{"role": "user", "content": "the cat"}]
    expected = ["<s>", "user", "the", "cat", "</s>", "<s>", "assistant", "runs", "</s>"]
    assert tokens(tokenizer, encode(tokenizer, chat, "runs")) == expected
    as_messages = [{"role": "assistant", "content": "runs"}]
    assert tokens(tokenizer, encode(tokenizer, chat, as_messages)) == expected
    assert encode_prompt(tokenizer, chat) == encode(tokenizer, chat, "runs")[:-2]


def test_a_prompt_is_the_beginning_of_its_row(tokenizer):
    prompt = encode_prompt(tokenizer, "the red")
    assert encode(tokenizer, "the red", " cat runs")[: len(prompt)] == prompt


def test_decoding_keeps_the_space(tokenizer):
    whole = encode(tokenizer, "the red", " cat runs")
    prompt = encode_prompt(tokenizer, "the red")
    assert decode_response(tokenizer, prompt, whole[len(prompt) :]) == " cat runs"


def test_chat_without_template_is_refused(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(plain, [{"role": "user", "content": "the"}], "cat")


@pytest.mark.parametrize("wrong", [None, 3, {"role": "user", "content": "the"}])
def test_what_is_no_text_is_refused_by_its_type(tokenizer, wrong):
    """str(None) would be scored as the word None."""
    name = type(wrong).__name__
    for prompt in ("the", None, [{"role": "user", "content": "the"}]):
        with pytest.raises(UserError, match=f"response holds {name}"):
            encode(tokenizer, prompt, wrong)
    with pytest.raises(UserError, match=f"prompt holds {name}"):
        encode_prompt(tokenizer, wrong)
    if wrong is not None:  # no prompt: the response is the whole conversation
        with pytest.raises(UserError, match=f"prompt holds {name}"):
            encode(tokenizer, wrong, "cat")


def test_messages_need_role_and_content(tokenizer):
    with pytest.raises(UserError, match="response, message 1 has no 'content'"):
        encode(tokenizer, None, [{"role": "assistant"}])
    with pytest.raises(UserError, match="prompt, message 2 has no 'role'"):
        encode(tokenizer, [{"role": "user", "content": "the"}, {"content": "a"}], "cat")


@pytest.mark.parametrize("content", [True, 7, 0, {"type": "text", "text": "a"}])
def test_content_is_text_also_beside_calls_of_tools(tokenizer, content):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    for more in ({}, {"tool_calls": calls}):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, **more}]
        kind = type(content).__name__
        with pytest.raises(UserError, match=f"message 2 has 'content' of type {kind}; expected"):
            check_text(chat, "prompt")


def test_arguments_of_the_tokenizer_are_no_options_of_a_template():
    """A row, which a server gets from anyone, could otherwise replace the template.

    A new argument of transformers fails here, so that somebody looks at it.
    """
    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    own = known - {"self", "kwargs", "tools", "documents"}
    assert own == NOT_FOR_TEMPLATES
    for name in own:
        with pytest.raises(UserError, match=f"row 3: 'chat_template_kwargs' has {name!r}"):
            check_template_options({"chat_template_kwargs": {name: "x", "thinking": 1}}, "row 3")
    check_template_options({"chat_template_kwargs": {"enable_thinking": False}}, "row 3")


@pytest.mark.parametrize("lead", ["", "\n"])
def test_a_turn_that_two_tokens_close(lead):
    """`<|im_end|><eos>`: neither is part of the answer, and both are read with it again."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        f"{{{{ {lead + '<|im_end|>'!r} }}}}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    prompt = [{"role": "user", "content": "hi"}]
    opening = encode_prompt(tokenizer, prompt)
    whole = encode(tokenizer, prompt, [{"role": "assistant", "content": "ok"}])
    assert whole[: len(opening)] == opening
    ended = whole[len(opening) :]
    assert tokenizer.convert_ids_to_tokens(ended[-2:]) == ["<|im_end|>", tokenizer.eos_token]
    words = decode_response(tokenizer, opening, ended)
    assert words == "ok" + lead  # with a lead the policy wrote it itself
    assert encode(tokenizer, prompt, words) == encode(tokenizer, prompt, "ok") == whole
    end, eos = ended[-2:]
    assert decode_response(tokenizer, opening, [*ended[:-2], eos]) == words  # EOS alone
    assert decode_response(tokenizer, opening, [*ended[:-2], end, end, eos]) == f"{words}<|im_end|>"
    open_end = decode_response(tokenizer, opening, ended[:-1], finished=False)
    assert open_end == f"{words}<|im_end|>"


@pytest.mark.parametrize("wrong", ["x", 2.0, [[2]], [2, "x"]])
def test_a_generation_config_whose_end_is_no_token(tokenizer, wrong):
    config = GenerationConfig()
    config.eos_token_id = wrong
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .* expected the"):
        stop_token_ids(tokenizer, config)


def test_a_template_with_todays_date_is_pinned(tokenizer, tmp_path):
    import copy

    from transformers import AutoTokenizer

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d') %}{% endif %}"
        '{{ day + " " + strftime_now( "%Y" ) + " " }}' + tokenizer.chat_template
    )
    dated.add_tokens(["26", "2024"])
    before = encode(dated, [{"role": "user", "content": "the"}], "cat")
    pin_template(dated)
    after = encode(dated, [{"role": "user", "content": "the"}], "cat")
    assert tokens(dated, after)[:2] == ["26", "2024"]
    assert before[-len(after) + 2 :] == after[2:]
    assert before != after, "today is another day"
    dated.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(again, [{"role": "user", "content": "the"}], "cat") == after
    pinned = dated.chat_template
    pin_template(dated)
    assert dated.chat_template == pinned
    plain = tokenizer.chat_template
    pin_template(tokenizer)
    assert tokenizer.chat_template == plain


@pytest.mark.parametrize("chat", [False, True])
def test_a_lone_surrogate_is_read_as_a_question_mark(tokenizer, chat):
    if chat:
        prompt, answers = [{"role": "user", "content": "the \ud800"}], ("red \udc00", "red ?")
        clean = [{"role": "user", "content": "the ?"}]
    else:
        prompt, answers, clean = "the \ud800", (" red \udc00", " red ?"), "the ?"
    assert encode(tokenizer, prompt, answers[0]) == encode(tokenizer, clean, answers[1])
    assert encode_prompt(tokenizer, prompt) == encode_prompt(tokenizer, clean)
