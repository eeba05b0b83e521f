"""The monitor: rewards untouched, alarms from labels alone, resumed as if never stopped."""

import asyncio
import json
import warnings
from functools import partial

import pytest
import torch

from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.measure.judges.comparing import Verdict
from shiftrm.monitor.evidence import evidence_of
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.rewards import name_of
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import SIGNALS

SMALL = MonitorConfig(
    threshold=0.7, budget=60, audit_pairs=20, audit_every=2, baseline=2, window=2, sight_pairs=8
)


PROMPTS = 40


def by_length(prompts, responses, *, finished):
    return [float(len(r)) for r in responses]


def batch(step, size=4):
    """TRL's arguments of one step: 40 prompts, `size` responses to each."""
    prompts = [f"prompt {p}" for p in range(PROMPTS) for _ in range(size)]
    texts = [
        f"answer {p} of some words " + "more " * ((k * 7 + step) % 5)
        for p in range(PROMPTS)
        for k in range(size)
    ]
    return prompts, texts


def run(monitor, steps, first=1, **columns):
    return [monitor(*batch(step), **columns) for step in range(first, first + steps)]


def wrong(pairs):
    return ["lose"] * len(pairs)


def right(pairs):
    return ["win"] * len(pairs)


def test_rewards_are_untouched(tmp_path):
    given = [object(), None, float("nan"), 1.0]
    monitor = DriftMonitor(lambda prompts, completions, **_: given, tmp_path / "m", SMALL)
    with pytest.warns(UserWarning, match="could not watch a step"):
        assert monitor(["p"] * 4, list("abcd")) is given


def test_the_alarm_comes_from_labels(tmp_path):
    alarms = []
    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=wrong, actions=[alarms.append])
    run(monitor, 6)
    (alarm,) = alarms  # once
    assert monitor.alarmed
    assert alarm.evidence.value >= 20 == alarm.evidence.needed
    assert "orders fewer than 70% of today's pairs" in alarm.sentence
    assert f"shiftrm adapt --groups {alarm.groups}" in alarm.sentence
    saved = json.loads((tmp_path / "alarm.json").read_text())
    assert saved["step"] == alarm.step
    groups = read_groups(alarm.groups)  # what `shiftrm adapt` reads
    assert {tuple(row) for row in groups} == {("prompt", "responses", "finished")}
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert [row["test"]["alarm"] for row in steps] == [0.0] * (alarm.step - 1) + [1.0] * (
        7 - alarm.step
    )


def test_no_alarm_while_labels_agree(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=right)
    run(monitor, 10)
    assert not monitor.alarmed
    assert monitor.evidence.value < 1
    assert monitor.evidence.accuracy > 0.9
    assert len(list((tmp_path / "audits").iterdir())) == 3  # and no more than the budget
    assert monitor.labels <= 60


def test_free_signals_never_raise_the_alarm(tmp_path):
    """Equal rewards: no spread, ties only, no sight; but no labels."""
    config = MonitorConfig(budget=0, baseline=2, window=2, flag=0.5)
    values = iter(range(1000))

    def collapses(prompts, responses, *, finished):
        level = next(values)
        return [float(len(r)) if level < 5 else 0.0 for r in responses]

    monitor = DriftMonitor(collapses, tmp_path, config)
    run(monitor, 10)
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert "spread" in steps[-1]["flags"]
    assert not monitor.alarmed
    assert monitor.evidence.value == 1.0


def test_flags_bring_audits_forward(tmp_path):
    slow = MonitorConfig(
        budget=60, audit_every=50, audit_flagged=1, baseline=2, window=2, signals=("level",), flag=3
    )
    calls = iter(range(1000))

    def rises(prompts, responses, *, finished):
        step = next(calls)
        return [len(r) + (100.0 * step if step >= 3 else 0.1 * step) for r in responses]

    run(DriftMonitor(rises, tmp_path, slow), 6)
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [event["step"] for event in events] == [5, 6]  # both steps of the window high
    assert events[0]["flags"] == ["level"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"audit_from": 4, "audit_every": 1}, [4, 5, 6]),
        ({"audit_from": 4, "audit_every": 3}, [4, 7]),
        ({"audit_from": 2, "audit_every": 3}, [3, 6]),
    ],
)
def test_audits_begin_later(settings, steps, tmp_path):
    config = MonitorConfig(budget=60, signals=(), **settings)
    run(DriftMonitor(by_length, tmp_path, config), 8)
    assert [event["step"] for event in read_jsonl(tmp_path / "events.jsonl")] == steps


