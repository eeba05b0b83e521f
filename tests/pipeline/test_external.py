"""`policy: {method: command}`: another program trains the policy of a round."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from shiftrm.cli import main
from shiftrm.config import from_mapping
from shiftrm.errors import UserError
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline import external as module
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.jobs import from_plain, plain
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import run_recipe
from shiftrm.records import read_records
from tests.pipeline.gold_world import recipe, write_recipe

TRAINER = Path(__file__).parent / "stand_ins" / "plain_trainer.py"
WORDS = [
    "{python}", str(TRAINER), "--policy", "{policy}", "--reference", "{reference}",
    "--prompts", "{prompts}", "--output", "{output}", "--checkpoints", "{checkpoints}",
    "--seed", "{seed}",
]  # fmt: skip
SERVED = [*WORDS, "--reward-url", "{reward_url}"]
HERE = "methods/fixed/round-1/policy"


def external(world, words=SERVED, **sections):
    """A recipe without fine-tuning, whose rounds are this command's."""
    section = {"policy": {"method": "command", "command": words}, "sft": None}
    mapping = recipe(world, **{**section, **sections})
    mapping["evaluation"]["sight_pairs"] = 0
    return mapping


def experiment(world, words=SERVED, **sections):
    return from_mapping(Experiment, external(world, words, **sections))


