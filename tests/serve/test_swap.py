"""Another model takes over: no request is lost or mixed, and a bad folder changes nothing."""

import json
import os
import shutil
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx2
import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.models.scoring import Scorer
from shiftrm.serve.model import _is_path, load_served
from tests.serve.conftest import KEY, save_model

ROW = {"prompt": "the red", "responses": [" cat", " dog runs", "", " bird sits the"]}
AUTH = {"Authorization": f"Bearer {KEY}"}


def rewards_of(folder):
    scorer = Scorer.from_pretrained(folder)
    return scorer([ROW["prompt"]] * 4, ROW["responses"])


def version_of(server):
    return server.http.get("/health").json()["version"]


def test_reload(serving, model, other):
    server = serving(model, token=KEY)
    first = server.post("/score", ROW, headers=AUTH)
    answer = server.post("/reload", {"model": str(other)}, headers=AUTH)
    second = server.post("/score", ROW, headers=AUTH)
    assert set(answer) == {"model", "version"}
    assert answer["version"] == second["version"] == version_of(server)
    assert answer["version"].startswith("other@")
    assert first["rewards"] == pytest.approx(rewards_of(model), abs=1e-6)
    assert second["rewards"] == pytest.approx(rewards_of(other), abs=1e-6)
    server.post("/reload", {"model": str(model)}, headers=AUTH)
    assert server.post("/score", ROW, headers=AUTH) == first
    metrics = server.http.get("/metrics", headers=AUTH).text
    assert 'shiftrm_reloads_total{result="done"} 2.0' in metrics
    assert f'version="{first["version"]}"' in metrics


def test_while_requests_run(serving, model, other, tmp_path, tokenizer):
    """Eight clients ask while the model changes; every answer is one model's, and names it.

    The third model is in bf16, whose loading changes torch's default type for a moment.
    """
    half = save_model(tmp_path / "half", tokenizer, seed=2)
    from transformers import AutoModelForSequenceClassification as Auto

    Auto.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    folders = {path.name: path for path in (model, other, half)}
    expected = {name: rewards_of(path) for name, path in folders.items()}
    server, over, answers = serving(model, token=KEY, batch_tokens=16), threading.Event(), []

    def ask():
        with httpx2.Client(base_url=server.url, headers=AUTH, timeout=60) as client:
            while not over.is_set():
                answers.append(client.post("/score", json=ROW))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for name in ("other", "half", "reward", "half", "other", "reward"):
        server.post("/reload", {"model": str(folders[name])}, headers=AUTH)
        time.sleep(0.1)
    over.set()
    for thread in threads:
        thread.join()
    assert {a.status_code for a in answers} == {200}
    assert {a.json()["model"] for a in answers} == set(folders)
    for answer in answers:
        found = answer.json()
        assert answer.headers["X-Model-Version"] == found["version"]
        near = 2e-2 if found["model"] == "half" else 1e-6
        assert found["rewards"] == pytest.approx(expected[found["model"]], abs=near)


def test_requests_under_way_end_with_the_old_model(serving, model, other, monkeypatch):
    from shiftrm.serve import batching

    plain, begun, go_on = batching.compute, threading.Event(), threading.Event()

    def compute(*args):
        begun.set()
        assert go_on.wait(30)
        return plain(*args)

    server = serving(model, token=KEY, batch_tokens=8)
    monkeypatch.setattr(batching, "compute", compute)
    answers = {}

    def ask(name):
        answers[name] = httpx2.post(f"{server.url}/score", json=ROW, headers=AUTH, timeout=60)

    early = threading.Thread(target=ask, args=("early",))
    early.start()
    assert begun.wait(30)
    server.post("/reload", {"model": str(other)}, headers=AUTH)
    late = threading.Thread(target=ask, args=("late",))
    late.start()
    time.sleep(0.2)
    go_on.set()
    early.join()
    late.join()
    assert answers["early"].json()["rewards"] == pytest.approx(rewards_of(model), abs=1e-6)
    assert answers["late"].json()["rewards"] == pytest.approx(rewards_of(other), abs=1e-6)


def test_the_old_model_is_freed(serving, model, other):
    server = serving(model, token=KEY)
    server.post("/score", ROW, headers=AUTH)
    old = weakref.ref(server.models.current.scorer.model)
    server.post("/reload", {"model": str(other)}, headers=AUTH)
    deadline = time.monotonic() + 10
    while old() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert old() is None


