"""The recipes for other trainers, run to the last line with programs that stand in for these."""

import os
import sys
from pathlib import Path

import pytest

from shiftrm.cli import main
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, read_recipe
from shiftrm.records import read_records
from tests.pipeline.conftest import RECIPES, SMALL, sources

EXTERNAL = ("openrlhf", "trl_grpo")
STAND_INS = Path(__file__).parent / "stand_ins"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The programs in place of the trainers; they have the trainers' names."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # `python3`
    monkeypatch.setenv("PATH", str(STAND_INS / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS), prepend=os.pathsep)
    monkeypatch.delenv("SHIFTRM_TOKEN", raising=False)


def small(name, public):
    own = ("policy.", "dpo.", "reward.meta", "rounds")
    words = [word for word in SMALL if not word.startswith(own)]
    words += ["rounds=1", "sampler=transformers", "reward.settings.max_length=256"]
    return [f"model={public / 'base'}", *sources(name, public), *words, "evaluation.sight_pairs=0"]


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_recipe_is_understood_as_it_stands(name):
    words = ["model=owner/base", "execution.bf16=false"]
    recipe = read_recipe(RECIPES / f"{name}.yaml", words)
    stages = plan(recipe)
    check_settings(stages)
    policies = [stage for stage in stages if stage.name.endswith("/policy")]
    assert len(policies) == recipe.rounds * len(recipe.methods)
    assert all(stage.execution["way"]["reward_devices"] == "4" for stage in policies)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTERNAL)
def test_a_recipe_runs_to_its_page(name, public, tmp_path, capsys, here):
    output = tmp_path / "run"
    words = [*small(name, public), "execution.reward_devices=''"]
    assert main(["run", str(RECIPES / f"{name}.yaml"), *words, "--output", str(output)]) == 0
    assert f"Page: {output / 'report.html'}" in capsys.readouterr().out
    records = read_records(output / "records.jsonl")
    for method in ("fixed", "contrast"):
        found = {r.metric for r in records if (r.method, r.round) == (method, 1)}
        assert {"kl", "accuracy_heldout"} <= found
        log = (output / f"methods/{method}/round-1/policy/command.log").read_text()
        assert "\nrewards [" in log


@pytest.mark.slow
def test_the_stand_ins_refuse_what_the_programs_do_not_know(public, tmp_path, capsys, here):
    recipe = read_recipe(RECIPES / "openrlhf.yaml", ["model=x/y"])
    wrong = recipe.policy.command.replace("--actor.adam.lr", "--actor_learning_rate")
    words = [*small("openrlhf", public), "methods=[fixed]", f"policy.command={wrong!r}"]
    output = tmp_path / "run"
    status = main(["run", str(RECIPES / "openrlhf.yaml"), *words, "--output", str(output)])
    assert status == 2
    assert "unrecognized arguments: --actor_learning_rate" in capsys.readouterr().err


ON_A_CPU = {
    "trl grpo": f"{Path(sys.executable).with_name('trl')} grpo",
    "--accelerate_config multi_gpu": "--cpu",
    "--use_vllm true": "--use_vllm false --use_cpu true",
    "--bf16 true": "--bf16 false",
    "--max_steps 100": "--max_steps 2",
    "--gradient_accumulation_steps 16": "--gradient_accumulation_steps 1",
    "--learning_rate 1e-6": "--learning_rate 1e-3",
}


@pytest.mark.slow
def test_trl_itself_runs_the_recipes_command_without_vllm(public, tmp_path, capsys, here):
    """TRL's own GRPO under accelerate, with the rewards of our server."""
    command = read_recipe(RECIPES / "trl_grpo.yaml", ["model=x/y"]).policy.command
    for before, now in ON_A_CPU.items():
        assert before in command
        command = command.replace(before, now)
    words = [*small("trl_grpo", public), "methods=[fixed]", f"policy.command={command!r}"]
    output = tmp_path / "run"
    assert main(["run", str(RECIPES / "trl_grpo.yaml"), *words, "--output", str(output)]) == 0
    log = (output / "methods/fixed/round-1/policy/command.log").read_text()
    assert "rewards/reward_server/mean" in log
    assert "Training completed" in log
