"""A served reward is the Scorer's, whatever else is scored at the same time."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from shiftrm.models.responses import Response
from shiftrm.models.scoring import Scorer
from tests.conftest import WORDS
from tests.serve.conftest import save_model

ODD = [
    "", "red", "\U0001f600 cat", "the </s> cat", "<pad> <s> dog", "\ud800 cat \udfff", "a\x00b",
    "cat </s>", " bird\n\nsits ",
]  # fmt: skip


def text(rng, most):
    return " ".join(rng.choices(WORDS.split(), k=rng.randrange(most)))


def prompt_of(rng):
    if rng.random() < 0.5:
        return text(rng, 20) or "the"
    return [{"role": "user", "content": text(rng, 12)}]


def row_of(rng):
    """A row as a client sends it: text or chat, unequal lengths, empty and odd responses."""
    prompt = prompt_of(rng)
    responses = [
        rng.choice(ODD) if rng.random() < 0.3 else " " + text(rng, 25)
        for _ in range(rng.randrange(1, 7))
    ]
    if isinstance(prompt, list) and rng.random() < 0.5:
        responses = [[{"role": "assistant", "content": r}] for r in responses]
    return {
        "prompt": prompt,
        "responses": responses,
        "finished": [rng.random() < 0.7 for _ in responses],
    }


def expected(scorer, row):
    """Each response alone, in a pass of its own."""
    return [
        scorer.score([Response(row["prompt"], text, finished)])[0]
        for text, finished in zip(row["responses"], row["finished"], strict=True)
    ]


def test_64_clients_at_once(serving, model):
    server, scorer = serving(model, batch_tokens=512), Scorer.from_pretrained(model)
    rows = [row_of(random.Random(seed)) for seed in range(64)]

    def ask(row):
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            answers = [client.post("/score", content=json.dumps(row)) for _ in range(3)]
            assert {a.status_code for a in answers} == {200}
            return [a.json()["rewards"] for a in answers]

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, rows))
    for row, answers in zip(rows, found, strict=True):
        for rewards in answers:
            assert rewards == pytest.approx(expected(scorer, row), abs=1e-6)
    metrics = server.http.get("/metrics").text
    passes = float(metrics.split("shiftrm_pass_sequences_count ")[1].split()[0])
    assert passes < 3 * 64  # requests were scored together


def test_many_rows_in_one_request(server, model):
    scorer = Scorer.from_pretrained(model)
    rows = [row_of(random.Random(1000 + seed)) for seed in range(40)]
    answer = server.post("/score", {"rows": rows})
    for row, rewards in zip(rows, answer["rewards"], strict=True):
        assert rewards == pytest.approx(expected(scorer, row), abs=1e-6)


def test_pairs_and_single_responses(server, model):
    scorer = Scorer.from_pretrained(model)
    pair = {"prompt": "the red", "chosen": " cat", "rejected": " dog runs"}
    assert server.post("/score", pair)["rewards"] == pytest.approx(
        scorer(["the red"] * 2, [" cat", " dog runs"]), abs=1e-6
    )
    one = {"prompt": None, "response": "the red cat", "finished": False}
    assert server.post("/score", one)["rewards"] == pytest.approx(
        scorer([None], ["the red cat"], finished=[False]), abs=1e-6
    )


def test_token_ids(server, model, tokenizer):
    scorer = Scorer.from_pretrained(model)
    row = {"prompt_ids": [5, 6, 7], "response_ids": [[8, 2], [9, 10, 11], []]}
    alone = [scorer.score_ids([[5, 6, 7, *ids]])[0] for ids in row["response_ids"]]
    assert server.post("/score", row)["rewards"] == pytest.approx(alone, abs=1e-6)


def test_equal_models_have_equal_versions(server, model, other):
    answer = server.http.post("/score", json={"prompt": "the", "responses": [" cat"]})
    version = answer.json()["version"]
    assert answer.headers["X-Model-Version"] == version
    assert version.startswith("reward@")
    assert answer.json()["model"] == "reward"


def test_a_model_that_cannot_share_prefixes(serving, tmp_path, tokenizer):
    """An ensemble is scored row by row, with the same rewards."""
    from shiftrm.models.combined import Ensemble, Member

    folder = tmp_path / "ensemble"
    members = []
    for seed in (0, 1):
        save_model(folder / f"member-{seed}", tokenizer, seed)
        members.append(Member(f"member-{seed}", 0.1 * seed, 1.0 + seed))
    Ensemble("mean", tuple(members)).write(folder)
    server, scorer = serving(folder), Scorer.from_pretrained(folder)
    assert "several models" in server.models.current.obstacle
    row = row_of(random.Random(5))
    found = server.post("/score", row)["rewards"]
    assert found == pytest.approx(expected(scorer, row), abs=1e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_sliding_windows_and_shared_prefixes(serving, tmp_path, tokenizer, window):
    import torch
    from transformers import MistralConfig, MistralForSequenceClassification

    from tests.conftest import LLAMA_SIZES

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32, **LLAMA_SIZES, sliding_window=window, num_labels=1, pad_token_id=0
    )
    MistralForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    server, scorer = serving(tmp_path), Scorer.from_pretrained(tmp_path)
    assert server.models.current.obstacle is None
    row = {"prompt": " ".join(["the red cat"] * 5), "responses": [" sits", " a dog", " runs the"]}
    found = server.post("/score", row)["rewards"]
    assert found == pytest.approx(expected(scorer, {**row, "finished": [True] * 3}), abs=1e-6)
