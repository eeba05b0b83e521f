"""Sampling by a vLLM server: the request is vLLM's, the rows and files are sampling's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from shiftrm.cli import main
from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models import vllm_server as starting
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.sampling import Draws, SamplingConfig, draw_seed, generate, sample_rows
from shiftrm.models.sampling_vllm import (
    connect,
    load_tokenizer,
    sample_groups_vllm,
    sample_rows_vllm,
)
from shiftrm.models.vllm_server import vllm_server
from tests.conftest import move_weights
from tests.fake_endpoint import Drop, Fail, FakeEndpoint, Nonsense, Say, Stall
from tests.fake_vllm import continued, make_program

CHAT = [{"role": "user", "content": "the red"}]
PROMPTS = ["the red", "a", CHAT, "a dog", "the fish"]
CONFIG = SamplingConfig(max_new_tokens=6, temperature=0.8, top_p=0.9, repetition_penalty=1.1)


@pytest.fixture
def fake():
    with FakeEndpoint(
        answer=continued, models=["policy"], cards={"root": "models/ppo", "max_model_len": 64}
    ) as server:
        yield server


@pytest.fixture
def server(fake):
    return connect(fake.url, "policy")


def expected_rows(tokenizer, prompts=PROMPTS, *, num_responses, seed=0):
    """Worked out from what the server says, one prompt at a time."""
    rows = []
    for index, prompt in enumerate(prompts):
        said = continued(
            {
                "prompt": encode_prompt(tokenizer, prompt),
                "n": num_responses,
                "seed": draw_seed(seed, index),
                "stop_token_ids": [2],
                "max_tokens": CONFIG.max_new_tokens,
            }
        )
        ends = [s.token_ids[-1] == 2 for s in said]
        words = [s.token_ids[:-1] if e else s.token_ids for s, e in zip(said, ends, strict=True)]
        texts = [tokenizer.decode(ids) for ids in words]
        rows.append((prompt, texts, [s.token_ids[-1] == 2 for s in said]))
    return rows


def as_tuples(rows):
    return [(r["prompt"], [t.strip() for t in r["responses"]], r["finished"]) for r in rows]


# -- The request -----------------------------------------------------------------------------


def test_the_request_is_vllms(server, fake, tokenizer):
    """Names and types of vLLM's CompletionRequest; nothing is left to the server's defaults."""
    sample_rows_vllm(server, tokenizer, [CHAT], Draws(CONFIG, 3, seed=7))
    assert fake.paths == ["/v1/completions"]
    assert fake.bodies == [
        {
            "model": "policy",
            "prompt": tokenizer.apply_chat_template(
                CHAT, tokenize=True, add_generation_prompt=True, return_dict=True
            )["input_ids"],
            "n": 3,
            "max_tokens": 6,
            "temperature": 0.8,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "top_k": -1,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": [2],
            "seed": draw_seed(7, 0),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
    ]
    assert fake.bodies[0]["prompt"] == encode_prompt(tokenizer, CHAT)


def test_seeds_of_neighbours_share_no_draws():
    """vLLM adds the number of the response to the seed: 100 responses may not overlap."""
    seeds = sorted(draw_seed(seed, index) for seed in range(20) for index in range(500))
    assert min(b - a for a, b in pairwise(seeds)) > 100
    assert seeds[0] >= 0
    assert seeds[-1] + 100 < 2**63


# -- Rows and files --------------------------------------------------------------------------


def test_rows_hold_what_the_server_sampled(server, tokenizer):
    rows = sample_rows_vllm(server, tokenizer, PROMPTS, Draws(CONFIG, 4, seed=0))
    assert as_tuples(rows) == expected_rows(tokenizer, num_responses=4)
    finished = [f for row in rows for f in row["finished"]]
    assert True in finished
    assert False in finished
    assert sample_rows_vllm(server, tokenizer, [], Draws(CONFIG, 4, seed=0)) == []


def test_as_transformers_samples(policy, tokenizer):
    """A server that runs `generate`, at a temperature without chance: the rows of `sample_rows`,
    text for text, chats and spaces included."""
    lock = threading.Lock()

    def by_generate(body):
        drawing = SamplingConfig(
            body["max_tokens"], body["temperature"], body["top_p"], body["repetition_penalty"]
        )
        with lock:  # it sets the global random state
            samples = generate(
                policy, tokenizer, [body["prompt"]], config=drawing, num_responses=body["n"], seed=0
            )
        return [Say("", "stop" if s.finished else "length", s.response_ids) for s in samples]

    config = SamplingConfig(max_new_tokens=12, temperature=1e-4, repetition_penalty=1.3)
    draws = Draws(config, 2, batch_size=2)
    with FakeEndpoint(answer=by_generate, models=["policy"]) as fake:
        by_server = sample_rows_vllm(connect(fake.url, "policy"), tokenizer, PROMPTS, draws)
    assert by_server == sample_rows(policy, tokenizer, PROMPTS, draws)


def test_rows_stand_in_the_order_of_the_prompts_whatever_comes_first(server, fake, tokenizer):
    first = encode_prompt(tokenizer, PROMPTS[0])
    fake.rule = lambda body: Stall(0.3) if body["prompt"] == first else None
    rows = sample_rows_vllm(server, tokenizer, PROMPTS * 3, Draws(CONFIG, 2, batch_size=3, seed=0))
    assert as_tuples(rows) == expected_rows(tokenizer, PROMPTS * 3, num_responses=2)
    assert fake.most_at_once <= 3


def test_failures_on_the_way_change_nothing(server, fake, tokenizer):
    fake.script(Fail(500), Fail(429), Drop(), Nonsense("<html>"), None, Fail(503))
    rows = sample_rows_vllm(server, tokenizer, PROMPTS, Draws(CONFIG, 2, batch_size=2, seed=0))
    assert as_tuples(rows) == expected_rows(tokenizer, num_responses=2)


def test_a_group_file(server, fake, tokenizer, tmp_path):
    seen = []
    path = sample_groups_vllm(
        server,
        tokenizer,
        PROMPTS,
        tmp_path / "g.jsonl",
        Draws(CONFIG, 3),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert as_tuples(read_groups(path)) == expected_rows(tokenizer, num_responses=3)
    assert seen == [(n, 5) for n in range(1, 6)]
    assert [p.name for p in tmp_path.iterdir()] == ["g.jsonl"]
    asked = len(fake.bodies)
    sample_groups_vllm(server, tokenizer, PROMPTS, path, Draws(CONFIG, 3))
    assert len(fake.bodies) == asked, "the file is there: nothing is asked again"


@pytest.mark.parametrize("lines_left", [1, 3, 4])
def test_an_interrupted_file_resumes_to_the_same_result(
    server, fake, tokenizer, tmp_path, lines_left
):
    """Another batch size afterwards is no other setting here: it changes no draw."""

    class Killed(Exception):
        pass

    def kill(done, _total):
        if done >= 4:
            raise Killed

    def write(name, progress=None, batch_size=1):
        return sample_groups_vllm(
            server,
            tokenizer,
            PROMPTS,
            tmp_path / name,
            Draws(CONFIG, 2, batch_size=batch_size, seed=5),
            progress=progress,
        )

    straight = write("straight.jsonl").read_bytes()
    with pytest.raises(Killed):
        write("resumed.jsonl", kill)
    partial = tmp_path / "resumed.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:lines_left]) + lines[-1][:9])
    before = len(fake.bodies)
    assert write("resumed.jsonl", batch_size=4).read_bytes() == straight
    assert len(fake.bodies) - before == 5 - (lines_left - 1)
    partial.write_bytes(b'{"settings": "other"}\n')
    (tmp_path / "resumed.jsonl").unlink()
    with pytest.raises(
        UserError, match="begun with another policy, other prompts or other settings"
    ):
        write("resumed.jsonl")


def test_servers_that_send_no_token_ids_are_believed_their_text(tokenizer):
    say = [Say(" a dog", "stop"), Say(" half \ud800", "length")]
    with FakeEndpoint(answer=lambda _: say, models=["policy"]) as fake:
        [row] = sample_rows_vllm(
            connect(fake.url, "policy"), tokenizer, ["x"], Draws(CONFIG, 2, seed=0)
        )
    assert row == {"prompt": "x", "responses": [" a dog", " half ?"], "finished": [True, False]}


def test_a_response_that_ends_at_its_limit_with_eos_is_finished(tokenizer):
    """vLLM before 0.10 calls it "length": the limit was looked at first."""
    say = [Say("", "length", [4, 5, 2]), Say("", "length", [4, 5, 6])]
    with FakeEndpoint(answer=lambda _: say, models=["policy"]) as fake:
        [row] = sample_rows_vllm(
            connect(fake.url, "policy"), tokenizer, ["a"], Draws(CONFIG, 2, seed=0)
        )
    assert row["finished"] == [True, False]


# -- Refusals --------------------------------------------------------------------------------


def test_the_model_is_found_by_name_folder_or_option(fake):
    assert connect(fake.url, "policy").model == "policy"
    assert connect(fake.url, "models/ppo").model == "policy"
    assert connect(fake.url, "elsewhere", served="policy").model == "policy"
    assert connect(fake.url, "policy").max_model_len == 64
    with pytest.raises(UserError, match=r"serves 'policy', not 'models/sft'; start vLLM with this"):
        connect(fake.url, "models/sft")
    with pytest.raises(UserError, match=r"not 'polici'; did you mean 'policy'\?"):
        connect(fake.url, "models/ppo", served="polici")
    with pytest.raises(UserError, match="cannot be reached"):
        connect("http://127.0.0.1:9/v1", "policy")


def test_refusals(server, fake, tokenizer, tmp_path):
    def call(prompts=PROMPTS, **options):
        draws = Draws(**{"config": CONFIG, **options})
        return sample_groups_vllm(server, tokenizer, prompts, tmp_path / "g.jsonl", draws)

    for options, message in (
        ({"num_responses": 0}, "num_responses is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a", ""]}, "prompt 1 is empty"),
        ({"prompts": ["a " * 60]}, r"prompt 0 has 60 tokens; .* context of 64"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
    assert fake.bodies == []
    assert list(tmp_path.iterdir()) == []
    for said, message in (
        ([Say("", "stop", [4, 2])], "sent 1 responses for 2"),
        ([Say("", "abort", [4])] * 2, "a response ended with 'abort'"),
    ):
        fake.answer = lambda _, said=said: said
        with pytest.raises(UserError, match=message):
            call(num_responses=2)
    assert not (tmp_path / "g.jsonl").exists()


def test_the_key_is_vllms_own(fake, monkeypatch, tokenizer):
    """Not OpenAI's, which no other server may see."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-service")
    monkeypatch.setenv("VLLM_API_KEY", "of-this-server")
    fake.key = "of-this-server"
    sample_rows_vllm(connect(fake.url, "policy"), tokenizer, ["a"], Draws(CONFIG, 1, seed=0))
    assert fake.headers[0]["authorization"] == "Bearer of-this-server"


