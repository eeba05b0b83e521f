"""Several reward models as one, by the commands: trained, continued, scored, adapted, optimised."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.methods.method import METHODS, Method
from shiftrm.methods.registered import ensembles
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.kinds import COMBINE, Training
from shiftrm.trainers.members import COMBINATIONS, member_seed
from shiftrm.trainers.scored_pairs import measure_pairs
from tests.cli.conftest import refused
from tests.models.test_checkpoints import classifier


def method(combine, training=ensembles.ensemble, members=2, **settings):
    needs = frozenset({"pairs"})
    more = {"needs": needs, "training": training, "settings": settings}
    return Method(combine, combine, "#000000", "o", **more, members=members, combine=combine)


MEAN, MIN, WARM = method("mean"), method("min"), method("warm")
VARIANCE = method("variance", ensemble_penalty=0.25)
LAPLACE = method("laplace", ensembles.laplace, members=1)

TRAIN = ["train", "--model", "policy", "--pairs", "pairs.jsonl", "--eval-pairs", "pairs.jsonl"]
QUICK = ["max_steps=4", "save_steps=2", "logging_steps=1", "learning_rate=1e-2", "seed=7"]
QUICK += ["per_device_train_batch_size=4"]
WORK = Path(".out.work")


def train(shiftrm, name, *words, output="out"):
    chosen = ["--method", f"tests.cli.test_ensembles:{name}"] if name.isupper() else []
    return shiftrm(*TRAIN, *chosen, "--output", output, *QUICK, *words)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_the_registered_methods_train_four_or_one():
    for name in ("mean", "min", "variance"):
        assert METHODS.get(f"ensemble_{name}").members == 4
        assert METHODS.get(f"ensemble_{name}").combine == name
    assert METHODS.get("warm").classes().members == 4
    assert METHODS.get("laplace").members == 1
    assert set(COMBINE) == set(COMBINATIONS)


@pytest.mark.parametrize(
    ("members", "combine"), [(4, None), (1, "mean"), (1, "warm"), (2, "laplace"), (0, None)]
)
def test_members_need_a_way_to_combine_them(members, combine):
    with pytest.raises(UserError, match=f"members is {members} and combine is {combine!r}"):
        Training(dict, dict, members=members, combine=combine)


def test_an_unknown_way_to_combine_is_refused_before_training():
    with pytest.raises(UserError, match="combine is 'mena'; did you mean 'mean'"):
        Training(dict, dict, members=2, combine="mena")


def test_seeds_of_members():
    seeds = [member_seed(7, k) for k in range(4)]
    assert seeds[0] == 7
    assert len({*seeds, *(member_seed(8, k) for k in range(4))}) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("name", ["MEAN", "MIN", "VARIANCE"])
def test_an_ensemble_by_its_members(shiftrm, name):
    assert train(shiftrm, "retrained", output="one")[0] == 0
    status, output = train(shiftrm, name)
    assert (status, WORK.exists()) == (0, False), output.err
    assert "An ensemble of 2 reward models" in output.out
    assert "An ensemble of 2 reward models" in Path("out/README.md").read_text()
    assert weights("out/member-0") == weights("one")
    other = ["seed=" + str(member_seed(7, 1))]
    assert train(shiftrm, "retrained", *other, output="two")[0] == 0
    assert weights("out/member-1") == weights("two")
    assert not list(Path("out").rglob("complete"))
    logs = [read_jsonl(f"{folder}/training_log.jsonl") for folder in ("one", "two", "out")]
    for one, two, both in zip(*logs, strict=True):
        assert both["step"] == one["step"]
        for key in ("loss", "eval_accuracy"):
            if key in one:
                assert both[key] == pytest.approx((one[key] + two[key]) / 2)

    pairs = read_jsonl("pairs.jsonl")
    scales = []
    for folder in ("one", "two"):
        scorer = Scorer.from_pretrained(folder)
        found = [
            r
            for side in ("chosen", "rejected")
            for r in scorer([p["prompt"] for p in pairs], [p[side] for p in pairs])
        ]
        mean = sum(found) / len(found)
        std = (sum((r - mean) ** 2 for r in found) / (len(found) - 1)) ** 0.5
        scales.append((mean, std))
    said = json.loads(Path("out/ensemble.json").read_text())
    for member, (mean, std) in zip(said["members"], scales, strict=True):
        assert (member["mean"], member["std"]) == pytest.approx((mean, std), rel=1e-4, abs=1e-6)

    rewards = {}
    for model in ("one", "two", "out"):
        made = f"{model}.jsonl"
        assert shiftrm("score --data groups.jsonl", "--model", model, "--output", made)[0] == 0
        rewards[model] = [r for row in read_jsonl(made) for r in row["rewards"]]
    for one, two, both in zip(rewards["one"], rewards["two"], rewards["out"], strict=True):
        z = [(r - mean) / std for r, (mean, std) in zip((one, two), scales, strict=True)]
        value = {
            "MEAN": sum(z) / 2,
            "MIN": min(z),
            "VARIANCE": sum(z) / 2 - 0.25 * (z[0] - z[1]) ** 2 / 4,
        }[name]
        assert both == pytest.approx(value * (scales[0][1] + scales[1][1]) / 2, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["MEAN", "LAPLACE"])
def test_interrupted_after_training_makes_no_further_step(shiftrm, name, unpublished):
    """The last member is told again from its checkpoint, in the middle of its second epoch."""
    rarely = ["logging_steps=100"]  # then the loss of a run is known while it trains only
    straight = train(shiftrm, name, *rarely, output="straight")[1].out
    unpublished(lambda: train(shiftrm, name, *rarely))
    again = train(shiftrm, name, *rarely)[1].out
    files = [sorted(Path(f).rglob("*.safetensors")) for f in ("out", "straight")]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    if name == "MEAN":  # a member's loss is kept
        losses = [re.findall(r"mean loss [\d.]+", said) for said in (straight, again)]
        assert losses[0] == losses[1] != []


def test_warm_is_the_mean_of_models_of_two_orders(shiftrm):
    assert train(shiftrm, "WARM")[0] == 0
    assert train(shiftrm, "retrained", output="one")[0] == 0
    order = f"data_seed={member_seed(7, 1)}"
    assert train(shiftrm, "retrained", order, output="two")[0] == 0
    one, two, both = (load_file(f"{f}/model.safetensors") for f in ("one", "two", "out"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    assert not (Path("out") / "ensemble.json").exists()
    assert train(shiftrm, "retrained", "--model", "out", output="next")[0] == 0  # ordinary


@pytest.mark.parametrize(
    "extra", [{"margin": 5.0, "weight": 2.0}, {"weight": 0.5}, {"margin": -1.0}]
)
def test_the_loss_on_held_out_pairs_is_the_trainers(shiftrm, extra):
    """By hand from the rewards that are scored, and equal to the trainer's for one model."""
    rows = read_jsonl("pairs.jsonl")
    write_jsonl("pairs.jsonl", [{**row, **extra} for row in rows])
    more = ["center_rewards_coefficient=0.1"]
    assert train(shiftrm, "retrained", *more, output="one")[0] == 0
    trainers = read_jsonl("one/training_log.jsonl")[-1]["eval_loss"]
    found = {}
    for folder, given in (("one", []), ("out", ["laplace_penalty=2"])):
        if folder == "out":
            assert train(shiftrm, "LAPLACE", *more, *given)[0] == 0
        scorer = Scorer.from_pretrained(folder)
        job = SimpleNamespace(
            tables={"eval": read_jsonl("pairs.jsonl")},
            finished=Path(folder),
            chosen=SimpleNamespace(
                args=SimpleNamespace(
                    max_length=None, per_device_eval_batch_size=8, center_rewards_coefficient=0.1
                )
            ),
        )
        found[folder] = measure_pairs(job)[""]["loss"]
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (
            torch.tensor(scorer(prompts, [row[side] for row in rows])).double()
            for side in ("chosen", "rejected")
        )
        loss = torch.log1p(torch.exp(-(chosen - rejected - extra.get("margin", 0.0))))
        loss = extra.get("weight", 1.0) * (loss + 0.1 * (chosen + rejected) ** 2)
        assert found[folder] == pytest.approx(float(loss.mean()), rel=1e-5)
    assert found["one"] == pytest.approx(trainers, rel=1e-5)


