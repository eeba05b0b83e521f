"""Stages: skipped when finished, refused when changed, published whole or not at all."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from shiftrm.errors import UserError
from shiftrm.pipeline.engine import Stage, execute, run_stages, stage_keys
from shiftrm.records import read_records

HERE = "tests.demo.test_engine"


def add(context):
    """Sum of the needed stages' numbers and its own; one record."""
    total = context.stage.settings["number"]
    for name in context.stage.needs:
        total += int((context.folder(name) / "number.txt").read_text())
    (context.out / "number.txt").write_text(str(total))
    context.recorder.add("labels", float(total))
    context.recorder.add("pairs", float(context.random_seed("role")))


def fail(context):
    (context.out / "half.txt").write_text("half")
    print("about to fail")
    raise RuntimeError("it broke")


def refuse(context):
    raise UserError("x.jsonl:3: not valid; mend it")


def fill_the_disk(context):
    raise OSError(28, "No space left on device")


def lose_a_file(context):
    raise FileNotFoundError("weights")


def die(context):
    os.kill(os.getpid(), signal.SIGKILL)


def warn(context):
    logger = logging.getLogger("library")
    if not logger.handlers:  # as transformers does, once
        logger.addHandler(logging.StreamHandler())
    logger.warning("warning %s", context.stage.settings["text"])


def fail_once(context):
    if not Path(context.stage.settings["flag"]).exists():
        raise ValueError("not yet")


def peek(context):
    context.folder("a")


def stages(b_number=2):
    record = {"stage": "sum", "method": "m", "round": 0}
    return [
        Stage("a", f"{HERE}:add", {"number": 1}, record_as=record),
        Stage("deep/b", f"{HERE}:add", {"number": b_number}, ("a",), record),
        Stage("c", f"{HERE}:add", {"number": 10}, ("a", "deep/b"), record),
    ]


def run(root, plan, **options):
    events = []
    run_stages(plan, root, on_progress=lambda e, n: events.append((e, n)), **{"seed": 0, **options})
    return events


def test_runs_in_order_and_skips_what_is_done(tmp_path):
    root = tmp_path / "run"
    events = run(root, stages(), workers=2)
    assert [n for e, n in events if e == "done"] == ["a", "deep/b", "c"]
    assert (root / "c" / "number.txt").read_text() == "14"
    values = [r.value for r in read_records(root / "records.jsonl") if r.metric == "labels"]
    assert values == [1, 3, 14]
    before = (root / "records.jsonl").read_bytes()
    assert run(root, stages()) == [("skipped", "a"), ("skipped", "deep/b"), ("skipped", "c")]
    assert (root / "records.jsonl").read_bytes() == before
    assert not (root / ".work").exists()


@pytest.mark.parametrize("name", ["a", "a/b", "deep"])
def test_stages_that_would_write_into_one_folder_are_a_mistake_in_the_plan(name):
    with pytest.raises(ValueError, match="into one folder"):
        stage_keys([*stages(), Stage(name, f"{HERE}:add", {"number": 1})], 0)


def test_a_missing_stage_is_made_again(tmp_path):
    import shutil

    run(tmp_path / "run", stages())
    shutil.rmtree(tmp_path / "run" / "c")
    events = run(tmp_path / "run", stages())
    assert [n for e, n in events if e == "done"] == ["c"]


def test_a_changed_configuration_is_refused_before_anything_runs(tmp_path):
    run(tmp_path / "run", stages())
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"stage deep/b was made with .*number: 2 -> 5"):
        run(tmp_path / "run", stages(b_number=5))
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        run(tmp_path / "run", stages(), seed=1)
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


def test_keys_depend_on_everything_upstream():
    old, new = stage_keys(stages(), 0), stage_keys(stages(b_number=5), 0)
    assert old["a"] == new["a"]
    assert old["deep/b"] != new["deep/b"]
    assert old["c"] != new["c"], "c did not change itself, but what it reads did"
    assert stage_keys(stages(), 1)["a"] != old["a"]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="not a stage of a run"):
        run(tmp_path, stages())


def test_a_failing_stage_leaves_nothing_but_its_log(tmp_path):
    plan = [Stage("a", f"{HERE}:fail", {})]
    with pytest.raises(RuntimeError, match=r"stage a failed: RuntimeError: it broke; see .*log"):
        run(tmp_path / "run", plan)
    assert not (tmp_path / "run" / "a").exists()
    assert "about to fail" in (tmp_path / "run" / "failed-a.log").read_text()


@pytest.mark.parametrize(
    ("function", "message"),
    [("refuse", r"stage a: x\.jsonl:3: not valid"), ("fill_the_disk", "stage a: the disk is full")],
)
def test_errors_for_people_pass_through(tmp_path, function, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", [Stage("a", f"{HERE}:{function}", {})])
    assert not (tmp_path / "run" / "a").exists()


def test_a_missing_file_in_a_stage_is_kept_in_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="stage a failed: FileNotFoundError: weights"):
        run(tmp_path / "run", [Stage("a", f"{HERE}:lose_a_file", {})])
    assert "FileNotFoundError" in (tmp_path / "run" / "failed-a.log").read_text()


def test_a_killed_worker_is_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="stage a: the process was killed, perhaps for lack"):
        run(tmp_path / "run", [Stage("a", f"{HERE}:die", {})])


def test_every_stage_gets_its_own_log(tmp_path):
    """Libraries keep the stderr they found first; a second stage in a worker must log as well."""
    plan = [Stage(name, f"{HERE}:warn", {"text": name}) for name in ("a", "b")]
    run(tmp_path / "run", plan)
    for name in ("a", "b"):
        assert f"warning {name}" in (tmp_path / "run" / name / "log.txt").read_text()


def test_a_failure_log_goes_with_the_failure(tmp_path):
    flag = tmp_path / "flag"
    plan = [Stage("a", f"{HERE}:fail_once", {"flag": str(flag)})]
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", plan)
    flag.touch()
    run(tmp_path / "run", plan)
    assert not (tmp_path / "run" / "failed-a.log").exists()


def test_reading_an_undeclared_stage_is_a_mistake(tmp_path):
    plan = [Stage("a", f"{HERE}:add", {"number": 1}), Stage("b", f"{HERE}:peek", {})]
    with pytest.raises(RuntimeError, match="does not name it in needs"):
        run(tmp_path / "run", plan)


def keeps(context):
    os.write(1, f"written: {context.keep / 'model'}\n".encode())  # as a process of its own would


def test_a_finished_stage_s_log_names_the_stage_s_own_folder(tmp_path):
    stage = Stage("methods/a", f"{HERE}:keeps", {})
    execute(stage, tmp_path, stage_keys([stage], 0)["methods/a"], 0)
    log = tmp_path / "methods" / "a" / "log.txt"
    assert log.read_text() == f"written: {log.parent / 'model'}\n"


def test_two_runs_cannot_share_a_folder(tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is writing it"):
            run(tmp_path, stages())


def test_the_first_to_publish_wins(tmp_path):
    """An orphan of a killed run may finish a stage that the rerun finished already."""
    [stage, *_] = stages()
    key = stage_keys([stage], 0)["a"]
    execute(stage, tmp_path, key, 0)
    execute(stage, tmp_path, key, 0)
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["key"] == key
    assert not list((tmp_path / ".work").iterdir())