# -- A server of our own ---------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A fake `vllm` on the path; what it was called with is in record.json."""
    make_program(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "record.json"))
    return tmp_path


def recorded(folder):
    return json.loads((folder / "record.json").read_text())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"


def test_a_server_is_started_and_ended(program, tokenizer):
    log = program / "log"
    with vllm_server("models/ppo", log=log, arguments=["--tensor-parallel-size", "2"]) as server:
        rows = sample_rows_vllm(server, tokenizer, PROMPTS, Draws(CONFIG, 2, seed=0))
        assert alive(recorded(program)["pid"])
        assert log.exists()
    assert as_tuples(rows) == expected_rows(tokenizer, num_responses=2)
    words = recorded(program)["words"]
    port = words[words.index("--port") + 1]
    assert words == (
        f"serve models/ppo --host 127.0.0.1 --port {port} --served-model-name models/ppo "
        "--generation-config vllm --tensor-parallel-size 2"
    ).split(" ")
    assert not alive(recorded(program)["pid"])
    assert not log.exists()


def test_a_server_is_ended_after_an_error_and_its_log_stays(program):
    with pytest.raises(ZeroDivisionError), vllm_server("m", log=program / "log"):
        raise ZeroDivisionError
    assert not alive(recorded(program)["pid"])
    assert "INFO starting" in (program / "log").read_text()


