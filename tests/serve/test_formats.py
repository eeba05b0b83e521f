"""The endpoints, called as the clients' own code calls them."""

import base64
import json
import math
import struct

import pytest
from transformers import AutoTokenizer

from shiftrm.models.scoring import Scorer
from shiftrm.models.templates import turn
from tests.serve.conftest import KEY, save_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "the red cat"}]


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer.from_pretrained(model)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory, tokenizer):
    """A model whose template writes a newline after the token that closes an answer."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = CHATML
    return save_model(tmp_path_factory.mktemp("chatml"), other)


# -- OpenRLHF: openrlhf/utils/agent.py, SingleTurnAgentExecutor ------------------------------------


def openrlhf_query(tokenizer, prompt, answer_ids):
    """The text that the client sends: prompt and sampled tokens, decoded with special tokens."""
    prompt_ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(prompt_ids + answer_ids, skip_special_tokens=False)


def test_openrlhf(server, scorer, tokenizer):
    """One finished response a request, with its end token; `labels` may be anything."""
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    words = tokenizer("dog runs", add_special_tokens=False)["input_ids"]
    query = openrlhf_query(tokenizer, prompt, [*words, tokenizer.eos_token_id])
    payload = {"query": [query], "prompts": [prompt], "labels": [None]}
    answer = server.post("/get_reward", payload)
    assert answer["rewards"] == answer["scores"]
    assert answer["rewards"] == pytest.approx(scorer([CHAT], [" dog runs"]), abs=1e-6)
    for values in answer["extra_logs"].values():  # the client makes a tensor of each
        assert [type(value) for value in values] == [float]


def test_openrlhf_cut_off(server, scorer, tokenizer):
    """Without its end token, a response is read as unfinished."""
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    words = tokenizer("dog runs", add_special_tokens=False)["input_ids"]
    query = openrlhf_query(tokenizer, prompt, words)
    answer = server.post("/get_reward", {"query": [query, query], "prompts": [], "labels": []})
    alone = scorer([CHAT], [" dog runs"], finished=[False])
    assert answer["rewards"] == pytest.approx(alone * 2, abs=1e-6)


def test_openrlhf_with_the_token_in_its_address(server):
    """The client takes only an address; its user and password become a Basic header."""
    import httpx2

    url = server.url.replace("http://", f"http://any:{KEY}@")
    payload = {"query": ["the cat"], "prompts": ["the"], "labels": ["x"]}
    assert httpx2.post(f"{url}/get_reward", json=payload).status_code == 200


# -- verl: verl/experimental/reward_loop/reward_loop.py, compute_score_disrm -----------------------


def verl_prompt(tokenizer, chat, response):
    """The text that the reward loop sends: the whole chat in the model's template, without BOS."""
    chat = [*chat, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=False, tokenize=False)
    if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token) :]
    return text


@pytest.mark.parametrize("name", ["activation", "use_activation"])  # before and after vLLM 0.11.2
def test_verl_with_vllm(server, scorer, tokenizer, name):
    payload = {"model": "any/name", "input": verl_prompt(tokenizer, CHAT, "dog runs"), name: False}
    output = server.post("/classify", payload)
    assert output["data"][-1]["probs"][-1] == pytest.approx(
        scorer([CHAT], [[{"role": "assistant", "content": "dog runs"}]])[0], abs=1e-6
    )


def test_verl_with_sglang(server, scorer, tokenizer):
    payload = {"model": "any/name", "input": verl_prompt(tokenizer, CHAT, "dog runs")}
    output = server.post("/v1/embeddings", payload)
    assert output["data"][-1]["embedding"][-1] == pytest.approx(
        scorer([CHAT], [[{"role": "assistant", "content": "dog runs"}]])[0], abs=1e-6
    )