def test_waiting_for_the_first_step_is_no_trouble(tmp_path):
    config = MonitorConfig(budget=20, signals=(), audit_from=40, audit_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(DriftMonitor(by_length, tmp_path, config), 20)


def test_answers_that_come_later(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    run(monitor, 4)
    assert monitor.evidence.value == 1.0
    for folder in (tmp_path / "audits").iterdir():
        rows = read_jsonl(folder / "draws.jsonl")
        text = "".join(json.dumps({**row, "outcome": "lose"}) + "\n" for row in rows)
        (folder / "answers.jsonl").write_text(text)
    with pytest.warns(UserWarning, match="orders fewer than"):
        run(monitor, 1, first=5)
    assert monitor.alarmed


def test_a_judge_answers(tmp_path):
    class Judge:
        name = "always wrong"

        def judge(self, comparisons, *, progress=None):
            return [Verdict(comparison, "lose") for comparison in comparisons]

    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=Judge(), actions=[])
    run(monitor, 4)
    assert monitor.alarmed


def test_resumed_is_as_if_never_stopped(tmp_path):
    whole = DriftMonitor(by_length, tmp_path / "whole", SMALL, answers=right)
    run(whole, 7)
    part = DriftMonitor(by_length, tmp_path / "part", SMALL, answers=right)
    run(part, 4)
    part.close()
    with open(tmp_path / "part" / "steps.jsonl", "a") as file:
        file.write('{"step": 5, "sig')  # killed while it wrote
    again = DriftMonitor(by_length, tmp_path / "part", SMALL, answers=right)
    again._recent = part._recent  # texts of the last steps are not kept
    run(again, 3, first=5)
    texts = [(tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "part")]
    assert texts[1].replace('{"step": 5, "sig\n', "") == texts[0]
    assert again.evidence == whole.evidence


def test_an_alarm_is_remembered(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=wrong, actions=[])
    run(monitor, 4)
    monitor.close()
    again = DriftMonitor(by_length, tmp_path, SMALL, answers=wrong)
    assert again.alarmed
    run(again, 2, first=5)  # no second warning, which would be an error here


def test_the_test_cannot_change_within_a_run(tmp_path):
    DriftMonitor(by_length, tmp_path / "m", SMALL)
    with pytest.raises(UserError, match=r"threshold was 0.7 and is 0.6; a run's test cannot"):
        DriftMonitor(by_length, tmp_path / "m", MonitorConfig(budget=60))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than a monitor"):
        DriftMonitor(by_length, tmp_path / "other", SMALL)


def test_a_changed_model_begins_anew(tmp_path):
    def hook(alarm):
        monitor.model_changed(
            lambda prompts, responses, *, finished: [1.0 / len(r) for r in responses]
        )

    def answers(pairs):
        return (right if monitor._state.episode == 2 else wrong)(pairs)

    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=answers, actions=[hook])
    run(monitor, 3)
    assert not monitor.alarmed  # it came, and the hook changed the model
    assert (tmp_path / "alarm.json").exists()
    assert monitor.evidence.value == 1.0
    shortest = monitor(*batch(4))
    assert shortest == [1.0 / len(text) for text in batch(4)[1]]
    probe = read_jsonl(tmp_path / "probe.jsonl")
    assert probe[0]["rewards"] == [1.0 / len(text) for text in probe[0]["responses"]]
    monitor.close()
    assert DriftMonitor(by_length, tmp_path, SMALL)._state.episode == 2


def test_errors_do_not_reach_the_run(tmp_path):
    def breaks(alarm):
        raise RuntimeError("no such server")

    def fails(pairs):
        raise OSError("the judge is away")

    monitor = DriftMonitor(by_length, tmp_path / "a", SMALL, answers=fails)
    with pytest.warns(UserWarning, match="the judge is away") as seen:
        assert run(monitor, 4) == [[float(len(t)) for t in batch(s)[1]] for s in range(1, 5)]
    assert len(seen) == 1  # once, though several audits failed
    assert "Traceback" in (tmp_path / "a" / "errors.log").read_text()
    monitor = DriftMonitor(by_length, tmp_path / "b", SMALL, answers=wrong, actions=[breaks])
    with pytest.warns(UserWarning, match="no such server"):
        run(monitor, 4)
    assert monitor.alarmed
    with warnings.catch_warnings():  # an error even where warnings are errors
        warnings.simplefilter("error")
        run(DriftMonitor(by_length, tmp_path / "c", SMALL, answers=fails), 4)


