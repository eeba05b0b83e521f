"""Odd command lines: whatever is said, it works or is refused in one line, and no input changes.

The commands and their options come from the parser, so that a new command is tried, too.
`SHIFTRM_FUZZ=5000 pytest tests/cli/test_fuzz.py` tries so many, other ones at each call.
"""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import sys
import typing
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shiftrm.cli import COMMANDS as MODULES
from shiftrm.cli import main
from shiftrm.errors import UserError
from tests.cli.fuzz_world import ODD_ROWS, SOUND, YAML, make_world

EXAMPLES = int(os.environ.get("SHIFTRM_FUZZ", "250"))

SECONDS = 20
"""Of one command line; what takes longer is stopped as by Ctrl-C."""


def words(text):
    return text.split()


MODELS = words("policy rm two-labels small-embedding small-rm nan-policy nan-rm garbage cut")
MODELS += words("no-config odd-config no-tokenizer broken-template gguf adapter hollow linked")
MODELS += ["policy/"]
FILES = [f"{name}.jsonl" for name in SOUND] + [f"odd-{name}.jsonl" for name in ODD_ROWS]
FILES += words("packed.jsonl.gz broken.csv sound.csv broken.parquet broken.jsonl.gz bytes.jsonl")
FILES += words("hard.jsonl link.jsonl recipe.yaml sound.yaml broken.jinja")
FILES += [f"{name}.yaml" for name in YAML]
PLACES = words(
    "domains finished hollow pipe socket loop dangling nowhere owner/name . .. a=b = ü ~"
)
PLACES += ["", "x" * 300, "a/" * 3000, "owner/name::x", "rm/config.json", "\udcff"]
NEW = words("o.jsonl o.jsonl.gz o.json o.html o.csv out new/o.jsonl new/out ./o.jsonl y*")
NEW += ["\n"]

NUMBERS = ["0", "1", "2", "-1", "0.5", "1e-3", "nan", "inf", "-inf", "9" * 400, str(2**63), "1_0"]
NUMBERS += ["", "x", "true", "null", "[1]", "{a: 1}", "0x10", " 1", "1.0", "2020-13-45", "'", "٣"]

GOOD = {
    "model": ["rm", "policy"],
    "policy": ["policy"],
    "reward": ["rm"],
    "pairs": ["pairs.jsonl"],
    "prompts": ["prompts.jsonl"],
    "groups": ["groups.jsonl"],
    "demonstrations": ["demonstrations.jsonl"],
    "data": ["groups.jsonl", "pairs.jsonl", "bench.jsonl"],
    "ours": ["groups.jsonl"],
    "theirs": ["others.jsonl"],
    "samples": ["samples.jsonl"],
    "files": ["groups.jsonl"],
    "domains": ["domains"],
    "runs": ["finished"],
    "recipe": ["recipe.yaml"],
    "source": ["pairs.jsonl"],
    "format": ["preference"],
    "judge": ["reward-model", "gold", "endpoint"],
    "max_new_tokens": ["3"],
    "kind": ["pairs", "prompts"],
    "output": NEW[:-2],
}
"""Values with which commands work, by option: what is not said is drawn from everything."""

SETTINGS = {
    "train": ["max_steps", "learning_rate", "seed", "per_device_train_batch_size", "preset"],
    "sft": ["max_steps", "learning_rate", "chat_template_path", "max_length", "packing"],
    "optimise": ["max_steps", "steps", "beta", "num_generations", "kl_target", "max_length"],
    "meta-train": ["max_steps", "beta", "inner_steps", "support_batch_size", "curvature"],
    "meta-test": ["weighted.updates", "ppo.steps", "evaluation.pairs", "seed", "ppo"],
    "demo": ["policy.settings.steps", "methods", "rounds", "seed", "world.x", "policy"],
    "run": ["rounds", "seed", "methods", "data.pairs.source", "judge.kind", "sft", "preset"],
}
SETTINGS["adapt"] = SETTINGS["train"]

