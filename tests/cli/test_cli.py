"""The command line as a person meets it: light, helpful, exit status 2 and one line on mistakes."""

import errno
import os
import subprocess
import sys
import time

import pytest

from shiftrm.cli import COMMANDS, main


def shiftrm(*arguments):
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-m", "shiftrm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_importing_the_command_line_is_light():
    code = (
        "import sys, shiftrm.cli; shiftrm.cli.build_parser(); "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def every_command():
    """Every command as its words: "", "train", "evaluate", "evaluate sheet", ..."""
    groups = {name: getattr(module, "COMMANDS", {}) for name, module in COMMANDS.items()}
    return ["", *groups, *(f"{name} {below}" for name in groups for below in groups[name])]


@pytest.mark.parametrize("command", every_command())
def test_help_is_quick_and_has_examples(command, capsys):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert time.monotonic() - start < 1
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert max(map(len, said.splitlines())) <= 120


def test_help_says_what_files_hold(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "FILE.yaml holds" in text
    assert "Data is a .jsonl" in text
    assert "trl.RewardConfig" in text


def test_an_unknown_command_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    expected = "unknown command 'trian'; did you mean 'train'?; see `shiftrm --help`"
    assert capsys.readouterr().err == f"shiftrm: error: {expected}\n"


def test_version():
    assert shiftrm("--version").stdout.startswith("shiftrm 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "policy.settings.stepz=3"], "unknown setting 'stepz'; did you mean 'steps'?"),
        (["demo", "methods=[metrm]"], "methods.metrm.reward is 'metrm'; did you mean 'metarm'?"),
        (["demo", "--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["demo", "--workers", "0"], "--workers is 0"),
        (["report", "nowhere"], "nowhere: no records.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_no_traceback_from_the_real_command(tmp_path):
    done = shiftrm("demo", "--output", tmp_path / "x", "sed=3")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.endswith(" so far")]
    assert said == ["shiftrm: error: unknown setting 'sed'; did you mean 'seed'?"]


def test_output_folder_of_another_configuration(tmp_path, capsys):
    from shiftrm.config import to_mapping
    from shiftrm.pipeline.folder import claim
    from shiftrm.pipeline.run import read_recipe

    claim(tmp_path / "run", to_mapping(read_recipe("gold_demo", ["rounds=3"])), "")
    assert main(["demo", "--output", str(tmp_path / "run"), "rounds=4"]) == 2
    assert "made with another configuration (rounds: 3 -> 4)" in capsys.readouterr().err


def test_output_folder_that_is_not_a_run(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "not empty and not a run's folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_at_its_very_start_can_go_on(tmp_path):
    from shiftrm.config import to_mapping
    from shiftrm.pipeline.folder import claim
    from shiftrm.pipeline.run import read_recipe

    (tmp_path / ".config.yaml.0123.tmp").write_text("seed")
    claim(tmp_path, to_mapping(read_recipe("gold_demo")), "")
    assert (tmp_path / "config.yaml").exists()


def test_a_broken_records_file_is_named(tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text('{"stage": "ppo"\n')
    assert main(["report", str(tmp_path)]) == 2
    assert "records.jsonl:1: not valid JSON" in capsys.readouterr().err


def test_a_run_without_measurements(tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "records.jsonl: holds no measurements; repeat the run" in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def test_demo_below_a_file(tmp_path, capsys):
    (tmp_path / "afile").write_text("precious")
    for output in ("afile", "afile/sub", "afile/sub/run"):
        assert main(["demo", "--output", str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'afile'}" in error
        assert "is not a folder; choose another --output" in error
        assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["afile"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free space"),
        (errno.EACCES, "Permission denied; choose another output, or make this one writable"),
        (errno.ENOTDIR, "Not a directory; choose another output"),
        (errno.EISDIR, "Is a directory; choose another output"),
        (errno.EEXIST, "File exists; choose another output"),
        (errno.ENOENT, "No such file or directory; it was removed"),
    ],
)
def test_outputs_that_cannot_be_written(monkeypatch, capsys, number, words):
    def fails(_options):
        raise OSError(number, os.strerror(number), "runs/page.html")

    monkeypatch.setattr("shiftrm.cli.report.run", fails)
    assert main(["report", "x", "--output", "runs/page.html"]) == 2
    error = capsys.readouterr().err
    assert f"runs/page.html: {words}" in error
    assert error.count("\n") == 1


def test_other_missing_files_are_our_mistake(monkeypatch):
    """A traceback, since the person who gave the command could do nothing about it."""

    def fails(_options):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/lib/template.j2")

    monkeypatch.setattr("shiftrm.cli.report.run", fails)
    with pytest.raises(FileNotFoundError):
        main(["report", "x", "--output", "runs/page.html"])


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("demo", "to continue"),
        ("report x", "to start anew; nothing was written"),
        ("diagnose --model m --data f", "to start anew; nothing was written"),
        ("sample --policy p --prompts f --output o", "to continue"),
        (
            "train --model m --pairs f --output o",
            "to continue from the last checkpoint, if there is one",
        ),
        ("score --model m --data f --output o", "to start anew; nothing was written"),
    ],
)
def test_what_the_same_command_does_after_an_interruption(monkeypatch, capsys, command, again):
    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"shiftrm.cli.{command.split()[0]}.run", interrupted)
    assert main(command.split()) == 130
    expected = f"shiftrm: interrupted; give the same command again {again}\n"
    assert capsys.readouterr().err == expected


def test_a_file_that_may_not_be_read(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.touch()

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("shiftrm.data.sources.iterate_rows", denied)
    monkeypatch.setattr(os, "access", lambda *_: False)
    words = ["score", "--model", "x", "--data", str(path), "--output", str(tmp_path / "y.jsonl")]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f"{path}: Permission denied; make it readable\n")
