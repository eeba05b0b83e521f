"""Bad recipes and changed ones: one line that names the setting, before anything is written."""

import json
import os
import shutil

import pytest
import yaml

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.pipeline import engine
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import notes, read_recipe, run_recipe
from tests.pipeline.conftest import RECIPES
from tests.pipeline.gold_world import recipe, write_recipe


@pytest.fixture
def refused(world, tmp_path, monkeypatch, capsys):
    """refused(words..., sections...) -> the error's line; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **sections):
        path = write_recipe(tmp_path / "mine.yaml", world, **sections)
        before = sorted(os.listdir())
        assert main(["run", str(path), *words, "--output", "out"]) == 2
        errors = capsys.readouterr().err
        assert sorted(os.listdir()) == before
        assert errors.count("\n") == 1, errors
        assert errors.startswith("shiftrm: error: ")
        return errors

    return run


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("roundz=3", "unknown setting 'roundz'; did you mean 'rounds'?"),
        ("evaluation.judge=3", "unknown setting 'evaluation.judge'; did you mean 'judged'?"),
        ("data.pairs.formatt=x", "unknown setting 'data.pairs.formatt'; did you mean 'format'?"),
        ("data.pairs.format=preferences", "data.pairs: unknown format 'preferences'; did you mean"),
        ("data.pairs.options.lang=en", "data.pairs: preference has no option 'lang'"),
        ("data.pairs.source=no/such.jsonl", "data.pairs: no/such.jsonl: no such file"),
        ("data.pairs.source=./gone.jsonl", "data.pairs: ./gone.jsonl: no such file"),
        ("sft.settings.learnin_rate=1", "stage sft: unknown setting 'learnin_rate'; did you mean"),
        ("reward.settings.max_lenght=9", "stage reward_model: unknown setting 'max_lenght'"),
        ("reward.settings.max_length=long", "max_length is 'long'; expected a whole number"),
        ("policy.settings.kl_coeficient=1", "unknown setting 'kl_coeficient'; did you mean"),
        ("policy.settings.clip_ratio=-1", "clip_ratio is -1.0; it must be above 0"),
        ("methods.fixed.polic=ppo", "unknown setting 'methods.fixed.polic'; did you mean"),
        ("methods.fixed.reward=fixd", "methods.fixed.reward is 'fixd'; did you mean 'fixed'?"),
        ("lora.lora_rank=4", "unknown setting 'lora_rank'"),
        ("preset=papr", "preset is 'papr'; did you mean 'paper'?"),
        ("judge.kind=gpt", "judge.kind is 'gpt'"),
        ("judge.kind=reward-model", "also set judge.model"),
        ("sampler=vlm", "sampler is 'vlm'"),
        ("execution.procesess=2", "unknown setting 'execution.procesess'; did you mean"),
        ("execution.report_to=wandb", "execution.report_to is 'wandb', which is not installed"),
        ("sft.settings.bf16=true", "sft.settings.bf16: set execution.bf16; leave it out here"),
        ("policy.settings.micro_batch_size=2", "set execution.micro_batch_size"),
        ("model=./gone", "model: ./gone: no such folder"),
        ("evaluation.gold=./gone", "evaluation.gold: ./gone: no such folder"),
        ("evaluation.best_of_n=8", "evaluation.best_of_n needs evaluation.gold"),
        ("chat_template=humn", "chat_template is 'humn': no such file"),
        (
            "execution={launch: --num_processes 2}",
            "execution.launch is '--num_processes 2'; give the number as execution.processes",
        ),
        ("data.heldout_share=2", "data.heldout_share is 2.0"),
    ],
)
def test_a_bad_setting_is_one_line(refused, word, said):
    assert said in refused(word)


def test_a_batch_must_divide_by_the_processes(refused):
    said = refused("execution={processes: 3, in_process: false}")
    assert "sft.batch_size is 4; it must be a multiple of the 3 processes" in said


def test_rloo_has_its_own_settings(refused):
    said = refused("policy.method=rloo")
    assert "unknown setting 'minibatch_size'; rloo has none; it is a setting of ppo" in said


def test_the_judges_key_is_asked_for_before_anything_runs(refused, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert "set the environment variable OPENAI_API_KEY" in refused(
        "judge.kind=endpoint", "judge.model=fake"
    )


def test_sections_of_a_base_are_merged_and_overridden(tmp_path, world):
    write_recipe(tmp_path / "base.yaml", world, reward={"batch_size": 8, "settings": {"a": 1}})
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nreward: {settings: {b: 2}}\n")
    found = read_recipe(tmp_path / "mine.yaml", ["reward.settings.c=3"])
    assert found.reward.batch_size == 8
    assert found.reward.settings == {"a": 1, "b": 2, "c": 3}


@pytest.fixture
def claimed(world, tmp_path, monkeypatch):
    """A run of which nothing but its claim is left, and how to give its command again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shiftrm.pipeline.run.run_stages", _stop)
    path = write_recipe(tmp_path / "mine.yaml", world)

    def again(*words):
        run_recipe(read_recipe(path, words), tmp_path / "out")

    with pytest.raises(_Stopped):
        again()
    return again


