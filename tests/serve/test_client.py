"""The client: TRL's trainers, retries, one model for one call, errors in one line."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.responses import Response, tokenizer_name
from shiftrm.models.reward_functions import rewards_of
from shiftrm.models.scoring import Scorer
from shiftrm.serve import client as client_module
from shiftrm.serve.client import RewardClient
from tests.serve.conftest import KEY

PROMPTS = ["the red", [{"role": "user", "content": "a dog"}], "the red", "a"]
TEXTS = [" cat", " runs", " dog sits", ""]


@pytest.fixture
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    return pauses


def test_scores_are_the_scorers(server, model):
    reward, scorer = RewardClient(server.url, token=KEY), Scorer.from_pretrained(model)
    finished = [True, False, True, True]
    given = [Response(p, t, f) for p, t, f in zip(PROMPTS, TEXTS, finished, strict=True)]
    assert rewards_of(reward, given) == pytest.approx(scorer.score(given), abs=1e-6)
    assert reward.version == server.models.current.version
    as_scorer = reward(PROMPTS, TEXTS, finished=finished)
    assert as_scorer == pytest.approx(scorer.score(given), abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 256])
def test_sampled_tokens_and_template_options(server, model, tokenizer, size):
    scorer = Scorer.from_pretrained(model)
    name = tokenizer_name(scorer.tokenizer)
    options = {"tools": None, "enable_thinking": False}
    given = [
        Response("the red", " cat", True, (11, 2), name, options),
        Response("the red", " cat", False, (11,), name, options),
        Response("a", " cat dog", True),
        Response("the red", " dog", True),
    ]
    reward = RewardClient(server.url, token=KEY, batch_size=size)
    assert reward.score(given) == pytest.approx(scorer.score(given), abs=1e-6)


def test_as_trl_calls_it(server, model, tokenizer):
    """Without a tokenizer: decoded texts. With the policy's: its tokens, cut off or not."""
    scorer = Scorer.from_pretrained(model)
    metrics = {}
    others = {"trainer_state": object(), "log_extra": print, "log_metric": metrics.__setitem__}
    prompts, ids = ["the red", "the red"], [[11, 12, 2], [11, 12, 13]]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    plain = RewardClient(server.url, token=KEY)
    found = plain(prompts=prompts, completions=texts, completion_ids=ids, answer=[1, 2], **others)
    assert found == pytest.approx(scorer(prompts, texts), abs=1e-6)
    exact = RewardClient(server.url, token=KEY, tokenizer=tokenizer)
    found = exact(prompts=prompts, completions=texts, completion_ids=ids, **others)
    opening = encode_prompt(tokenizer, "the red")
    alone = [scorer.score_ids([opening + one])[0] for one in ids]
    assert found == pytest.approx(alone, abs=1e-6)
    assert metrics == {"reward_server/swaps": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_of_trl(server, policy, tokenizer, tmp_path, method, conversational):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }[method]
    words = ["the red cat", "a dog", "the small bird", "blue fish"]
    prompts = [[{"role": "user", "content": w}] for w in words] if conversational else words
    policy.save_pretrained(tmp_path / "policy")
    args = config(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    reward = RewardClient(server.url, token=KEY, tokenizer=tokenizer)
    trainer = trainer_class(
        model=str(tmp_path / "policy"),
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "rewards/reward_server/mean" in row]
    assert len(logged) == 2
    assert all(abs(row["rewards/reward_server/mean"]) > 0 for row in logged)
    assert reward.version.startswith("reward@")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(policy.parameters(), trainer.model.parameters(), strict=True)
    )


class Fake:
    """A server that answers as told: statuses, or versions of the rewards."""

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                status, content, headers = fake.answers.pop(0)
                if content == "version":
                    rewards = [[1.0] * len(row["responses"]) for row in body["rows"]]
                    content, status = {"rewards": rewards, "version": status}, 200
                if status is None:  # the connection is lost
                    self.close_connection = True
                    return
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


GOOD = ("v1", "version", {})