def test_an_audit_is_asked_again_after_an_error(tmp_path):
    """Also with no audit after it; the pauses grow, so a judge that is away costs little."""
    times = []

    def answers(pairs):
        times.append(monitor._state.step)
        if len(times) <= 3:
            raise OSError("the judge is away")
        return right(pairs)

    config = MonitorConfig(budget=20, audit_every=2, signals=())
    monitor = DriftMonitor(by_length, tmp_path, config, answers=answers)
    with pytest.warns(UserWarning, match="could not be answered: the judge is away"):
        run(monitor, 12)
    assert times == [2, 3, 5, 9]
    assert monitor.evidence.answers == 20
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 12


def test_a_killed_run_asks_about_its_last_audit(tmp_path):
    """Killed between the queue and the answers."""

    def killed(pairs):
        raise KeyboardInterrupt

    config = MonitorConfig(budget=20, audit_every=2, signals=())
    monitor = DriftMonitor(by_length, tmp_path, config, answers=killed)
    with pytest.raises(KeyboardInterrupt):
        run(monitor, 2)
    monitor.close()
    again = DriftMonitor(by_length, tmp_path, config, answers=right)
    run(again, 1, first=3)
    assert again.evidence.answers == 20


@pytest.mark.parametrize("bad", ["maybe", ["win"], float("nan")])
def test_answers_of_a_function_are_checked(bad, tmp_path):
    config = MonitorConfig(budget=20, audit_every=2, signals=())
    monitor = DriftMonitor(by_length, tmp_path, config, answers=lambda pairs: [bad] * len(pairs))
    with pytest.warns(UserWarning, match="an audit is .*; write win"):
        run(monitor, 2)


def test_a_full_disk_does_not_silence_the_alarm(tmp_path, monkeypatch):
    alarms = []
    monitor = DriftMonitor(by_length, tmp_path, SMALL, actions=[alarms.append])
    run(monitor, 2)
    (folder,) = (tmp_path / "audits").iterdir()
    rows = [{**row, "outcome": "lose"} for row in read_jsonl(folder / "draws.jsonl")]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("_append", "write_jsonl", "atomic_write_text"):
        monkeypatch.setattr(f"shiftrm.monitor.folder.{name}", full)
    monkeypatch.setattr("shiftrm.monitor.audits.write_jsonl", full)
    with pytest.warns(UserWarning, match="No space left"):
        run(monitor, 1, first=3)
    assert len(alarms) == 1
    assert monitor.alarmed


def test_a_hook_that_exits_does_not_end_training(tmp_path):
    def leaves(alarm):
        raise SystemExit(3)

    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=wrong, actions=[leaves])
    with pytest.warns(UserWarning, match="failed: 3"):
        run(monitor, 4)
    assert monitor.alarmed


def test_an_error_of_the_reward_is_raised(tmp_path):
    def broken(prompts, responses, *, finished):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(DriftMonitor(broken, tmp_path, SMALL), 1)


def test_a_signal_that_fails_is_left_out(tmp_path):
    """A reward that only knows what was sampled cannot score changed texts."""

    def ids_only(prompts, completions, completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    config = MonitorConfig(budget=0, signals=tuple(SIGNALS.names()))
    monitor = DriftMonitor(ids_only, tmp_path, config)
    prompts, texts = batch(1)
    ids = [list(range(len(t))) for t in texts]
    with pytest.warns(UserWarning, match="sight_other_prompt' is left out"):
        assert monitor(prompts, texts, ids) == [float(len(t)) for t in texts]
    (step,) = read_jsonl(tmp_path / "steps.jsonl")
    assert "spread" in step["signals"]
    assert not any(name.startswith("sight") for name in step["signals"])


def test_broken_answers_can_be_corrected(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    run(monitor, 2)
    path = tmp_path / "audits" / "0001" / "answers.jsonl"
    path.write_text("win\n")
    with pytest.warns(UserWarning, match="cannot be read"):
        run(monitor, 1, first=3)
    path.unlink()
    run(monitor, 1, first=4)
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 4


def test_one_process_watches(tmp_path):
    first = DriftMonitor(by_length, tmp_path, SMALL)
    run(first, 1)
    second = DriftMonitor(by_length, tmp_path, SMALL)
    with pytest.warns(UserWarning, match="only passes rewards on"):
        assert run(second, 1) == [[float(len(t)) for t in batch(1)[1]]]
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 1


def test_evidence_of_the_folder_is_the_monitors(tmp_path):
    config = MonitorConfig(
        threshold=0.9, budget=60, audit_pairs=20, audit_every=2, baseline=2, window=2
    )
    answers = iter([right, wrong, right])
    monitor = DriftMonitor(
        by_length, tmp_path, config, answers=lambda pairs: next(answers)(pairs), actions=[]
    )
    run(monitor, 6)
    again = DriftMonitor(by_length, tmp_path, config)
    assert evidence_of(again._state.audits, config, 1) == monitor.evidence


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targeted": 1.0}, "targeted is 1.0"),
        ({"audit_every": 0}, "audit_every is 0"),
        ({"budget": 10}, "less than the 20 pairs of one audit"),
        ({"signals": ("spred",)}, "did you mean 'spread'"),
        ({"flag": 0.0}, "flag is 0.0"),
        ({"audit_pairs": 2.5}, "audit_pairs is 2.5; it must be a whole number"),
        ({"alpha": "x"}, "alpha is 'x'; it must be a number"),
        ({"pool_steps": True}, "pool_steps is True"),
        ({"signals": "spread"}, "signals is 'spread'; give a list"),
    ],
)
def test_bad_settings(given, said):
    with pytest.raises(UserError, match=said):
        MonitorConfig(**given)