class _Stopped(Exception):
    pass


def _stop(*_, **__):
    raise _Stopped


@pytest.mark.parametrize(
    "word",
    [
        "execution.micro_batch_size=1",
        "execution.bf16=true",
        "execution={processes: 2, in_process: false}",
        "execution.sampling_batch_size=2",
        "judge.max_requests=100",
        "judge.concurrency=1",
    ],
)
def test_how_it_is_run_may_change(claimed, word):
    with pytest.raises(_Stopped):
        claimed(word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rounds=2", r"made with another configuration \(rounds: 1 -> 2\)"),
        ("reward.settings.max_steps=3", r"reward.settings.max_steps: 2 -> 3"),
        ("judge.template=harmless", "judge.template: helpful -> harmless"),
        ("seed=1", "seed: 0 -> 1"),
    ],
)
def test_anything_else_may_not(claimed, word, said):
    with pytest.raises(engine.UserError, match=said):
        claimed(word)


@pytest.fixture
def own(world, tmp_path, monkeypatch):
    """The gold world copied, so that a test may change it, and how to run it from there."""
    shutil.copytree(world, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shiftrm.pipeline.run.run_stages", _stop)

    def run(output="out", **sections):
        path = write_recipe(tmp_path / "mine.yaml", tmp_path / "own", **sections)
        with pytest.raises(_Stopped):
            run_recipe(read_recipe(path), tmp_path / output)

    return run


def _longer(path):
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: _longer(own / "pairs.jsonl"), "data.pairs"),
        (lambda own: _longer(own / "base_model" / "tokenizer.json"), "model"),
        (lambda own: (own / "base_model" / "chat_template.jinja").write_text("{{ x }}"), "model"),
    ],
)
def test_what_it_reads_may_not_change(own, tmp_path, change, said):
    """Finished stages were made from the old contents, so going on would mix two data sets."""
    own()
    own()
    change(tmp_path / "own")
    path = tmp_path / "mine.yaml"
    with pytest.raises(engine.UserError, match=rf"made from has changed since \({said}\)"):
        run_recipe(read_recipe(path), tmp_path / "out")
    (tmp_path / "out" / "inputs.json").unlink()  # as earlier versions left it
    own()
    assert said in json.loads((tmp_path / "out" / "inputs.json").read_text())
    (tmp_path / "out" / "inputs.json").write_text("[1]")
    with pytest.raises(engine.UserError, match=r"inputs\.json: broken"):
        run_recipe(read_recipe(path), tmp_path / "out")


def test_what_it_does_not_read_may_change(own, tmp_path):
    own(sft=None)
    _longer(tmp_path / "own" / "sft.jsonl")
    (tmp_path / "own" / "base_model" / "README.md").write_text("new")
    own(sft=None)
    assert "data.demonstrations" not in json.loads((tmp_path / "out" / "inputs.json").read_text())


