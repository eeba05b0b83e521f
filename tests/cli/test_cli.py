"""The command line as a person meets it: light, helpful, exit status 2 and one line on mistakes."""

import os
import subprocess
import sys

import pytest

from shiftrm.cli import main


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


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["report", "--help"]])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_version():
    assert shiftrm("--version").stdout.startswith("shiftrm 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "ppo.stepz=3"], "unknown setting 'ppo.stepz'; did you mean 'steps'?"),
        (["demo", "methods=[metarm]"], "unknown method 'metarm'; did you mean 'metarm_paper'?"),
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
    assert done.stderr == "shiftrm: error: unknown setting 'sed'; did you mean 'seed'?\n"


def test_output_folder_of_another_configuration(tmp_path, capsys):
    from shiftrm.rounds.run import _claim_folder, configure

    _claim_folder(tmp_path / "run", configure(["ppo.steps=3"]))
    assert main(["demo", "--output", str(tmp_path / "run"), "ppo.steps=4"]) == 2
    assert "made with another configuration (ppo.steps: 3 -> 4)" in capsys.readouterr().err


def test_output_folder_that_is_not_a_run(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "not empty and not a run's folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_at_its_very_start_can_go_on(tmp_path):
    from shiftrm.rounds.run import _claim_folder, configure

    (tmp_path / ".config.yaml.0123.tmp").write_text("seed")
    _claim_folder(tmp_path, configure([]))
    assert (tmp_path / "config.yaml").exists()


def test_a_broken_records_file_is_named(tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text('{"stage": "ppo"\n')
    assert main(["report", str(tmp_path)]) == 2
    assert "records.jsonl:1: not valid JSON" in capsys.readouterr().err


def test_full_disk_and_interruption(monkeypatch, capsys):
    def full(_args):
        raise OSError(28, "No space left on device", "runs/demo/config.yaml")

    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("shiftrm.cli.report.run", full)
    assert main(["report", "x"]) == 2
    assert "runs/demo/config.yaml: No space left on device; free space" in capsys.readouterr().err
    monkeypatch.setattr("shiftrm.cli.report.run", interrupted)
    assert main(["report", "x"]) == 130
    assert "give the same command again to continue" in capsys.readouterr().err