UNTRIED = re.compile(
    "output_dir|report_to|compile|ddp|fsdp|deepspeed|tpu|hub|logging_dir|worker|vllm|"
    "debug|parallel|accelerator|liger|load_best|trackio|jit|ipex|quant|load_in|neft"
)
"""Settings that need other hardware, other machines, or processes of their own."""


def fields(command):
    """Names of a command's settings, as its configuration classes declare them."""
    from shiftrm.oodpl.meta_config import OODPLConfig
    from shiftrm.policies import configs
    from shiftrm.trainers.reward_configs import MetaRMConfig

    configs_of_trl = [configs.RLOOConfig, configs.GRPOConfig, configs.DPOConfig]
    classes = {
        "train": [MetaRMConfig],
        "adapt": [MetaRMConfig],
        "sft": [configs.SFTConfig],
        "optimise": [configs.PPOSettings, *configs_of_trl],
        "meta-train": [OODPLConfig],
    }
    names = [f.name for c in classes.get(command, ()) for f in dataclasses.fields(c) if f.init]
    return [name for name in names if not UNTRIED.search(name)]


QUICK = {
    "train": ["max_steps=1"],
    "adapt": ["max_steps=1"],
    "sft": ["max_steps=1"],
    "optimise": ["max_steps=1"],
    "meta-train": ["max_steps=1", "support_batch_size=2", "query_batch_size=2"],
}
"""So that what is in order is over soon; behind it stands what was drawn."""

STARTS = {"optimise": [["dpo"], ["ppo"], ["rloo"], ["grpo"], [], ["sac"]]}
"""Words that the parser does not name."""

SLOW = ("yes", "timeout", "retries", "server", "base_url", "vllm", "host")
"""Options that wait for other machines."""


COMMANDS = {
    (name, *below): module
    for name, group in MODULES.items()
    for below, module in (
        [((inner,), module) for inner, module in group.COMMANDS.items()]
        if hasattr(group, "COMMANDS")
        else [((), group)]
    )
}


def odd_values(option):
    """Anything for an option: numbers for numbers, mostly; files, folders and words else."""
    numbers = st.sampled_from(NUMBERS)
    likely = {"DIR": MODELS, "MODEL": MODELS, "[NAME=]DIR": MODELS, "FILE": [*FILES, *NEW]}
    kind = likely.get(str(option.metadata["metavar"]), FILES)
    places = st.one_of(st.sampled_from(kind), st.sampled_from([*MODELS, *FILES, *PLACES, *NEW]))
    if is_number(option):
        return st.one_of(numbers, numbers, numbers, places)
    return st.one_of(places, places, places, numbers)


def good_values(option):
    if option.name in GOOD:
        return st.sampled_from(GOOD[option.name])
    if option.metadata["choices"]:
        return st.sampled_from(option.metadata["choices"])
    if is_number(option):
        return st.sampled_from(["1", "2"])
    return st.sampled_from([*MODELS, *FILES])


def is_number(option):
    return {int, float} & {option.type, *typing.get_args(option.type)}


def drawn(name):
    """The options of a command, without those that are drawn elsewhere."""
    elsewhere = {"settings", *SLOW, *(["method"] if name == ("optimise",) else [])}
    return [o for o in dataclasses.fields(COMMANDS[name].Options) if o.name not in elsewhere]