def test_laplace_lowers_the_reward_of_the_same_model(shiftrm):
    assert train(shiftrm, "retrained", output="one")[0] == 0
    status, output = train(shiftrm, "LAPLACE")
    assert status == 0, output.err
    assert "The reward is the logit minus 3 posterior standard deviations" in output.out
    assert weights("out") == weights("one")
    rewards = [
        Scorer.from_pretrained(folder)(["the red cat"], [" flies a fish"])[0]
        for folder in ("one", "out")
    ]
    assert rewards[1] < rewards[0]
    said = json.loads(Path("out/laplace.json").read_text())
    assert (said["penalty"], said["prior"], said["pairs"]) == (3.0, 1.0, 12)

    again = ["--pairs", "pairs.jsonl", "--output", "next", "--model"]
    copied = "out: lowers its rewards by a posterior (laplace.json), which training would neither"
    for command in (["train"], ["train", "--method", "laplace"], ["adapt --groups groups.jsonl"]):
        refused(shiftrm, [*" ".join(command).split(), *again, "out"], copied)
    left_out = shutil.ignore_patterns("laplace.*")
    shutil.copytree("out", "plain", ignore=left_out)  # as the message says
    assert shiftrm("train", *again, "plain", *QUICK)[0] == 0


def test_laplace_needs_a_linear_head_and_says_so_before_training(shiftrm, tokenizer, stopping):
    stopping(1, AssertionError("trained"))
    classifier("roberta", vocab_size=len(tokenizer)).save_pretrained("policy")
    message = (
        "laplace: the score head of RobertaForSequenceClassification is a "
        "RobertaClassificationHead, and a posterior needs one linear layer; choose another method"
    )
    status, output = train(shiftrm, "LAPLACE")
    assert (status, output.err.count("\n"), WORK.exists()) == (2, 1, False)
    assert message in output.err
    adapt = "adapt --model policy --pairs pairs.jsonl --policy policy --prompts prompts.jsonl"
    refused(shiftrm, f"{adapt} --method laplace --output out --eval-groups groups.jsonl", message)