def test_retries(no_pauses):
    busy = (503, {"error": "busy"}, {"Retry-After": "3"})
    with Fake(busy, (None, b"", {}), (504, b"<html>", {}), GOOD) as fake:
        reward = RewardClient(fake.url, token="")
        assert reward(["the"], [" cat"]) == [1.0]
    assert no_pauses == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((400, {"error": "row 0: no"}, {}), "refuses the request (status 400: row 0: no)"),
        ((401, {"error": "wrong"}, {}), "check SHIFTRM_TOKEN"),
        ((404, b"<html>\n", {}), "refuses the request (status 404)"),
        ((500, {"error": "broken\x1b[31m"}, {}), "fails (status 500: broken\\x1b[31m)"),
        ((200, b"<html>", {}), "does not answer as `shiftrm serve`"),
        ((200, {"rewards": [[1.0, 2.0]]}, {}), "sent 2 rewards for 1 responses"),
        ((200, {"rewards": "a"}, {}), "sent 0 rewards for 1 responses"),
    ],
)
def test_errors_that_remain(answer, says, no_pauses):
    with Fake(answer) as fake, pytest.raises(UserError) as error:
        RewardClient(fake.url, token="a-secret-token")(["the"], [" cat"])
    assert says in str(error.value)
    assert "a-secret-token" not in str(error.value)
    assert error.value.__cause__ is None
    assert no_pauses == []


def test_a_server_that_is_not_there(no_pauses):
    with Fake() as fake:
        url = fake.url
    with pytest.raises(UserError, match=r"cannot be reached .*Connection refused.*shiftrm serve"):
        RewardClient(url, token="", retries=2)(["the"], [" cat"])
    assert no_pauses == [0.5, 1.0]


def test_one_call_has_one_models_rewards():
    """The model changes between two requests of one call: everything is scored anew."""
    other = ("v2", "version", {})
    with Fake(GOOD, other, other, other, GOOD, GOOD) as fake:
        reward = RewardClient(fake.url, token="", batch_size=2)
        assert reward(["a", "a", "b"], [" 1", " 2", " 3"]) == [1.0] * 3
        assert (reward.version, reward.swaps, len(fake.bodies)) == ("v2", 0, 4)
        reward(["a", "a", "b"], [" 1", " 2", " 3"])
        assert (reward.version, reward.swaps) == ("v1", 1)
    with Fake(*[GOOD, other] * 4) as fake, pytest.raises(UserError, match="changed its model"):
        RewardClient(fake.url, token="", batch_size=2)(["a", "a", "b"], [" 1", " 2", " 3"])


def test_responses_to_one_prompt_are_one_row():
    with Fake(GOOD) as fake:
        RewardClient(fake.url, token="")(["a", "b", "a"], [" 1", " 2", " 3"])
    assert fake.bodies[0]["rows"] == [
        {"prompt": "a", "responses": [" 1", " 3"], "finished": [True, True]},
        {"prompt": "b", "responses": [" 2"], "finished": [True]},
    ]


def test_reload(serving, model, other):
    server = serving(model, token=KEY)
    reward = RewardClient(server.url, token=KEY)
    reward(["the"], [" cat"])
    assert reward.reload(str(other)).startswith("other@")
    reward(["the"], [" cat"])
    assert (reward.version[:5], reward.swaps) == ("other", 1)
    with pytest.raises(UserError, match=r"status 400: .*missing: no such folder"):
        reward.reload(str(other / "missing"))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "ftp://a", "http://u:p@a", "http://a?b"]
)
def test_bad_addresses(url):
    with pytest.raises(UserError):
        RewardClient(url)


def test_the_token_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("SHIFTRM_TOKEN", KEY)
    assert len(RewardClient(server.url)(["the"], [" cat"])) == 1
    monkeypatch.setenv("SHIFTRM_TOKEN", "other-token")
    with pytest.raises(UserError, match="refuses access"):
        RewardClient(server.url)(["the"], [" cat"])
    assert KEY not in repr(RewardClient(server.url, token=KEY))


def test_needs_no_other_packages():
    """A training script imports it without the server's packages, torch or transformers."""
    code = (
        "import sys; import shiftrm.serve.client; "
        "print([m for m in ('torch', 'transformers', 'fastapi', 'uvicorn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