def broken_folders(tmp_path, model, policy, tokenizer):
    """Folders that cannot be served, and what the error says."""
    empty = tmp_path / "empty"
    empty.mkdir()
    causal = tmp_path / "causal"
    policy.save_pretrained(causal)
    tokenizer.save_pretrained(causal)
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    nan = shutil.copytree(model, tmp_path / "nan")
    from safetensors.torch import load_file, save_file

    tensors = load_file(nan / "model.safetensors")
    tensors["score.weight"][0, 0] = float("nan")
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    return [
        (empty, "cannot be loaded"),
        (causal, "no score head"),
        (cut, "cannot be loaded"),
        (nan, "score.weight"),
        (tmp_path / "missing", "no such folder"),
        (tmp_path / "tokenizer.json", "no such folder"),
    ]


def test_a_bad_folder_leaves_the_old_model(serving, model, policy, tokenizer, tmp_path):
    server = serving(model, token=KEY)
    first = server.post("/score", ROW, headers=AUTH)
    for folder, says in broken_folders(tmp_path, model, policy, tokenizer):
        error = server.post("/reload", {"model": str(folder)}, status=400, headers=AUTH)
        assert says in error["error"]
        assert error["error"].startswith(str(folder))
        assert error["error"].isprintable()
        assert server.said[-1] == f"the model stays as it is: {error['error']}"
        assert server.post("/score", ROW, headers=AUTH) == first
    for body in ({}, {"model": 3}, {"model": ""}, {"model": "a\0b"}):
        error = server.post("/reload", body, status=400, headers=AUTH)
        assert error["error"] == "'model' must name the folder of a reward model"


def adapter_of_a_hub_model(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    config = {"peft_type": "LORA", "base_model_name_or_path": "nobody/no-such-model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_nothing_is_fetched_for_another_model(serving, model, tokenizer, tmp_path, monkeypatch):
    """A folder given to `/reload` may be an adapter whose base is a name on the hub."""
    from huggingface_hub import constants

    pytest.importorskip("peft")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = serving(model, token=KEY)
    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        folder = adapter_of_a_hub_model(tmp_path, tokenizer)
        error = server.post("/reload", {"model": str(folder)}, status=400, headers=AUTH)
        assert not [path for path in asked if "no-such-model" in path]
        with pytest.raises(UserError, match="cannot be loaded"):
            load_served(folder)  # `--model` may
        hub.shutdown()
    assert any("no-such-model" in path for path in asked)
    assert "cannot be loaded" in error["error"]


@pytest.mark.parametrize("name", ["models/nope", "./nope", "/nope", "a/b/c", "../nope"])
def test_a_missing_folder_is_no_hub_name(tmp_path, monkeypatch, name):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("asks the hub"))
    with pytest.raises(UserError, match=f"^{name}: no such folder"):
        load_served(name)


def test_hub_names_are_no_paths():
    for name in ("gpt2", "nobody/a-model"):
        assert not _is_path(name)


def point(link, folder):
    """Change a link in one step, as `ln -sfn` and `mv -T` do."""
    new = link.with_name("new-link")
    new.symlink_to(folder)
    os.replace(new, link)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_changed_link(serving, model, other, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(model)
    server = serving(link)
    first = server.post("/score", ROW)
    assert first["model"] == "current"
    point(link, tmp_path)  # not a model
    wait_for(lambda: len(server.said) == 2)
    assert "cannot be loaded" in server.said[1]
    assert server.post("/score", ROW) == first
    point(link, other)
    wait_for(lambda: version_of(server) != first["version"])
    second = server.post("/score", ROW)
    assert second["rewards"] == pytest.approx(rewards_of(other), abs=1e-6)
    assert len(server.said) == 3  # the bad target was tried once
    link.unlink()
    time.sleep(0.3)
    assert server.post("/score", ROW) == second


def test_the_link_is_watched_after_a_reload(serving, model, other, tmp_path):
    link, later = tmp_path / "current", tmp_path / "later"
    link.symlink_to(model)
    later.symlink_to(model)
    server = serving(link, token=KEY)
    server.post("/reload", {"model": str(other)}, headers=AUTH)
    time.sleep(0.3)
    assert version_of(server).startswith("other@")  # the link has not changed
    point(link, other)
    wait_for(lambda: version_of(server).startswith("current@"))
    server.post("/reload", {"model": str(later)}, headers=AUTH)  # this link is watched instead
    point(later, other)
    wait_for(lambda: len(server.said) == 5)
    point(link, model)
    time.sleep(0.3)
    assert version_of(server).startswith("later@")
