"""shiftrm adapt: before and after on what was not trained on; interrupted; bad input."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import Trainer

from shiftrm.cli import main
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models.scoring import Scorer
from shiftrm.report.diagnosis import write_page
from tests.cli.conftest import refused
from tests.cli.test_train_interrupted import start, weights
from tests.conftest import WORDS

BASE = ["adapt", "--model", "rm", "--pairs", "pairs.jsonl", "--output", "out"]
QUICK = ["max_steps=2", "learning_rate=1e-2", "preset=scale_free"]
GROUPS = [*BASE, "--groups", "many.jsonl", *QUICK]
POLICY = [*BASE, "--policy", "policy", "--prompts", "prompts.jsonl", "--responses", "2"]
POLICY += ["--max-new-tokens", "4", "--holdout", "0.5", *QUICK]
WORK = Path(".out.work")


def text(rng):
    return "".join(f" {rng.choice(WORDS.split())}" for _ in range(rng.randint(2, 6)))


@pytest.fixture
def shiftrm(shiftrm, files, reward_model, tokenizer, monkeypatch):
    """shiftrm(...) beside a reward model, 50 groups of 40 prompts, and held-out pairs."""
    monkeypatch.setattr(
        "shiftrm.report.adaptation.write_page", lambda found, path: None
    )  # 2 s each
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    rng = random.Random(0)
    prompts = [f"the{text(rng)} {i}" for i in range(40)]
    rows = [
        {"prompt": prompts[i % 40], "responses": [text(rng) for _ in range(3)]} for i in range(50)
    ]
    write_jsonl(files / "many.jsonl", rows)
    write_jsonl(files / "prompts.jsonl", [{"prompt": f"the red{text(rng)}"} for _ in range(6)])
    heldout = [
        {"prompt": f"a{text(rng)}", "chosen": text(rng) + " cat", "rejected": text(rng) + " dog"}
        for _ in range(35)
    ]
    write_jsonl(files / "heldout.jsonl", heldout)
    return shiftrm


def rewards_by_hand(model, rows):
    """The rewards of each group."""
    scorer = Scorer.from_pretrained(model)
    return [
        np.array(scorer([row["prompt"]] * len(row["responses"]), row["responses"])) for row in rows
    ]


def accuracy_by_hand(model, rows):
    scorer = Scorer.from_pretrained(model)
    prompts = [row["prompt"] for row in rows]
    chosen = np.array(scorer(prompts, [row["chosen"] for row in rows]))
    return np.mean(chosen > np.array(scorer(prompts, [row["rejected"] for row in rows])))


def test_before_and_after_are_those_of_the_two_models(shiftrm, monkeypatch):
    monkeypatch.setattr("shiftrm.report.adaptation.write_page", write_page)
    status, output = shiftrm(*GROUPS, "--eval-pairs", "heldout.jsonl")
    assert status == 0
    found = json.loads(Path("out/before_after.json").read_text())
    files_ = {(f["name"], f["model"]): f for f in found["files"]}
    assert list(files_) == [
        (name, model)
        for model in ("before", "after")
        for name in ("held-out pairs", "held-out groups")
    ]
    out = read_jsonl("out/heldout-groups.jsonl")
    pairs = read_jsonl("heldout.jsonl")
    for name, path in (("before", "rm"), ("after", "out")):
        rewards = rewards_by_hand(path, out)
        labels = files_["held-out pairs", name]["labels"]
        assert labels["accuracy"]["value"] == pytest.approx(accuracy_by_hand(path, pairs))
        spread = files_["held-out groups", name]["spread"]
        assert spread["reward_mean"] == pytest.approx(np.mean(np.concatenate(rewards)), abs=1e-5)
        assert spread["reward_std"] == pytest.approx(np.std(np.concatenate(rewards)), rel=1e-3)
    by_file = {c["name"]: c for c in found["comparisons"]}
    variance = [
        files_["held-out groups", m]["spread"]["difference_variance"]["value"]
        for m in ("before", "after")
    ]
    assert by_file["held-out groups"]["variance_factor"] == pytest.approx(variance[1] / variance[0])
    assert found["meta"]["meta_influence"] > 1e-3
    _check_words(output.out, found)


def _check_words(out, found):
    assert f"Before and after: {found['change']['word']}." in out
    assert found["change"]["sentence"] in out
    assert "Adapted on 12 pairs (0 dropped) for 2 steps" in out
    assert "those of 8 of the 40 prompts, were held out to measure on (heldout-groups.jsonl)" in out
    assert "Nothing says whether it orders the responses of held-out groups better" in out
    assert "Models compared on the same rows" in out
    assert "Page: out/before_after.html" in out
    page = Path("out/before_after.html").read_text()
    assert f"What the adaptation did: {found['change']['word']}." in page
    card = Path("out/README.md").read_text()
    for words in ("# Reward model adapted from rm", "Adapted from `rm`", "| groups | `many.jsonl`"):
        assert words in card
    assert found["change"]["sentence"] in card
    assert "Accuracy on labels" in card
    assert "| One standard deviation more … |" in card, "what each model pays for"
    assert "held out to measure on" in card
    assert not WORK.exists()


def test_groups_held_out_are_not_adapted_to(shiftrm, monkeypatch):
    from shiftrm.trainers import training

    seen = []
    plain = training.train_in_work

    def spy(job, groups, *args, **kwargs):
        seen.extend(groups)
        return plain(job, groups, *args, **kwargs)

    monkeypatch.setattr("shiftrm.methods.adapt.train_in_work", spy)
    assert shiftrm(*GROUPS, "--holdout", "0.25")[0] == 0
    out = read_jsonl("out/heldout-groups.jsonl")
    assert not {g["prompt"] for g in out} & {g["prompt"] for g in seen}
    assert len({g["prompt"] for g in out}) == 10
    assert len(out) + len(seen) == 50


def test_the_model_is_what_train_makes_of_the_same_groups(shiftrm):
    assert shiftrm(*GROUPS)[0] == 0
    out = [row["prompt"] for row in read_jsonl("out/heldout-groups.jsonl")]
    rest = [row for row in read_jsonl("many.jsonl") if row["prompt"] not in out]
    write_jsonl("rest.jsonl", rest)
    train = ["train", "--model", "rm", "--pairs", "pairs.jsonl", "--groups", "rest.jsonl"]
    assert shiftrm(*train, "--output", "trained", *QUICK)[0] == 0
    assert weights("out") == weights("trained")
    status, output = shiftrm(
        *GROUPS, "--output", "other", "--eval-groups", "many.jsonl", "--groups", "rest.jsonl"
    )
    assert status == 0
    assert weights("other") == weights("out"), "nothing was held out of the rest"
    assert "32 of the 40 prompts of many.jsonl are among those adapted to as well" in output.out
    assert not Path("other/heldout-groups.jsonl").exists()


def test_another_method_trains_on_the_pairs_alone(shiftrm):
    assert shiftrm(*BASE, "--groups", "many.jsonl", "max_steps=2", "--method", "retrained")[0] == 0
    train = ["train", "--model", "rm", "--pairs", "pairs.jsonl", "--output", "trained"]
    assert shiftrm(*train, "max_steps=2")[0] == 0
    assert weights("out") == weights("trained")
    assert "Trained on the pairs alone, not on" in Path("out/README.md").read_text()


def test_a_method_without_a_meta_step_does_not_speak_of_one(shiftrm):
    status, output = shiftrm(
        *BASE, "--groups", "many.jsonl", "max_steps=2", "--method", "contrast", "--sight-pairs", "0"
    )
    assert status == 0
    out = len(read_jsonl("out/heldout-groups.jsonl"))
    assert f"Adapted to {50 - out} groups of many.jsonl; {out} groups, those of 8" in output.out
    for words in (output.out, Path("out/README.md").read_text()):
        assert "meta step" not in words.lower()


def test_a_users_own_way_to_make_worse_responses_is_tested(shiftrm, monkeypatch):
    Path("own_worse.py").write_text(
        "from shiftrm.data.negatives import Negative\n"
        "CAT = Negative('a cat', 'responses', list, lambda a, _, rng: a._replace(text=' cat'))\n"
    )
    monkeypatch.syspath_prepend(".")
    kinds = "contrast_negatives=[other_prompt,own_worse:CAT]"
    words = ["--groups", "many.jsonl", "max_steps=1", "--method", "contrast", kinds]
    status, output = shiftrm(*BASE, *words, "--sight-pairs", "20")
    assert status == 0
    files_ = json.loads(Path("out/before_after.json").read_text())["files"]
    for file in files_:
        assert [test["kind"] for test in file["sight"]][-1] == "own_worse:CAT"
    assert "a cat" in output.out


@pytest.mark.parametrize(
    ("method", "source", "uses"),
    [
        ("contrast", "pairs", False),
        ("contrast_meta", "pairs", False),
        ("contrast_pairs", "policy", True),
        ("contrast_pairs", None, False),
    ],
)
def test_the_settings_say_whether_the_groups_are_used(shiftrm, method, source, uses):
    words = ["--groups", "many.jsonl", "max_steps=1", "--method", method, "--sight-pairs", "0"]
    setting = [] if source is None else [f"contrast_source={source}"]
    status, output = shiftrm(*BASE, *words, *setting)
    assert status == 0
    used = f"Adapted to {50 - len(read_jsonl('out/heldout-groups.jsonl'))} groups of many.jsonl"
    alone = "Trained on the pairs alone, not on the groups of many.jsonl"
    for text in (output.out, Path("out/README.md").read_text()):
        assert (used in text, alone in text) == (uses, not uses)


def test_training_needs_groups_only_if_the_settings_use_them(shiftrm, caplog):
    words = ["train", "--model", "rm", "--pairs", "pairs.jsonl", "max_steps=1", "--output"]
    pairs_only = ["--method", "contrast", "contrast_source=pairs"]
    assert shiftrm(*words, "alone", *pairs_only)[0] == 0
    assert shiftrm(*words, "named", "--method", "contrast_pairs")[0] == 0
    assert weights("alone") == weights("named")
    assert shiftrm(*words, "given", *pairs_only, "--groups", "many.jsonl")[0] == 0
    assert "many.jsonl: the settings make no use of the groups" in caplog.text
    assert weights("given") == weights("named")
    refusals = {
        ("contrast", ""): "method contrast: needs groups; give --groups",
        ("contrast_pairs", "contrast_source=both"): "contrast_pairs: needs groups; give --groups",
    }
    for (method, setting), message in refusals.items():
        status, output = shiftrm(*words, "no", "--method", method, *filter(None, [setting]))
        assert status == 2
        assert message in output.err
    policy = ["--method", "contrast_pairs", "contrast_source=policy", "--groups", "many.jsonl"]
    status, output = shiftrm(*words, "own", *policy)
    assert status == 0, output.err
    assert shiftrm(*words, "contrast", "--method", "contrast", "--groups", "many.jsonl")[0] == 0
    assert weights("own") == weights("contrast")


def test_a_method_from_outside_the_package(shiftrm, monkeypatch):
    Path("own_methods.py").write_text(
        "from shiftrm.methods.method import Method\n"
        "from shiftrm.trainers.kinds import with_groups\n"
        "LARGE = Method('MetaRM, large steps', 'Large', '#000000', 'o',\n"
        "    needs=frozenset({'pairs', 'groups'}), training=with_groups,\n"
        "    settings={'preset': 'scale_free', 'meta_learning_rate': 2.0})\n"
    )
    monkeypatch.syspath_prepend(".")
    words = [*BASE, "--groups", "many.jsonl", "max_steps=2"]
    assert shiftrm(*words, "--method", "own_methods:LARGE")[0] == 0
    by_hand = ["preset=scale_free", "meta_learning_rate=2.0", "--output", "by-hand"]
    assert shiftrm(*words, *by_hand)[0] == 0
    assert weights("out") == weights("by-hand")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("metrm", "unknown method 'metrm'; did you mean 'metarm'?"),
        ("fixed", "keeps the reward model as it is"),
        ("fresh_labels", "needs new labels"),
        ("active_labels", "needs new labels"),
        ("gold", "there is no model to adapt"),
    ],
)
def test_methods_that_cannot_adapt_are_refused(shiftrm, method, message):
    refused(shiftrm, [*GROUPS, "--method", method], message)


@pytest.mark.parametrize(
    ("method", "left"),
    [
        ("log_sigmoid", "give `shiftrm optimise ppo` reward_shaping=log_sigmoid"),
        ("reference_reset", "the round's first policy as --reference"),
        ("retrained", None),
    ],
)
def test_what_a_method_leaves_to_the_policys_training_is_said(shiftrm, method, left):
    status, output = shiftrm(
        *BASE, "--groups", "many.jsonl", "--method", method, "max_steps=1", "learning_rate=1e-3"
    )
    assert status == 0, output.err
    assert (left is not None) == ("also concerns the policy's training" in output.out)
    assert left is None or left in output.out
    train = ["train", "--model", "rm", "--pairs", "pairs.jsonl", "--output", "trained"]
    status, output = shiftrm(*train, "--method", method, "max_steps=1")
    assert status == 0, output.err
    assert left is None or left in output.out
    assert (left is not None) == ("also concerns the policy's training" in output.out)


def test_the_policy_is_sampled(shiftrm):
    status, output = shiftrm(*POLICY, "seed=3")
    assert status == 0
    rows = read_jsonl("out/groups.jsonl")
    assert [row["prompt"] for row in rows] == [r["prompt"] for r in read_jsonl("prompts.jsonl")]
    assert {len(row["responses"]) for row in rows} == {2}
    out = read_jsonl("out/heldout-groups.jsonl")
    assert (len(out), all(row in rows for row in out)) == (3, True)
    assert "policy, which answered each prompt of prompts.jsonl 2 times" in output.out
    assert "Before and after: unclear." in output.out
    assert "3 prompts; fewer than 30 show nothing" in output.out
    sample = ["sample", "--policy", "policy", "--prompts", "prompts.jsonl", "--responses", 2]
    sample += ["--max-new-tokens", 4, "--seed", 3, "--output", "sampled.jsonl"]
    assert shiftrm(*sample)[0] == 0
    assert read_jsonl("sampled.jsonl") == rows, "as shiftrm sample does"


def test_options_from_a_file(shiftrm, monkeypatch):
    calls = []
    monkeypatch.setattr("shiftrm.methods.adapt.adapt", lambda request, **_: calls.append(request))
    lines = ["model: rm", "pairs: pairs.jsonl", "policy: policy", "prompts: prompts.jsonl"]
    lines += ["responses: 2", "max_new_tokens: 4", "holdout: 0.5", "output: out", "max_steps: 2"]
    Path("c.yaml").write_text("\n".join(lines))
    assert shiftrm("adapt", "--config", "c.yaml", *QUICK)[0] == 0
    assert shiftrm(*POLICY)[0] == 0
    assert calls[0] == calls[1]
    assert calls[0].samples.config.max_new_tokens == 4
    Path("c.yaml").write_text("groups: many.jsonl\neval_groups: {a: x, b: y}\nholdout: 1e-1\n")
    assert shiftrm(*BASE, "--config", "c.yaml", "--eval-pairs", "c=z")[0] == 0
    given = calls[2]
    assert (given.eval_groups, given.eval_pairs) == ({"a": "x", "b": "y"}, {"c": "z"})
    assert (given.holdout, given.samples, given.settings) == (0.1, None, {})


def test_advice_when_the_meta_step_is_too_small(shiftrm):
    status, output = shiftrm(*GROUPS, "preset=paper", "learning_rate=1e-7")
    assert status == 0
    assert "That is too small to matter: set preset=by_effect" in output.out
    assert "scale_free" not in output.out, "its step may be far too large instead"
    assert "Before and after: un" in output.out  # 8 prompts held out: unclear


def test_a_warning_when_the_meta_step_outweighs_the_pairs(shiftrm, caplog):
    settings = ("preset=scale_free", "meta_learning_rate=20", "learning_rate=1e-7")
    status, output = shiftrm(*GROUPS, *settings)
    assert status == 0
    assert re.search(r"WARNING: in one step it was \S+\. Above 1 the meta step, which", output.out)
    assert "set preset=by_effect, which chooses the length of the step" in output.out
    [said] = [r.message for r in caplog.records if "outweighs the pairs" in r.message]
    assert said.startswith("step 0: the meta step changes the gradient by")


def test_interrupted_while_sampling_and_while_training(shiftrm, monkeypatch):
    from shiftrm.models import sampling

    settings = [*POLICY, "--sampling-batch-size", "2", "max_steps=4", "save_steps=2"]
    assert shiftrm(*settings)[0] == 0
    straight, rows = weights("out"), read_jsonl("out/groups.jsonl")
    shutil.rmtree("out")
    plain, calls = sampling.generate, []

    def generate(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(sampling, "generate", generate)
    status, output = shiftrm(*settings)
    assert (status, "to continue: samples and checkpoints are kept" in output.err) == (130, True)
    other = [*settings, "--temperature", "0.5"]
    status, output = shiftrm(*other)
    assert (status, "sampling.config.temperature: 1.0 -> 0.5" in output.err) == (2, True)

    step = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    status, output = shiftrm(*settings)
    assert status == 130
    assert len(calls) == 4, "the first batch was not sampled again"
    assert (WORK / "checkpoint-2" / "complete").exists()
    monkeypatch.setattr(Trainer, "training_step", step)
    status, output = shiftrm(*settings)
    assert (status, "Continuing from" in output.out, len(calls)) == (0, True, 4)
    assert weights("out") == straight
    assert read_jsonl("out/groups.jsonl") == rows
    assert not WORK.exists()


def test_samples_serve_another_training(shiftrm, monkeypatch):
    """Before there is a checkpoint, samples are all there is to lose, and they fit any training."""
    step = Trainer.training_step

    def training_step(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert shiftrm(*POLICY)[0] == 130
    monkeypatch.setattr(Trainer, "training_step", step)
    written = (WORK / "groups.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(
        "shiftrm.methods.adapt.load_policy", lambda path: pytest.fail("sampled once more")
    )
    status, _ = shiftrm(*POLICY, "learning_rate=1e-3")
    assert (status, written > 0) == (0, True)


@pytest.mark.slow
def test_killed_while_sampling_in_a_real_process(files, shiftrm):
    rng = random.Random(1)
    write_jsonl("prompts.jsonl", [{"prompt": f"the{text(rng)}"} for _ in range(60)])
    command = [*POLICY, "--sampling-batch-size", "1", "--max-new-tokens", "20"]
    process = start("shiftrm", *command, cwd=files)
    partial, deadline = WORK / "groups.jsonl.partial", time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, (files / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = partial.read_bytes().split(b"\n")[1:5]
    assert not Path("out").exists()
    template = Path("policy/chat_template.jinja")
    written = template.read_text()
    template.write_text(written + " ")  # the rest would be another policy's
    assert main(command) == 2
    template.write_text(written)
    assert main(command) == 0
    rows = Path("out/groups.jsonl").read_bytes().split(b"\n")
    assert (rows[:4], len(rows)) == (left, 61)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --groups or --policy with --prompts; neither is given"),
        (["--policy", "policy"], "--policy without --prompts"),
        (["--prompts", "prompts.jsonl"], "--prompts without --policy"),
        (
            ["--groups", "many.jsonl", "--responses", "3"],
            "--responses needs --policy, which is missing",
        ),
        (["--groups", "none.jsonl"], "none.jsonl: no such file"),
        (["--groups", "pairs.jsonl"], "pairs.jsonl: holds labelled pairs, not groups"),
        (["--groups", "single.jsonl"], "single.jsonl:1: the group has 1 response(s)"),
        (["--groups", "few.jsonl"], "few.jsonl: --holdout 0.2 of 3 prompts holds out 1"),
        (["--groups", "many.jsonl", "--holdout", "0.99"], "holds out 40 and leaves 0"),
        (["--groups", "many.jsonl", "--holdout", "1.5"], "--holdout is 1.5; it must lie between"),
        (["--groups", "many.jsonl", "--holdout", "x"], "--holdout is 'x'; expected a number"),
        (
            ["--groups", "many.jsonl", "--holdout", "0.5", "--eval-groups", "groups.jsonl"],
            "--holdout and --eval-groups: give one",
        ),
        (["--groups", "many.jsonl", "--eval-groups", "pairs.jsonl"], "give them as --eval-pairs"),
        (["--groups", "many.jsonl", "--model", "policy"], "policy: has no score head"),
        (["--groups", "many.jsonl", "--model", "none"], "none: no such folder"),
        (["--groups", "many.jsonl", "--model", "lora"], "lora: is an adapter, which would stay"),
        (["--groups", "many.jsonl", "--output", "rm"], "rm: already there and not empty"),
        (["--groups", "many.jsonl", "hold_out=0.5"], "'hold_out'; did you mean 'holdout'?"),
        (["--groups", "many.jsonl", "zzzzzzz=1"], "`shiftrm adapt --help` lists"),
        (["--groups", "long.jsonl"], "long.jsonl: every row is longer than the model's context"),
    ],
)
def test_bad_options(shiftrm, arguments, message):
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text("{}")
    write_jsonl("single.jsonl", [{"prompt": "the", "responses": [" cat"]}])
    write_jsonl("few.jsonl", [{"prompt": w, "responses": [" cat", " dog"]} for w in "abc"])
    long = [" cat" * 70, " dog" * 70]
    write_jsonl("long.jsonl", [{"prompt": f"a {i}", "responses": long} for i in range(20)])
    refused(shiftrm, [*BASE, *arguments], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--groups", "many.jsonl"],
            "give either --groups or --policy with --prompts; both are given",
        ),
        (["--prompts", "none.jsonl"], "none.jsonl: no such file"),
        (["--responses", "1"], "--responses is 1; a group needs at least two responses"),
        (["--responses", "2.5"], "--responses is '2.5'; expected a whole number"),
        (["--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["--sampling-batch-size", "0"], "--sampling-batch-size is 0; it must be at least 1"),
        (["--policy", "none"], "none: cannot be loaded as a causal language model"),
        (["--policy", "rm"], "rm: not a causal language model"),
        (["--max-new-tokens", "63"], "prompts.jsonl:1: the prompt has"),
    ],
)
def test_bad_policies(shiftrm, arguments, message):
    refused(shiftrm, [*POLICY, *arguments], message)


def test_several_processes_do_not_sample(shiftrm, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        shiftrm, POLICY, "--policy: sampling needs a single process; call `shiftrm sample` first"
    )


MORE = ["--groups", "many.jsonl", "max_steps=1", "save_strategy=no"]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("ocrm", ["--policy", "policy", "--reference", "policy"]),
        ("policy_init", ["--policy", "policy"]),
        ("self_labelled", []),
        ("bsr", []),
    ],
)
def test_methods_that_use_other_models(shiftrm, method, given):
    status, output = shiftrm(*BASE, *MORE, "--method", method, *given)
    assert status == 0, output.err
    found = json.loads(Path("out/before_after.json").read_text())
    assert found["model"] == "rm", "before is the reward model, wherever training starts"
    card = Path("out/README.md").read_text()
    start = "policy" if method == "policy_init" else "rm"
    assert f"# Reward model adapted from {start}" in card
    assert ("| reference | `policy` | - |" in card) == (method == "ocrm")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("ocrm", ["--reference", "policy"], "needs today's policy; give --policy"),
        ("ocrm", ["--policy", "policy"], "needs the SFT policy; give --reference"),
        ("ocrm", ["--policy", "none", "--reference", "policy"], "none: no such folder"),
        ("policy_init", [], "starts from today's policy; give --policy"),
        ("retrained", ["--policy", "policy"], "uses no policy; leave out --policy"),
        ("bsr", ["--reference", "policy"], "uses no reference; leave out --reference"),
        ("grm", [], "start from a policy, `shiftrm train --method grm --model POLICY`"),
        ("retrained", ["--policy", "policy", "--responses", "3"], "--responses needs --prompts"),
    ],
)
def test_models_that_a_method_lacks_or_does_not_use(shiftrm, method, given, message):
    refused(shiftrm, [*BASE, *MORE, "--method", method, *given], message)


def test_grm_is_refused_before_anything_is_sampled(shiftrm, monkeypatch):
    monkeypatch.setattr(
        "shiftrm.methods.adapt.load_policy", lambda path: pytest.fail("policy loaded")
    )
    sampled = [*BASE, "--policy", "policy", "--prompts", "prompts.jsonl", "--method", "grm"]
    refused(shiftrm, sampled, "rm: has no language-model head (lm_head.weight)")