def test_laplace_takes_a_head_with_an_adapter(shiftrm):
    lora = ["use_peft=true", "lora_r=2", "lora_target_modules=[q_proj, score]"]
    status, output = train(shiftrm, "LAPLACE", *lora)
    assert (status, Path("out/laplace.json").exists()) == (0, True), output.err


@pytest.mark.parametrize("stop", ["in the second", "before the second", "in the first"])
def test_killed_and_continued_is_as_if_never_killed(shiftrm, monkeypatch, stop):
    assert train(shiftrm, "MEAN", output="straight")[0] == 0
    steps, plain, begin = [], Trainer.training_step, Trainer.train

    def training_step(self, *args, **kwargs):
        steps.append((self.args.output_dir[-1], self.state.global_step))
        if stop != "" and steps[-1] == {"in the second": ("1", 3), "in the first": ("0", 3)}.get(
            stop
        ):
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    def train_(self, *args, **kwargs):
        if stop == "before the second" and self.args.output_dir.endswith("1"):
            raise KeyboardInterrupt
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "train", train_)
    assert train(shiftrm, "MEAN")[0] == 130
    assert not Path("out").exists()
    status, output = train(shiftrm, "MIN")
    assert (status, output.err.count("\n")) == (2, 1)
    assert "(combine: mean -> min)" in output.err
    first, stop = stop, ""
    steps.clear()
    status, output = train(shiftrm, "MEAN")
    assert status == 0, output.err
    both = [("0", 2), ("0", 3), *(("1", k) for k in range(4))]
    assert steps == {"in the first": both, "before the second": both[2:]}.get(first, both[4:])
    for name in ("member-0", "member-1"):
        assert weights(f"out/{name}") == weights(f"straight/{name}")
    assert json.loads(Path("out/ensemble.json").read_text()) == json.loads(
        Path("straight/ensemble.json").read_text()
    )
    straight, out = (read_jsonl(f"{f}/training_log.jsonl") for f in ("straight", "out"))
    assert [row["loss"] for row in out if "loss" in row] == pytest.approx(
        [row["loss"] for row in straight if "loss" in row]
    )


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("VARIANCE", "ensemble_penalty=-1", "ensemble_penalty is -1.0; it must be at least 0"),
        ("LAPLACE", "laplace_prior=0", "laplace_prior is 0.0; it must be above 0"),
        ("LAPLACE", "laplace_penalty=-2", "laplace_penalty is -2.0; it must be at least 0"),
        ("LAPLACE", "laplace_penality=2", "did you mean 'laplace_penalty'"),
        ("retrained", "laplace_penalty=2", "unknown setting 'laplace_penalty'"),
    ],
)
def test_bad_settings_are_one_line(shiftrm, name, setting, message):
    status, output = train(shiftrm, name, setting)
    assert (status, output.err.count("\n")) == (2, 1)
    assert message in output.err