@st.composite
def command_lines(draw):
    """A command whose needed options are mostly right, and a few things that are not."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    options = drawn(name)
    words = [*name, *draw(st.sampled_from(STARTS.get(name[0], [[]])))]
    odd = draw(st.sets(st.sampled_from(range(len(options))), max_size=2))
    for number, option in enumerate(options):
        needed = option.default is option.default_factory is dataclasses.MISSING
        needed |= option.name == "output" or (name[0], option.name) == ("adapt", "groups")
        if name[0] == "optimise" and option.name in ("pairs", "prompts", "reward"):
            needed = (option.name == "pairs") == ("dpo" in words)
        if not needed and number not in odd:
            continue
        if number in odd and draw(st.integers(0, 5)) == 0:
            continue  # left out
        value = draw(odd_values(option) if number in odd else good_values(option))
        flag = f"--{option.name.replace('_', '-')}"
        if option.type is bool:
            words.append(flag)
        elif option.metadata.get("positional"):
            words.append(value)
        else:
            words += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    words += QUICK.get(name[0], [])
    for _ in range(draw(st.integers(0, 2)) if name[0] in SETTINGS else 0):
        known = st.sampled_from([*SETTINGS[name[0]], "x", ""])
        key = draw(st.one_of(known, st.sampled_from(fields(name[0]) or [""])))
        value = draw(st.sampled_from([*NUMBERS, "paper", "scale_free", "broken.jinja", "dataset"]))
        words.append(draw(st.sampled_from([f"{key}={value}", f"--{key}={value}", key])))
    return [word.replace("\0", "") for word in words]


def snapshot(folder):
    """Every name with its kind and content."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(above, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as handle:
                    found[path] = handle.read()
            else:
                found[path] = os.lstat(path).st_mode
    return found


class Finding(AssertionError):
    """What a command line did that none may do."""


def attempt(words):
    """Run a command line in this folder; its status and what it said on stderr.

    Raises:
        Finding: a traceback, another status, several lines, an input that changed, or remains.
    """
    before = snapshot(".")
    said, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            status = main(words)
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        raise Finding(f"{words}: {type(error).__name__}: {error}"[:2000]) from error
    finally:
        signal.alarm(0)
        after = snapshot(".")
        remove(set(after) - set(before))
    for stream in (said, errors):
        stream.flush()
    spoken = errors.buffer.getvalue().decode("utf-8")
    check(words, status, spoken, before, after)
    return status, spoken


def stop(*_):
    raise KeyboardInterrupt


def check(words, status, spoken, before, after):
    if status not in (0, 2, 130):
        raise Finding(f"{words}: status {status}: {spoken}")
    ours = [line for line in spoken.split("\n") if line.startswith("shiftrm")]
    if status == 2 and (len(ours) != 1 or not spoken.endswith(f"{ours[0]}\n")):
        raise Finding(f"{words}: said {spoken!r}")
    changed = [path for path in before if after.get(path) != before[path]]
    if changed:
        raise Finding(f"{words}: changed {changed}")
    left = [path for path in set(after) - set(before) if not documented(path, words)]
    if status == 2 and left:
        raise Finding(f"{words}: left {sorted(left)}, saying {spoken}")
    if half := [path for path in set(after) - set(before) if path.endswith((".tmp", ".lock"))]:
        raise Finding(f"{words}: left {half}")


def documented(path, words):
    """What an interrupted command may leave to be continued from."""
    if words[0] in ("demo", "run", "meta-test"):  # their output is what continues
        return True
    parts = Path(path).parts
    return any(part.endswith(".work") for part in parts) or path.endswith(".partial")


def remove(paths):
    for path in sorted(paths):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.lexists(path):
            os.unlink(path)


@pytest.fixture(scope="module")
def fuzz_world(tmp_path_factory, tokenizer):
    """The folder, as the working one; stages of runs are not run, since they start processes."""
    folder = tmp_path_factory.mktemp("world")

    def no_stages(*_, **__):
        raise UserError("stages are not run here")

    with pytest.MonkeyPatch.context() as patch:  # undone also where the set-up fails
        patch.chdir(folder)
        make_world(folder, tokenizer)
        for module in ("pipeline.run", "pipeline.meta_test_run"):
            patch.setattr(f"shiftrm.{module}.run_stages", no_stages)
        patch.setattr("shiftrm.serve.listening.listen", lambda *_: None)  # it would not end
        patch.setattr("builtins.input", lambda _: "n")
        patch.setattr(sys, "stdin", io.StringIO())
        yield folder


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SHIFTRM_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(words=command_lines())
def test_odd_command_lines(fuzz_world, words):
    attempt(words)


