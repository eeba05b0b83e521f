"""Configuration: typed, suggested, and read back as written."""

import pytest

from shiftrm.config import (
    apply_overrides,
    at_home,
    differences,
    from_mapping,
    read_yaml,
    to_mapping,
)
from shiftrm.errors import UserError
from shiftrm.pipeline.demo_config import RunConfig


def build(*overrides):
    return from_mapping(RunConfig, apply_overrides(to_mapping(RunConfig()), list(overrides)))


def test_round_trip():
    config = build("seed=3", "ppo.steps=7", "methods=[fixed]", "reward.learning_rate=5e-5")
    assert from_mapping(RunConfig, to_mapping(config)) == config
    assert (config.seed, config.ppo.steps, config.methods) == (3, 7, ("fixed",))
    assert config.reward.learning_rate == 5e-5
    assert config.ppo.sampling.max_new_tokens == RunConfig().ppo.sampling.max_new_tokens


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=3", "unknown setting 'round'; did you mean 'rounds'"),
        ("ppo.step=3", "unknown setting 'ppo.step'; did you mean 'steps'"),
        ("poo.steps=3", "unknown setting 'poo'; did you mean 'ppo'"),
        ("ppo.steps=many", "ppo.steps is 'many'; expected a whole number"),
        ("ppo.steps=true", "ppo.steps is True; expected a whole number"),
        ("matched_kl=1", "matched_kl is 1; expected true or false"),
        ("ppo=3", "ppo is 3; expected settings below it"),
        ("methods=fixed", "expected a list"),
        ("methods=[fxed]", "unknown method 'fxed'; did you mean 'fixed'"),
        ("methods=[fixed, fixed]", "name at least one arm, and none twice"),
        ("methods=[]", "name at least one arm"),
        ("rounds=0", "rounds is 0; it must be at least 1"),
        ("data.responses_per_group=1", "responses_per_group is 1; it must be at least 2"),
        ("evaluation.prompts=4000", "raise world.eval_prompts"),
        ("reward.evaluations=0", "reward.evaluations is 0; it must be above 0"),
        ("sft.learning_rate=-1", "sft.learning_rate is -1"),
        ("world.seed=5", "world.seed follows the run's seed"),
        ("ppo.reward_mean=1.0", "ppo.reward_mean is set by the run itself"),
        ("ppo.kl_target=null", "matched_kl needs ppo.kl_target"),
        ("ppo.steps", "write key=value"),
        ("ppo.steps=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=message):
        build(override)


def test_differences_name_the_setting():
    old, new = to_mapping(build()), to_mapping(build("ppo.steps=7", "seed=1"))
    assert differences(old, new) == ["seed: 0 -> 1", f"ppo.steps: {RunConfig().ppo.steps} -> 7"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not valid YAML"), ("- 1", "expected settings")]
)
def test_bad_yaml(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_the_home_folder_in_files_and_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("pairs: ~/a.jsonl\neval: {x: [~/b, 3, c~/d]}\nnone: ~\n")
    assert read_yaml(tmp_path / "c.yaml") == {
        "pairs": "/home/me/a.jsonl",
        "eval": {"x": ["/home/me/b", 3, "c~/d"]},
        "none": None,
    }
    words = ["~/x", "--pairs=~/x", "--eval-pairs=chat=~/x", "data.source=~/x", "~", "a ~/b"]
    assert at_home(words) == [
        "/home/me/x", "--pairs=/home/me/x", "--eval-pairs=chat=/home/me/x",
        "data.source=/home/me/x", "~", "a ~/b",
    ]  # fmt: skip
