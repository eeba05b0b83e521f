"""Progress in lines, with a clock that tests turn."""

import itertools
import logging
import threading

import pytest

from shiftrm import cli
from shiftrm import progress as progress_module
from shiftrm.cli.progress import bar
from shiftrm.pipeline.engine import Stage
from shiftrm.pipeline.folder import progress as stage_progress
from shiftrm.progress import EVERY, LOG_FILE, Progress, duration, quieten_libraries
from shiftrm.trainers.progress import ProgressInWords, log_progress_to


class Clock:
    """Seconds that pass only when somebody waits; `then` does things at their time."""

    def __init__(self, end, then=()):
        self.now, self.end, self.then = 0.0, end, sorted(then, key=lambda entry: entry[0])

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """As `threading.Event.wait`: True when all is over."""
        until = self.now + seconds
        while self.then and self.then[0][0] <= until:
            self.now, act = self.then.pop(0)
            act()
        self.now = until
        return self.now >= self.end


def watched(end, then=(), log=None):
    """Lines with their times of a command of so many seconds."""
    lines, clock = [], Clock(end)
    progress = Progress("sample", lambda line: lines.append((clock.now, line)), clock=clock)
    progress.log_to(log)
    clock.then = [(at, lambda act=act: act(progress)) for at, act in then]
    progress.watch(clock.wait)
    return lines


def test_silence_never_lasts_half_a_minute():
    """One batch of 17 minutes, as of a model on two cores."""
    lines = watched(1020)
    times = [0, *(at for at, _ in lines), 1020]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 30
    assert lines[0] == (EVERY, "sample, 25 s so far")
    assert lines[-1][1] == "sample, 16 min 40 s so far"


def test_short_work_says_nothing():
    assert watched(24) == []


def test_done_total_elapsed_and_rest():
    """From second 10 on a batch of 64 takes 20 s: after the first one it is timed alone."""
    begun = []

    def start(progress):
        begun.append(progress.begin("sampling", 2048))

    def batch(number):
        return lambda progress: begun[0].advance(64 * number, 2048)

    lines = watched(120, [(10, start), *((10 + 20 * k, batch(k)) for k in range(1, 5))])
    assert lines[0][1] == "sampling: 0 of 2,048, 15 s so far"
    # At 50 s: batches ended at 30 s and 50 s; 30 more at 20 s each.
    assert lines[1] == (50, "sampling: 128 of 2,048, 40 s so far, about 10 min left")
    # At 75 s, 5 s into the fourth: 29 batches less those.
    assert lines[2][1] == "sampling: 192 of 2,048, 1 min 5 s so far, about 9 min 35 s left"


def test_the_rest_of_continued_work_is_at_todays_rate():
    """1,000 of 2,000 were there before; then 10 take 10 s."""
    begun = []

    def start(progress):
        begun.append(progress.begin("sampling", 2000))

    steps = [(10.0 * k, lambda _, k=k: begun[0].advance(1000 + 10 * k, 2000)) for k in range(1, 4)]
    (line,) = watched(26, [(0.0, start), *steps])
    assert line[1].startswith("sampling: 1,020 of 2,000, 25 s so far, about 16 min 15 s")


def test_nothing_is_said_of_the_rest_where_nothing_is_known():
    """A training that goes on at step 5, and a batch that takes longer than those before it."""

    def go_on(progress):
        progress.begin("training step", 10, done=5)

    assert watched(26, [(1, go_on)])[0][1] == "training step: 5 of 10, 24 s so far"
    begun = []
    acts = [(0.0, lambda p: begun.append(p.begin("sampling", 3)))]
    acts += [(9.0, lambda _: begun[0].advance(1)), (10.0, lambda _: begun[0].advance(2))]
    assert watched(26, acts)[0][1] == "sampling: 2 of 3, 25 s so far"


