"""Configuration: typed, suggested, and read back as written."""

import pytest

from shiftrm.config import (
    at_home,
    differences,
    from_mapping,
    read_yaml,
    to_mapping,
)
from shiftrm.errors import UserError
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.run import read_recipe


def build(*overrides):
    return read_recipe("gold_demo", list(overrides))


def test_round_trip():
    words = ["seed=3", "policy.settings.steps=7", "methods=[fixed]", "data=null"]
    config = build(*words, "reward.settings.learning_rate=5e-5", "judge.tie_margin=1")
    assert from_mapping(Experiment, to_mapping(config)) == config
    assert (config.seed, config.policy.settings["steps"], list(config.methods)) == (3, 7, ["fixed"])
    assert config.judge.tie_margin == 1.0
    assert config.sampling.max_new_tokens == 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=3", "unknown setting 'round'; did you mean 'rounds'"),
        ("world.pair=3", "unknown setting 'world.pair'; did you mean 'pairs'"),
        ("wrld.pairs=3", "unknown setting 'wrld'; did you mean 'world'"),
        ("world.pairs=many", "world.pairs is 'many'; expected a"),
        ("world.pairs=true", "world.pairs is True; expected a"),
        ("execution.in_process=1", "execution.in_process is 1; expected true or false"),
        ("world=3", "world is 3; expected settings below it"),
        ("methods=fixed", "methods is 'fixed'; expected settings below it"),
        ("methods=[fxed]", "methods.fxed.reward is 'fxed'; did you mean 'fixed'"),
        ("methods=[fixed, fixed]", "name no arm twice"),
        ("methods=[]", "name at least one arm"),
        ("rounds=0", "rounds is 0; it must be at least 1"),
        ("groups.responses=1", "groups.responses is 1; a group needs at least two"),
        ("evaluation.prompts=4000", "raise world.eval_prompts"),
        ("sft.batch_size=0", "sft.batch_size is 0; it must be at least 1"),
        ("world.pairs=0", "pairs is 0"),
        ("world.seed=5", "world.seed follows the run's seed"),
        ("model=x/y", "model: the gold world has its own"),
        ("sft=null", "the gold world's base model needs it"),
        ("world=null", "neither data nor world"),
        ("reward.settings.seed=1", "reward.settings.seed: the run sets it"),
        ("rounds=999999999", "rounds is 999999999; it must be at most 1000"),
        (
            "methods={a: {reward: fixed, rounds: 1001}}",
            "methods.a.rounds is 1001; it must be at most 1000",
        ),
        ("world.layers=999999999", "layers is 999999999; give at most 1000"),
        ("policy.settings={steps: 1, steps: 2}", "'steps' is given twice; keep one"),
        ("rounds", "write key=value"),
        ("rounds=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=message):
        build(override)


def test_differences_name_the_setting():
    old, new = to_mapping(build()), to_mapping(build("policy.settings.steps=7", "seed=1"))
    assert differences(old, new) == ["seed: 0 -> 1", "policy.settings.steps: 40 -> 7"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected settings"),
        ("a: 1\nb: 2\na: 3\n", r"c\.yaml: 'a' is given twice, in lines 1 and 3; keep one"),
        ("a: {b: 1, 'b': 2}", "'b' is given twice, in lines 1 and 1"),
        ("x:\n  - {1: 2}\n  - a: 1\n    a: 1", "'a' is given twice, in lines 3 and 4"),
    ],
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


def test_keys_that_are_not_given_twice(tmp_path):
    """What a merge adds may be given again, and one mapping may stand at several places."""
    (tmp_path / "c.yaml").write_text(
        "base: &b {x: 1, y: 2}\nown: &o\n  <<: *b\n  x: 3\nother: {<<: *o, y: 4}\n'1': a\n1: b\n"
    )
    assert read_yaml(tmp_path / "c.yaml") == {
        "base": {"x": 1, "y": 2},
        "own": {"x": 3, "y": 2},
        "other": {"x": 3, "y": 4},
        "1": "a",
        1: "b",
    }