def test_every_command_reads_an_ensemble(shiftrm, files):
    assert train(shiftrm, "MEAN")[0] == 0
    refused(
        shiftrm,
        "train --model out --pairs pairs.jsonl --output next",
        "out: is an ensemble of reward models, and training starts from one model; give one of its "
        "members, such as out/member-0",
    )
    adapt = ["adapt", "--pairs", "pairs.jsonl", "--output", "next", "--groups", "groups.jsonl"]
    refused(shiftrm, [*adapt, "--model", "out"], "is an ensemble of reward models")
    words = ["diagnose", "--model", "out", "--data", "groups.jsonl", "pairs.jsonl"]
    assert shiftrm(*words, "--json", "numbers.json")[0] == 0
    assert json.loads(Path("numbers.json").read_text())
    write_jsonl("answers.jsonl", [{"prompt": "a", "responses": [" runs", " the cat"]}])
    words = ["evaluate", "best-of-n", "--samples", "answers.jsonl", "--proxy", "out"]
    assert shiftrm(*words, "--gold", "out", "--output", "best.json")[0] == 0
    bench = [
        {"prompt": "a", "chosen": " runs", "rejected": " cat", "subset": "alpacaeval-easy", "id": 1}
    ]
    write_jsonl("bench.jsonl", bench)
    assert shiftrm("evaluate rewardbench --model out --data bench.jsonl")[0] == 0
    ppo = ["optimise", "ppo", "--policy", "policy", "--reference", "policy", "--reward", "out"]
    ppo += ["--prompts", "prompts.jsonl", "--watch", "out", "--output", "moved"]
    ppo += ["steps=1", "prompts_per_step=2", "rollouts_per_prompt=2", "max_new_tokens=4"]
    status, output = shiftrm(*ppo)
    assert status == 0, output.err
    [row] = [row for row in read_jsonl("moved/training_log.jsonl") if "gold_mean" in row]
    assert math.isfinite(row["gold_mean"])
    shutil.rmtree("out/member-1")
    for words in (ppo, ["score", "--model", "out", "--data", "groups.jsonl"]):
        words = [*words, "--output", "again"]
        status, output = shiftrm(*words)
        assert (status, output.err.count("\n")) == (2, 1)
        assert "out: is an ensemble without its member 'member-1'" in output.err


def test_adapt_measures_the_ensemble(shiftrm, files, reward_model, tokenizer, monkeypatch):
    monkeypatch.setattr("shiftrm.report.adaptation.write_page", lambda found, path: None)
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    words = ["adapt", "--model", "rm", "--pairs", "pairs.jsonl", "--groups", "groups.jsonl"]
    words += ["--eval-groups", "groups.jsonl", "--method", "tests.cli.test_ensembles:MEAN"]
    status, output = shiftrm(*words, "--output", "out", *QUICK)
    assert status == 0, output.err
    assert "An ensemble of 2 reward models" in Path("out/README.md").read_text()
    assert len(json.loads(Path("out/ensemble.json").read_text())["members"]) == 2
    assert isinstance(Scorer.from_pretrained("out")(["a"], [" cat"])[0], float)
