"""Reward models on disk, and a server in a thread at a free port."""

import asyncio
import contextlib
import json
import threading

import httpx2
import pytest
import torch
from transformers import LlamaForSequenceClassification

from shiftrm.serve.app import Service, make_app
from shiftrm.serve.listening import server_of
from shiftrm.serve.models import Models
from shiftrm.serve.settings import Settings, bound_socket
from tests.conftest import llama_config

KEY = "a-token-of-tests"


def save_model(folder, tokenizer, seed=0, **options):
    """A reward model with large rewards, so that a difference shows."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1, **options))
    with torch.no_grad():
        model.score.weight.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory, tokenizer):
    """The folder of a reward model."""
    return save_model(tmp_path_factory.mktemp("models") / "reward", tokenizer)


@pytest.fixture(scope="session")
def other(tmp_path_factory, tokenizer):
    """The folder of another one."""
    return save_model(tmp_path_factory.mktemp("models") / "other", tokenizer, seed=1)


class Running:
    """A server in a thread.

    Attributes:
        said: the lines it said.
    """

    def __init__(self, path, log=None, say=None, **options):
        settings = Settings(port=0, **{"poll": 0.05, **options})
        self.said = []
        self.models = Models(str(path), max_length=settings.max_length)
        self.service = Service(
            self.models, settings,
            log=log, say=say or self.said.append,
        )  # fmt: skip
        self._socket = bound_socket(settings)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = server_of(make_app(self.service), settings, say=self.service.say)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self._socket]))
        )
        self._thread.start()
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.http.get("/health")  # waits until it is up

    def post(self, path, content, status=200, **options):
        """The JSON of an answer with this status."""
        answer = self.http.post(path, content=json.dumps(content), **options)
        assert answer.status_code == status, answer.text
        return answer.json()

    def close(self):
        """End it; once more does nothing."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        assert not self._thread.is_alive()


@pytest.fixture
def serving():
    """serving(folder, **settings) -> a running server, closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(path, **options):
            server = Running(path, **options)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def server(model):
    """One server for tests that do not change it."""
    running = Running(model, token=KEY, max_bytes=100_000)
    running.http.headers["Authorization"] = f"Bearer {KEY}"
    yield running
    running.close()