SAMPLE = ["sample", "--prompts", "prompts.jsonl", "--output", "o.jsonl", "--max-new-tokens", "3"]
SCORE = ["score", "--data", "groups.jsonl", "--output", "o.jsonl"]
TRAIN = ["train", "--pairs", "pairs.jsonl", "--output", "out", "max_steps=1"]
DPO = ["optimise", "dpo", "--pairs", "pairs.jsonl", "--output", "out", "max_steps=1"]
META = ["meta-train", "--domains", "domains", "--output", "out", "max_steps=1"]
META += ["support_batch_size=2", "query_batch_size=2"]
FOREIGN = "the tokenizer is not this model's: token "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SAMPLE, "--policy", "small-embedding"], FOREIGN),
        ([*SAMPLE, "--policy", "nan-policy"], "the policy's probabilities are not finite"),
        ([*SAMPLE, "--policy", "nan-policy", "--temperature=0"], "probabilities are not finite"),
        ([*SAMPLE, "--policy", "garbage"], "garbage: cannot be loaded as a causal language model"),
        ([*SAMPLE, "--policy", "gguf"], "`shiftrm convert gguf gguf/model.gguf --output DIR`"),
        ([*SCORE, "--model", "small-rm"], FOREIGN),
        ([*SCORE, "--model", "nan-rm"], "groups.jsonl:1: the reward is nan; the checkpoint is br"),
        ([*SCORE, "--model", "cut"], "cut: cannot be loaded as a reward model"),
        ([*TRAIN, "--model", "nan-policy"], "gives states that are not finite: its weights are"),
        (
            [*TRAIN, "--model", "small-embedding"],
            "train data: chosen_ids has token id 15, and the model has embeddings for 8",
        ),
        ([*TRAIN, "--model", "garbage"], "garbage: cannot be loaded"),
        ([*TRAIN, "--model", "gguf"], "`shiftrm convert gguf gguf/model.gguf --output DIR`"),
        ([*TRAIN, "--model", "policy", "max_steps=0"], "max_steps is 0; give at least 1"),
        ([*TRAIN, "--model", "policy", f"seed={'9' * 400}"], "a number of more than 18 digits"),
        ([*TRAIN, "--model", "policy", "seed=-1"], "seed is -1; it must be at least 0 and below"),
        ([*TRAIN, "--config", "deep.yaml"], "deep.yaml: the YAML is nested too deep"),
        ([*TRAIN, "--config", "bomb.yaml"], "bomb.yaml: the YAML is nested too deep or too large"),
        ([*TRAIN, "--config", "cycle.yaml"], "cycle.yaml: the YAML is nested too deep"),
        ([*TRAIN, "--config", "digits.yaml"], "digits.yaml: a number of more than 18 digits"),
        ([*TRAIN, "--config", "month.yaml"], "month.yaml: not valid YAML"),
        ([*DPO, "--policy", "small-embedding"], FOREIGN),
        ([*META, "--model", "garbage"], "garbage: cannot be loaded as a reward model or a policy"),
        (["evaluate", "diversity", "groups.jsonl", "--embedder", "small-embedding"], FOREIGN),
        (["evaluate", "sheet", "--ours=", "--theirs=", "--output=o"], "the name of the data is"),
        (
            ["evaluate", "answers", "--key=odd-deep.jsonl", "--answers=x", "--output=o"],
            "odd-deep.jsonl: is not the key of a sheet",
        ),
        (["diagnose", "--model=rm", "--data=groups.jsonl", f"--seed={10**30}"], "below 2^32"),
        (["score", "--nonsense"], "unknown option '--nonsense'; see `shiftrm score --help`"),
        (["score", "--modle=rm"], "unknown option '--modle=rm'; did you mean '--model'?"),
        (["score", "--model", "rm"], "--data, --output are missing; see `shiftrm score --help`"),
    ],
)
def test_broken_inputs_are_one_line(fuzz_world, words, message):
    """What command lines of the fuzzer's kind have shown, each with its words."""
    status, said = attempt(words)
    assert status == 2
    assert message in said


def test_every_command_with_settings_is_fuzzed_with_them():
    with_settings = {
        name[0]
        for name, module in COMMANDS.items()
        if any(option.name == "settings" for option in dataclasses.fields(module.Options))
    }
    assert with_settings - {"convert"} == set(SETTINGS)