def test_a_server_that_dies_or_is_never_ready(program, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_DIES", "torch.OutOfMemoryError: \x1b[31mCUDA out of memory")
    with (
        pytest.raises(UserError) as error,
        vllm_server("m", log=program / "log"),
    ):
        pass
    assert str(error.value) == (
        "vllm serve ended with status 1 before it was ready: torch.OutOfMemoryError: \\x1b[31mCUDA "
        f"out of memory; see {program / 'log'}"
    )
    monkeypatch.delenv("FAKE_VLLM_DIES")
    monkeypatch.setenv("FAKE_VLLM_NEVER_READY", "1")
    with (
        pytest.raises(UserError, match=r"not ready after 1 seconds: INFO starting; see "),
        vllm_server("m", log=program / "log", start_limit=1.0),
    ):
        pass
    assert not alive(recorded(program)["pid"])


def test_without_vllm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(UserError, match="vllm is not installed here; pip install"),
        vllm_server("m", log=tmp_path / "log"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by prctl")
def test_a_killed_command_leaves_no_server(program):
    script = (
        "import time; from shiftrm.models.vllm_server import vllm_server\n"
        f"with vllm_server('m', log={str(program / 'log')!r}):\n    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        pid = recorded(program)["pid"]
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


# -- The command -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch, policy, tokenizer):
    monkeypatch.chdir(tmp_path)
    policy.save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    write_jsonl("prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return tmp_path


SAMPLE = ["sample", "--policy", "policy", "--prompts", "prompts.jsonl", "--output", "g.jsonl"]
DRAWING = ["--max-new-tokens", "6", "--responses", "2"]


@pytest.mark.parametrize("how", ["running", "started"])
def test_the_command(folder, fake, capsys, program, tokenizer, how):
    words = ["--vllm", "--vllm-arguments=--dtype float32"]
    if how == "running":
        words = ["--server", fake.url, "--served-model", "policy"]
    status = main([*SAMPLE, *DRAWING, *words])
    output = capsys.readouterr()
    assert (status, output.err) == (0, "")
    assert output.out == "5 groups of 2 responses: g.jsonl\n"
    assert as_tuples(read_jsonl("g.jsonl")) == expected_rows(tokenizer, num_responses=2)
    assert [p.name for p in folder.glob("g.jsonl*")] == ["g.jsonl"]
    if how == "started":
        assert recorded(program)["words"][-2:] == ["--dtype", "float32"]
        assert not alive(recorded(program)["pid"])


@pytest.mark.parametrize("how", ["running", "started"])
def test_a_repeated_command_asks_nothing_and_a_moved_policy_is_refused(
    folder, fake, capsys, program, how
):
    words = [*SAMPLE, *DRAWING, "--vllm", "--vllm-arguments=--served-model-name x"]
    if how == "running":
        words = [*SAMPLE, *DRAWING, "--server", fake.url]
    assert main(words if how == "running" else [*words[:-1]]) == 0, capsys.readouterr().err
    capsys.readouterr()
    made = Path("g.jsonl").read_bytes()
    if how == "running":
        words[-1] = "http://127.0.0.1:1/v1"  # nothing answers there
    else:
        (program / "words.json").unlink(missing_ok=True)
    words[2] = "./policy"
    assert main(words) == 0, capsys.readouterr().err
    assert "g.jsonl: already there, 5 groups" in capsys.readouterr().out
    move_weights("policy")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "already there with groups of another policy" in error
    assert error.count("\n") == 1
    assert Path("g.jsonl").read_bytes() == made


def test_the_commands_mistakes_are_one_line(folder, fake, capsys, monkeypatch):
    before = sorted(p.name for p in folder.iterdir())
    write_jsonl(folder / "bad" / "long.jsonl", [{"prompt": "a"}, {"prompt": "a " * 63}])
    monkeypatch.setattr(starting, "find_vllm", lambda: "/nowhere/vllm")
    for words, message in (
        (["--served-model", "x"], "--served-model needs --server"),
        (["--vllm-arguments", "x"], "--vllm-arguments needs --vllm"),
        (["--vllm", "--vllm-arguments", "'x"], '--vllm-arguments: "\'x": No closing quotation'),
        (["--server", fake.url, "--served-model", "x"], "serves 'policy', not 'x'"),
        (["--server", "localhost"], "localhost: not an address"),
        (["--vllm", "--policy", "bad"], "bad: "),
        (["--vllm", "--prompts", "bad/long.jsonl"], "long.jsonl:2: the prompt has 63 tokens"),
        (
            ["--server", fake.url, "--served-model", "policy", "--prompts", "bad/long.jsonl"],
            "long.jsonl:2: the prompt has 63 tokens",
        ),
    ):
        assert main([*SAMPLE, *DRAWING, *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
    assert sorted(p.name for p in folder.iterdir() if p.name != "bad") == before
    assert load_tokenizer("policy").eos_token_id == 2
