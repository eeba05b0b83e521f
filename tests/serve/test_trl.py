"""The reward function that TRL's command line takes by its name."""

import pytest

from shiftrm.errors import UserError
from shiftrm.models.scoring import Scorer
from shiftrm.serve import trl
from tests.serve.conftest import KEY


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Each test makes a client of its own from its own environment."""
    for name in (trl.ADDRESS, trl.POLICY, "SHIFTRM_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    trl._client.cache_clear()
    yield
    trl._client.cache_clear()


def test_the_address_comes_from_the_environment(monkeypatch):
    with pytest.raises(UserError, match="SHIFTRM_REWARD_URL is not set"):
        trl.reward_server(["a"], ["b"])


def test_rewards_are_the_servers_and_the_token_may_stand_in_the_address(server, model, monkeypatch):
    monkeypatch.setenv(trl.ADDRESS, server.url.replace("://", f"://shiftrm:{KEY}@"))
    prompts, texts = ["the red", "a"], [" cat", " dog runs"]
    found = trl.reward_server(prompts=prompts, completions=texts, completion_ids=None, other=1)
    assert found == pytest.approx(Scorer.from_pretrained(model)(prompts, texts), abs=1e-5)


def test_with_the_policys_tokenizer_a_cut_response_is_unfinished(server, model, monkeypatch):
    monkeypatch.setenv(trl.ADDRESS, server.url)
    monkeypatch.setenv("SHIFTRM_TOKEN", KEY)
    monkeypatch.setenv(trl.POLICY, str(model))
    scorer = Scorer.from_pretrained(model)
    ids = scorer.tokenizer(" cat", add_special_tokens=False)["input_ids"]
    ended = [*ids, scorer.tokenizer.eos_token_id]
    found = trl.reward_server(["the red"] * 2, [" cat"] * 2, completion_ids=[ids, ended])
    wanted = scorer(["the red"] * 2, [" cat"] * 2, finished=[False, True])
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found[0] != found[1]