def refused(world, words=SERVED, **sections):
    with pytest.raises(UserError) as error:
        experiment(world, words, **sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_stage_has_the_inputs_that_the_command_uses(world):
    stages = {stage.name: stage for stage in plan(experiment(world))}
    job = from_plain(stages[HERE].settings["job"])
    assert plain(job) == json.loads(json.dumps(stages[HERE].settings["job"]))
    assert job.words == tuple(SERVED)
    assert (str(job.reward), str(job.prompts)) == ("reward_model/model", "data/prompts.jsonl")
    assert job.pairs is None
    assert set(stages[HERE].needs) == {"reward_model", "data"}
    alone = next(s for s in plan(experiment(world, WORDS)) if s.name == HERE)
    assert "reward_model" not in alone.needs


def test_a_text_and_a_list_are_one_stage_and_the_machine_changes_no_key(world):
    def keys(words, **execution):
        given = {**recipe(world)["execution"], **execution}
        return stage_keys(plan(experiment(world, words, execution=given)), 0)

    assert keys(SERVED) == keys(" ".join(SERVED), reward_host="localhost", reward_devices="1")
    assert keys(SERVED) != keys([*SERVED, "--do", "x"])


def test_what_does_not_fit_is_refused_before_anything(world, monkeypatch):
    assert "policy.command has the unknown place {rewards}" in refused(world, [*WORDS, "{rewards}"])
    assert "policy.command is missing" in refused(world, None)
    arms = {"fixed": {"reward": "fixed", "policy": "ppo"}}
    assert "policy.command: no arm uses it" in refused(world, methods=arms)
    arms = {"fixed": {"reward": "fixed", "policy_settings": {"steps": 1}}}
    assert "methods.fixed.policy_settings" in refused(world, methods=arms)
    section = {"method": "command", "command": SERVED, "settings": {"steps": 1}}
    assert "policy.settings: a command takes none" in refused(world, policy=section)
    arms = {"mean": {"reward": "ensemble_mean"}}
    said = refused(world, [*WORDS, "--reward", "{reward}"], methods=arms)
    assert "no single checkpoint" in said
    assert "{reward_url}" in said
    experiment(world, methods=arms)  # its server combines them
    section = {"method": "ppo", "command": SERVED}
    arms = {"fixed": {"reward": "fixed", "policy": "command"}}
    experiment(world, policy=section, methods=arms)


def test_the_gold_reward_is_no_folder():
    section = {"world": {}, "methods": {"gold": {"reward": "gold"}}, "evaluation": {"prompts": 4}}
    with pytest.raises(UserError, match="no folder holds the gold world's reward"):
        from_mapping(Experiment, {**section, "policy": {"method": "command", "command": SERVED}})


def test_the_program_and_the_server_are_checked_before_the_run(world, tmp_path, monkeypatch):
    def said(words=SERVED, **execution):
        given = {**recipe(world)["execution"], **execution}
        with pytest.raises(UserError) as error:
            run_recipe(experiment(world, words, execution=given), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert f"stage {HERE}: policy.command: no-such-trainer: no such program" in said(
        ["no-such-trainer", *SERVED[1:]]
    )
    monkeypatch.delenv("SHIFTRM_TOKEN", raising=False)
    assert "execution.reward_host 0.0.0.0 can be reached from other machines" in said(
        reward_host="0.0.0.0"
    )


def test_a_dry_run_shows_the_command(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path / "mine.yaml", world, **external(world, "A=1 t {policy} {output}"))
    (tmp_path / "t").write_text("#!/bin/sh\n")
    (tmp_path / "t").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["run", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"\n{HERE}:\n  A=1 t " in out
    assert f"{HERE}/model" in out
    assert "note: policy.command has neither {reward} nor {reward_url}" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "t"]


def run(world, output, words=SERVED, status=0, **sections):
    path = write_recipe(output.with_suffix(".yaml"), world, **external(world, words, **sections))
    return main(["run", str(path), "--output", str(output)]) == status


def test_a_run_to_its_page(world, tmp_path, here, capsys, monkeypatch):
    """The command gets what it is told it gets; rewards are those of the round's reward model."""
    monkeypatch.delenv("SHIFTRM_TOKEN", raising=False)
    output = tmp_path / "run"
    assert run(world, output)
    assert "Page:" in capsys.readouterr().out
    stage = output / HERE
    seen = json.loads((stage / "model" / "seen.json").read_text())
    assert seen["policy"] == str(world / "base_model")
    assert seen["reference"] == seen["policy"]
    assert seen["prompts"] == str(output / "data" / "prompts.jsonl")
    assert seen["again"] is False
    lines = (output / "data" / "prompts.jsonl").read_text().splitlines()[:3]
    prompts = [json.loads(line)["prompt"] for line in lines]
    scorer = Scorer.from_pretrained(output / "reward_model" / "model")
    expected = [scorer([p, p], [" the red cat", " a dog"]) for p in prompts]
    for found, wanted in zip(seen["rewards"], expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert sorted(path.name for path in stage.iterdir()) == [
        "command.log", "log.txt", "model", "records.jsonl", "reward_server.log", "stage.json",
    ]  # fmt: skip
    log = (stage / "command.log").read_text()
    assert log.startswith("$ ")
    assert "\ntraining\n" in log
    assert str(stage / "command.log") in (stage / "log.txt").read_text()
    kl = [r for r in read_records(output / "records.jsonl") if r.metric == "kl" and r.round == 1]
    assert kl
    with pytest.raises(OSError, match="refused"):  # the server has ended
        urllib.request.urlopen(f"{seen['reward_url']}/health", timeout=5)


def test_a_failed_command_is_one_line_and_the_same_call_continues(world, tmp_path, here, capsys):
    output, words = tmp_path / "run", [*WORDS, "--do", "fail-once"]
    assert run(world, output, words, status=2)
    (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("shiftrm: error")]
    log = next((output / ".unfinished").glob("*/command.log"))
    assert f"stage {HERE}: policy.command ended with status 3: " in said
    assert "CUDA out of memory" in said
    assert "\x1b" not in said
    assert f"its log is {log}" in said
    assert not (output / HERE).exists()
    assert run(world, output, words)
    seen = json.loads((output / HERE / "model" / "seen.json").read_text())
    assert seen["again"] is True  # its checkpoints were kept, and its half output was not
    assert (output / HERE / "command.log").read_text().count("\ntraining\n") == 2
    began = (output / HERE / "stage.json").stat().st_mtime_ns
    assert run(world, output, words)
    assert (output / HERE / "stage.json").stat().st_mtime_ns == began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "said"), [("nothing", "nothing was trained"), ("no-tokenizer", "has no tokenizer")]
)
def test_a_result_that_is_no_trained_policy_is_refused(world, tmp_path, here, capsys, do, said):
    output = tmp_path / "run"
    assert run(world, output, [*WORDS, "--do", do], status=2)
    assert said in capsys.readouterr().err
    assert not (output / HERE).exists()


def test_a_reward_model_that_cannot_be_served_is_one_line(
    world, tmp_path, here, capsys, monkeypatch
):

    real = module.reward_server
    monkeypatch.setattr(
        module, "reward_server", lambda _, **options: real(str(world / "base_model"), **options)
    )
    output = tmp_path / "run"
    assert run(world, output, status=2)
    (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("shiftrm: error")]
    assert "the reward server ended with status 2 before it was ready: " in said
    assert not list((output / ".unfinished").glob("*/command.log"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_of_the_run_ends_the_command_and_the_server(world, tmp_path, how):
    path = write_recipe(tmp_path / "mine.yaml", world, **external(world, [*SERVED, "--do", "wait"]))
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "shiftrm", "run", str(path), "--output", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip

    def mine():
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(output).encode() in words and int(entry.name) != process.pid:
                found.append(words)
        return found

    end = time.monotonic() + 300
    while not any("training" in p.read_text() for p in output.glob(".unfinished/*/command.log")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.2)
    assert len(mine()) == 2
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    with process:
        process.stderr.read()
    end = time.monotonic() + 60
    while mine():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert not (output / HERE).exists()