def test_what_cannot_be_wrapped(tmp_path):
    with pytest.raises(UserError, match="cannot wrap a int"):
        DriftMonitor(3, tmp_path)
    with pytest.raises(UserError, match="cannot wrap a Linear without its tokenizer"):
        DriftMonitor(torch.nn.Linear(1, 1), tmp_path)


def test_a_function_is_only_asked_about_what_the_policy_wrote(tmp_path):
    class Running:
        """A reward with a state: it depends on all texts so far."""

        def __init__(self):
            self.seen = 0

        def __call__(self, prompts, responses, *, finished):
            self.seen += len(responses)
            return [len(r) + 0.001 * self.seen for r in responses]

    alone, reward = Running(), Running()
    monitor = DriftMonitor(reward, tmp_path / "a", SMALL)
    for step in range(1, 4):
        prompts, texts = batch(step)
        assert monitor(prompts, texts) == alone(prompts, texts, finished=None)
    signals = read_jsonl(tmp_path / "a" / "steps.jsonl")[0]["signals"]
    assert "spread" in signals
    assert not any(name.startswith("sight") for name in signals)
    run(DriftMonitor(reward, tmp_path / "b", SMALL, score=by_length), 1)
    assert "sight_cut" in read_jsonl(tmp_path / "b" / "steps.jsonl")[0]["signals"]


def test_coroutines_share_one_loop(tmp_path):
    loops = []

    async def later(prompts, completions, **_):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    monitor = DriftMonitor(later, tmp_path, SMALL)
    run(monitor, 2)

    async def inside():
        return run(monitor, 1, first=3)

    assert asyncio.run(inside()) == [[float(len(t)) for t in batch(3)[1]]]
    assert len(set(loops)) == 1
    assert not loops[0].is_closed()


def test_names(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path / "a", SMALL)
    assert (monitor.__name__, monitor.prefix) == ("by_length", "drift/")
    logged = {}
    monitor = DriftMonitor(partial(by_length), tmp_path / "b", SMALL, name="second")
    run(monitor, 1, log_metric=logged.__setitem__)
    assert monitor.__name__ == "second"
    assert {name.rsplit("/", 1)[0] for name in logged} == {"drift/second"}
    assert name_of(partial(by_length)) == "by_length"
    assert name_of("models/reward/") == "reward"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("steps.jsonl", "[1]"),
        ("steps.jsonl", '{"a": 1}'),
        ("events.jsonl", "3"),
        ("probe.jsonl", '{"x": 1}'),
        ("monitor.json", "[]"),
        ("monitor.json", "[1]"),
        ("audits/0001/draws.jsonl", ""),
        ("audits/0001/draws.jsonl", '{"a": 1}'),
    ],
)
def test_files_of_something_else(name, text, tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    run(monitor, 2)
    monitor.close()
    (tmp_path / name).write_text(text + "\n")
    with pytest.raises(UserError, match=f"{name}: "):
        DriftMonitor(by_length, tmp_path, SMALL)


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        DriftMonitor(by_length, tmp_path / "file" / "m", SMALL)


def test_broken_answers_at_a_restart(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    run(monitor, 2)
    monitor.close()
    (tmp_path / "audits" / "0001" / "answers.jsonl").write_text("")
    again = DriftMonitor(by_length, tmp_path, SMALL)
    with pytest.warns(UserWarning, match="cannot be read"):
        run(again, 1, first=3)
    run(again, 2, first=4)
    assert again.errors == 1  # said once
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 5