def test_of_a_data_folder_every_file_counts_but_hidden_ones_and_the_runs_own(own, tmp_path):
    data = tmp_path / "pairs"
    data.mkdir()
    shutil.copy(tmp_path / "own" / "pairs.jsonl", data / "train.jsonl")
    (data / "config.json").write_text("{}")  # as beside many data sets: it is no checkpoint
    sections = recipe(tmp_path / "own")["data"]
    sections["pairs"]["source"] = str(data)
    own(data=sections)
    (data / ".DS_Store").write_text("x")
    own(data=sections)
    _longer(data / "train.jsonl")
    with pytest.raises(engine.UserError, match=r"changed since \(data\.pairs\)"):
        run_recipe(read_recipe(tmp_path / "mine.yaml"), tmp_path / "out")
    own(data=sections, output="pairs/out")
    assert "data.pairs" not in json.loads((data / "out" / "inputs.json").read_text())
    own(data=sections, output="pairs/out")


def test_another_folder_is_not_taken(world, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(world)))
    assert main(["run", str(tmp_path / "mine.yaml"), "--output", str(tmp_path)]) == 2
    assert "not empty and not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_file_is_no_output(world, tmp_path, capsys, words):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(world)))
    (tmp_path / "out").write_text("precious")
    command = ["run", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out"), *words]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "out: is not a folder; choose another --output" in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "out"]


@pytest.mark.parametrize("name", ["shp", "amazon"])
def test_other_commands_recipes_are_not_taken(name, capsys):
    assert main(["run", str(RECIPES / f"{name}.yaml"), "model=x/y"]) == 2
    assert "not a recipe for `shiftrm run`" in capsys.readouterr().err


def test_a_share_of_sets_that_are_named_is_refused(refused, world):
    sets = {name: recipe(world)["data"]["pairs"] for name in ("heldout", "eval_prompts")}
    said = refused(data={**recipe(world)["data"], **sets})
    assert "data.heldout_share is for sets that are not named, but data.heldout and " in said


@pytest.mark.parametrize(
    ("named", "left"), [("heldout", "prompts"), ("eval_prompts", "pairs"), (None, None)]
)
def test_a_share_of_one_set_alone_is_said(world, tmp_path, named, left):
    data = recipe(world)["data"]
    if named is not None:
        data[named] = data["pairs"]
    said = notes(read_recipe(write_recipe(tmp_path / "mine.yaml", world, data=data)))
    if named is None:
        assert said == []
    else:
        line = (
            f"note: data.heldout_share=0.3 is a share of data.{left} alone: data.{named} is named"
        )
        assert said == [line]
    del data["heldout_share"]
    assert notes(read_recipe(write_recipe(tmp_path / "mine.yaml", world, data=data))) == []


def test_a_retrained_arm_without_settings_is_said(world, tmp_path):
    methods = {
        "fixed": {"reward": "fixed"},
        "again": {"reward": "retrained"},
        "slower": {"reward": "retrained", "settings": {"learning_rate": 1e-6}},
    }
    [line] = notes(read_recipe(write_recipe(tmp_path / "mine.yaml", world, methods=methods)))
    assert line.startswith("note: methods.again trains on the same pairs, from the same head")


def test_groups_of_every_prompt(world, tmp_path, capsys):
    """The paper samples responses to all training prompts; `all` says so."""
    found = read_recipe(write_recipe(tmp_path / "mine.yaml", world), ["groups.prompts=all"])
    root = tmp_path / "run"
    [stage] = [stage for stage in plan(found) if stage.name == "data"]
    engine.execute(stage, root, "key", found.seed)
    prompts, drawn = (
        {row["prompt"] for row in read_jsonl(root / "data" / f"{name}.jsonl")}
        for name in ("prompts", "group_prompts-1")
    )
    assert drawn == prompts
    assert len(prompts) > 4, "more than the recipe's own number"
    assert main(["run", str(tmp_path / "mine.yaml"), "groups.prompts=most", "--dry-run"]) == 2
    assert "groups.prompts is 'most'; expected a whole number or all" in capsys.readouterr().err