def test_the_latest_task_speaks_and_others_come_back():
    def begin(progress):
        progress.begin("training step", 10).advance(2, 10)

    tasks = []

    def measure(progress):
        tasks.append(progress.begin("evaluation batch", None))
        tasks[0].advance(3)

    lines = watched(80, [(1, begin), (2, measure), (30, lambda p: p.end(tasks[0]))])
    assert [line.split(",")[0] for _, line in lines] == [
        "evaluation batch: 3",
        "training step: 2 of 10",
        "training step: 2 of 10",
    ]


def test_lines_said_elsewhere_break_the_silence_and_are_logged(tmp_path):
    lines = watched(50, [(20.0, lambda p: p.note("step 1 of 5: loss 0.7"))], log=tmp_path)
    assert [at for at, _ in lines] == [45]
    logged = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [line[20:] for line in logged] == ["step 1 of 5: loss 0.7", "sample, 45 s so far"]


def test_a_work_folder_that_is_gone_is_no_error(tmp_path):
    assert watched(50, log=tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


class State:
    is_world_process_zero = True
    global_step, max_steps = 3, 8


class Batches(list):
    pass


def test_trainings_and_their_evaluations_are_counted(monkeypatch, capsys, tmp_path):
    """The seven minutes before the first step are an evaluation that counts batches."""
    progress = Progress("train", None, clock=lambda: 0.0)
    monkeypatch.setattr(progress_module, "_stack", [progress])
    log_progress_to(tmp_path)
    callback = ProgressInWords()
    state = State()
    for _ in range(2):
        callback.on_prediction_step(None, state, None, eval_dataloader=Batches("abcd"))
    assert progress._tasks[-1].words().startswith("evaluation batch: 2 of 4,")
    callback.on_evaluate(None, state, None)
    callback.on_train_begin(None, state, None)
    callback.on_step_end(None, state, None)
    assert progress._tasks[-1].words().startswith("training step: 3 of 8,")
    callback.on_log(None, state, None, logs={"loss": 0.5})
    callback.on_train_end(None, state, None)
    assert progress._tasks[-1].words().startswith("train,")
    assert capsys.readouterr().out == "step 3 of 8: loss 0.5\n"
    assert (tmp_path / LOG_FILE).read_text().endswith(" step 3 of 8: loss 0.5\n")


def test_every_command_reports(monkeypatch, capsys):
    """Whatever its work is: the reporter is there while it runs, and gone afterwards."""
    seen = []

    def run(args):
        with bar("reading", 4) as advance:
            advance(1, 4)
            running = progress_module.current()
            running._clock, running._spoke = (lambda: 1e9), 0.0
            running.speak_if_due()
            seen.append(threading.active_count())

    monkeypatch.setattr(cli.report, "run", run)
    before = threading.active_count()
    assert cli.main(["report", "somewhere"]) == 0
    assert seen == [before + 1]
    assert threading.active_count() == before
    assert progress_module.current() is None
    assert capsys.readouterr().err.startswith("reading: 1 of 4, ")


def test_a_run_tells_of_its_stages(monkeypatch, capsys):
    clock = Clock(0)
    running = Progress("run", None, clock=clock)
    monkeypatch.setattr(progress_module, "_stack", [running])
    with stage_progress([Stage(name, "", {}) for name in ("data", "sft")]) as on_progress:
        on_progress("skipped", "data")
        on_progress("start", "sft")
        clock.now = 300
        assert running._tasks[-1].words() == "stage sft, 5 min so far"
        on_progress("done", "sft")
    assert running._tasks[-1].words() == "run, 5 min so far"
    assert capsys.readouterr().err == "[1/2] data already there\n[2/2] sft done\n"


def test_one_process_speaks_for_all(monkeypatch):
    assert cli.speaks()
    monkeypatch.setenv("RANK", "1")
    assert not cli.speaks()
    monkeypatch.delenv("RANK")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert not cli.speaks()


def test_bitsandbytes_does_not_speak_of_kernels():
    quieten_libraries()
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not said.isEnabledFor(logging.WARNING)