def test_the_reward_is_read_at_the_closing_token(serving, chatml):
    """ChatML writes a newline after it, where the model has never been trained."""
    server, scorer = serving(chatml), Scorer.from_pretrained(chatml)
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    assert turn(tokenizer).tail == "<|im_end|>\n"
    answer = [{"role": "assistant", "content": "dog runs"}]
    expected = scorer([CHAT], [answer])
    text = verl_prompt(tokenizer, CHAT, "dog runs")
    assert text.endswith("\n")
    found = server.post("/classify", {"input": text, "use_activation": False})["data"]
    assert found[0]["probs"] == pytest.approx(expected, abs=1e-6)
    by_messages = server.post("/classify", {"messages": CHAT + answer})["data"]
    assert by_messages[0]["probs"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("writes_bos", [True, False])
def test_bos_stands_once_and_only_where_the_template_writes_it(
    serving, tmp_path, tokenizer, writes_bos
):
    """A tokenizer that adds BOS, as Llama's, with a template that writes it or (Zephyr's) not."""
    import copy

    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    other.chat_template = ("{{ '<s> ' }}" if writes_bos else "") + (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    server = serving(save_model(tmp_path, other))
    scorer, saved = Scorer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert saved("red")["input_ids"][0] == saved.bos_token_id
    chat_ids = scorer.encode(CHAT, [{"role": "assistant", "content": "dog runs"}])
    assert (chat_ids[0] == saved.bos_token_id) == writes_bos
    text = verl_prompt(saved, CHAT, "dog runs")
    served = server.models.current
    assert served.whole_ids(text) == chat_ids
    assert served.whole_ids("red cat") == scorer.encode(None, "red cat", finished=False)
    assert served.whole_ids("red cat")[0] == saved.bos_token_id
    assert served.whole_ids("<s> red cat") == served.whole_ids("red cat")
    assert served.whole_ids("red cat", special=False) == served.whole_ids("red cat")[1:]


# -- vLLM's and OpenAI's forms ---------------------------------------------------------------------


def test_classify_like_vllm(server, scorer):
    answer = server.post("/v1/classify", {"model": "m", "input": ["the cat", [5, 6, 7]]})
    assert answer["object"] == "list"
    assert [d["index"] for d in answer["data"]] == [0, 1]
    assert {d["num_classes"] for d in answer["data"]} == {1}
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    alone = scorer.score_ids([scorer.encode(None, "the cat", finished=False), [5, 6, 7]])
    assert [d["probs"][0] for d in answer["data"]] == pytest.approx(alone, abs=1e-6)


def test_a_sigmoid_only_where_it_is_asked_for(server):
    raw = server.post("/classify", {"input": "the cat"})["data"][0]["probs"][0]
    squashed = server.post("/classify", {"input": "the cat", "use_activation": True})
    assert squashed["data"][0]["probs"][0] == pytest.approx(1 / (1 + math.exp(-raw)))


def test_embeddings_as_the_openai_client_reads_them(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    found = client.embeddings.create(model="m", input=["the cat", "a dog"])  # asks for base64
    plain = server.post("/v1/embeddings", {"input": ["the cat", "a dog"]})["data"]
    for one, other in zip(found.data, plain, strict=True):
        assert one.embedding == pytest.approx(other["embedding"], rel=1e-6)
    packed = server.post("/v1/embeddings", {"input": [5, 6], "encoding_format": "base64"})
    number = struct.unpack("<f", base64.b64decode(packed["data"][0]["embedding"]))
    single = server.post("/v1/embeddings", {"input": [5, 6]})["data"][0]["embedding"]
    assert number == pytest.approx(single, rel=1e-6)
    assert [m.id for m in client.models.list()] == ["reward"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/score", {}, "nothing to score: expected a column 'response'"),
        ("/score", {"prompt": 3, "responses": ["a"]}, "column 'prompt' holds int"),
        ("/score", {"prompt": "the", "responses": [3]}, "response 0 holds int"),
        ("/score", {"promt": "the", "responses": ["a"]}, "'promt' is not known; did you mean 'pr"),
        ("/score", {"rows": [{"response": "a", "finnished": False}]}, "mean 'finished'?"),
        ("/score", {"prompt": "describe", "response_ids": [[3]]}, "'prompt' would be lost"),
        ("/score", {"prompt_id": [5], "response_ids": [[3]]}, "did you mean 'prompt_ids'?"),
        ("/score", {"prompt_ids": 0, "response_ids": [[3]]}, "'prompt_ids' must be"),
        (
            "/score",
            {"prompt": "the", "responses": ["a", "b " * 4000]},
            "response 1: prompt and response have 8003 ch",
        ),
        ("/score", {"prompt": "the " * 2000, "response": "a"}, "more than 6400 characters"),
        ("/classify", {"input": "a" * 6401}, "have 6401 characters, and at most 64 tokens"),
        ("/classify", {"messages": [{"role": "user", "content": "a" * 6401}]}, "6405 characters"),
        ("/classify", {"messages": "abc"}, "'messages' holds str; expected a list"),
        ("/classify", {"input": "a", "use_activation": "true"}, "expected true or false"),
        ("/classify", {"input": "a", "use_activatoin": True}, "mean 'use_activation'?"),
        ("/classify", {"input": "a", "add_special_tokens": "false"}, "expected true or false"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "xx"}, "'encoding_format' is 'xx'"),
        ("/score", {"prompt": "the", "responses": []}, "empty list"),
        ("/score", {"prompt": "the", "responses": ["a"], "finished": [1]}, "'finished'"),
        ("/score", {"rows": []}, "'rows' must be a list"),
        ("/score", {"rows": [3]}, "row 0: is int"),
        ("/score", {"prompt": [], "responses": [""], "finished": [False]}, "nothing to score"),
        ("/score", {"prompt": "the", "responses": [" cat" * 90]}, "92 tokens but the model's"),
        ("/score", {"prompt_ids": [5], "response_ids": [[99]]}, "token id 99"),
        ("/score", {"prompt_ids": ["a"], "response_ids": [[5]]}, "'prompt_ids' must be"),
        ("/score", {"response_ids": 3}, "'response_ids' must be"),
        ("/score", {"prompt": "a", "responses": ["b"], "tools": 3}, "'tools' is 3"),
        (
            "/score",
            {"prompt": "a", "response": "b", "chat_template_kwargs": {"chat_template": "x"}},
            "request: 'chat_template_kwargs' has 'chat_template'",
        ),
        (
            "/classify",
            {
                "messages": [{"role": "user", "content": "a"}],
                "chat_template_kwargs": {"tokenize": True},
            },
            "'chat_template_kwargs' has 'tokenize'",
        ),
        (
            "/classify",
            {"messages": [{"role": "assistant", "content": True, "tool_calls": [{}]}]},
            "message 1 has 'content' of type bool",
        ),
        ("/get_reward", {"prompts": ["a"]}, "'query' must be"),
        ("/get_reward", {"query": [None]}, "query 0: is NoneType"),
        ("/get_reward", {"query": [""]}, "query 0: has no tokens"),
        ("/classify", {"model": "m"}, "'input' must be"),
        ("/classify", {"input": [["a"]]}, "input 0: is list"),
        ("/classify", {"input": [[5, True]]}, "input 0: is list"),
        ("/classify", {"input": [[-1]]}, "token id -1"),
        ("/classify", {"input": [[5] * 65]}, "has 65 tokens, and at most 64"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 8}, "not supported"),
        ("/classify", {"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "a reward is one number"),
    ],
)
def test_bad_content(server, path, body, says):
    error = server.post(path, body, status=400)
    assert list(error) == ["error"]
    assert says in error["error"]
    assert error["error"].isprintable()


def test_other_columns_are_ignored(server):
    """As `shiftrm score` does: rows of data sets have many."""
    row = {"prompt": "the", "response": " cat"}
    more = {"prompt_id": "a1", "id": 3, "tool": "x", "source": "x", "score": 1, "chosen_model": "m"}
    assert server.post("/score", row | more) == server.post("/score", row)
    plain = server.post("/classify", {"input": "the cat"})["data"]
    assert server.post("/classify", {"input": "the cat", "user": "u"})["data"] == plain


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"[1]", "is list"),
        (b'{"input": "a"', "not JSON"),
        (b"\xff\xfe\xfa", "not"),
        (b'{"input": ' + b"[" * 40_000, "too deep"),
        (b'{"input": [' + b"9" * 5000 + b"]}", "too long to read"),
    ],
)
def test_broken_json(server, raw, says):
    answer = server.http.post("/classify", content=raw)
    assert answer.status_code == 400
    assert says in json.loads(answer.content)["error"]
