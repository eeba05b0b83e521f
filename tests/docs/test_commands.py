"""Every command and every Python example of the manual is run as it stands, on tiny models.

The quick start makes the models and files; every other page goes on from a copy of its folder.
`tests/docs/world.py` says what is made smaller. What cannot run here is listed in NOT_RUN with the
reason, and is checked for being understood: command, options, and settings of trainings.
"""

import contextlib
import glob
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from shiftrm import cli
from shiftrm.data.demonstrations import check_demonstration
from shiftrm.data.groups import check_group
from shiftrm.data.pairs import check_pair
from shiftrm.errors import UserError
from tests.docs import world
from tests.docs.blocks import blocks, commands
from tests.docs.test_build import DOCS, PAGES, ROOT
from tests.fake_endpoint import FakeEndpoint
from tests.fake_vllm import make_program

pytestmark = pytest.mark.slow

START = DOCS / "quick-start.md"
README = ROOT / "README.md"
SEVERAL = "accelerate launch on several processes; tests/trainers/test_*distributed.py do"
BENCHMARK = "a measurement of minutes to hours; the page says when and how it was made"
MINUTES = "the gold world at full size, minutes; tests/demo run it tiny"

NOT_RUN = {
    "make ": "sets up an environment, or runs everything",
    "pip install": "needs a network",
    "vllm serve": "vLLM is not installed here",
    "export ": "of a shell",
    "shiftrm serve": "runs until it is stopped; tests/serve do",
    "curl ": "asks a server; tests/serve do",
    "accelerate launch": SEVERAL,
    "python benchmarks/": BENCHMARK,
    "python -c from shiftrm.world.build_domains": "commands/meta.md runs the same",
    "for ": "a loop of a shell over what other pages run",
    "shiftrm demo": MINUTES,
    "shiftrm run gold_domains": "tests/oodpl/test_gold_run.py runs a small one; planned only",
    "shiftrm run recipes/hh_helpful.yaml model=meta-llama/": "the hub and GPUs; planned only",
    "shiftrm run openrlhf": "the hub; tests/pipeline/test_external_recipes.py runs it",
    "shiftrm run trl_grpo": "the hub; tests/pipeline/test_external_recipes.py runs it",
    "shiftrm report runs/": "no finished demo is at hand; tests/report make pages of records",
}
"""How a command begins, and why it is not run here. The shiftrm part is still parsed."""


class Session:
    """One folder in which pages are worked through as a reader would."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.made, self.scope = set(), {"__name__": "manual"}

    def work_through(self, page):
        """Run all blocks of a page in order."""
        with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(self.folder)  # as `python` does
            for block in blocks(page):
                if block.file is not None:
                    Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.file).write_text(block.text, encoding="utf-8")
                elif block.language == "python" and page != README:  # tests/test_readme.py
                    self.python(block)
                for words in commands(block):
                    self.run(words, block.where)

    def python(self, block):
        code = block.text
        for shown, small in world.SMALL_PYTHON.items():
            code = code.replace(shown, small)
        exec(compile(code, block.where, "exec"), self.scope)

    def run(self, words, where):
        reason = next(
            (r for start, r in NOT_RUN.items() if " ".join(words).startswith(start)), None
        )
        if reason is not None:
            if "shiftrm" in words:
                understood(of_loop(words)[words.index("shiftrm") + 1 :], where)
            return
        assert words[0] == "shiftrm", f"{where}: {words}"
        words = [word for given in words[1:] for word in self.here(given)]
        if words[:2] == ["evaluate", "answers"]:
            world.write_answers(self.folder)
        small = [
            word
            for key, more in world.SMALL.items()
            if key.split()[0] == words[0] and set(key.split()) <= set(words)
            for word in more
        ]
        if "--help" not in words and "--dry-run" not in words and "--config" not in words:
            self.make_room(words)
        status, said = spoken([*words, *small])
        assert status == 0, f"{where}: shiftrm {' '.join(words)}\n{said[-3000:]}"

    def here(self, word):
        """A word as it is on this machine: the fake server, local files for names of the hub."""
        word = word.replace("http://localhost:8000/v1", self.server)
        for name, path in world.HERE.items():
            word = word.replace(name, path)
        return sorted(glob.glob(word)) if "*" in word and "=" not in word else [word]

    def make_room(self, words):
        """What an earlier page has made under the name of this command's output goes away."""
        if "--output" not in words:
            return
        output = Path(words[words.index("--output") + 1])
        if output in self.made:
            return
        self.made.add(output)
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def spoken(words):
    """Status and all output of a command in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, said.getvalue()


def of_loop(words):
    """The words of `for x in 1 2; do COMMAND; done` in the first pass; other words as they are."""
    if words[0] != "for":
        return words
    name, first = words[1], words[3]
    return [word.replace(f"${name}", first).rstrip(";") for word in words if word != "done"]


def understood(words, where):
    """The command takes these options, a training these settings; a run is planned."""
    if words[0] == "run":
        status, said = spoken([*words, "--dry-run"])
        assert status == 0, f"{where}: {said}"
        return
    with pytest.MonkeyPatch.context() as patch:
        for command in cli.COMMANDS.values():
            patch.setattr(command, "run", lambda args: None, raising=False)
        status, said = spoken(words)
    assert status == 0, f"{where}: {' '.join(words)}\n{said}"
    if "--config" not in words:
        from shiftrm.pipeline.job_checks import check_job

        given = dict(w.split("=", 1) for w in words[1:] if "=" in w and w[0] != "-")
        try:
            check_job(job_of(words), given)
        except UserError as error:
            pytest.fail(f"{where}: {error}")


def job_of(words):
    """The job of a command, as far as its settings depend on it."""
    from shiftrm.pipeline.jobs import Optimise, Sft, TrainReward

    if words[0] == "train":
        groups = "groups.jsonl" if "--groups" in words else None
        method = words[words.index("--method") + 1] if "--method" in words else None
        return TrainReward("model", "pairs.jsonl", groups=groups, adaptation=method)
    if words[0] == "optimise":
        return Optimise(words[1], "policy")
    return Sft("model", "demonstrations.jsonl") if words[0] == "sft" else None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The endpoint of all pages, and the environment that readers would have."""
    folder = tmp_path_factory.mktemp("bin")
    make_program(folder)
    models = ["policy", "my-judge", "gpt-4o"]
    with (
        FakeEndpoint(answer=world.answer, models=models, cards={"max_model_len": 64}) as fake,
        pytest.MonkeyPatch.context() as patch,
    ):
        beside = Path(sys.executable).parent  # trl, as in an environment that is activated
        patch.setenv("PATH", os.pathsep.join([str(folder), str(beside), os.environ["PATH"]]))
        patch.setenv("OPENAI_BASE_URL", fake.url)
        patch.setenv("OPENAI_API_KEY", "test")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield fake.url


@pytest.fixture(scope="module")
def started(tmp_path_factory, server):
    """The folder after the quick start, with what readers bring along."""
    folder = tmp_path_factory.mktemp("started")
    Session(folder, server).work_through(START)
    world.prepare(folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in (*PAGES, README) if page != START and blocks(page)],
    ids=lambda page: page.stem,
)
def test_a_page_runs(page, started, server, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(started, folder)
    Session(folder, server).work_through(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_rows_shown_are_rows_that_are_read(page):
    """Every JSON line of a page is a pair, a group, a prompt or a demonstration, if it is a row."""
    for block in blocks(page):
        if block.language != "json":
            continue
        for line in block.text.splitlines():
            row = json.loads(line)
            if "chosen" in row:
                check_pair(row, block.where)
            elif "responses" in row:
                check_group(row, block.where)
            elif "completion" in row or "messages" in row:
                check_demonstration(row, block.where)


def test_nothing_is_listed_in_vain():
    shown = [
        " ".join(words)
        for page in (*PAGES, README)
        for block in blocks(page)
        for words in commands(block)
    ]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in shown), start
