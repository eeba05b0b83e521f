"""What methods are given besides pairs and groups: by hand, in a recipe, and by `adapt`."""

import json
from pathlib import Path

import pytest

from shiftrm.errors import UserError
from shiftrm.methods.inputs import with_models
from shiftrm.methods.method import Method
from shiftrm.models.loading import checkpoint_fingerprint
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.jobs import Made, TrainReward, from_plain, inputs_of, plain
from shiftrm.pipeline.plan import Planner, plan
from shiftrm.pipeline.plan_data import sources
from shiftrm.pipeline.plan_rewards import Before
from shiftrm.pipeline.run import read_recipe
from shiftrm.trainers.kinds import Training
from shiftrm.trainers.training import TrainingRequest

SOURCE = """
from shiftrm.methods.method import Method
from shiftrm.trainers.kinds import Training
from shiftrm.trainers.reward import RewardConfig, RewardTrainer

SEEN = []

class Takes(RewardTrainer):
    def __init__(self, model, args, *, policy, reference, reward, **more):
        SEEN.append((model, policy, reference, reward))
        super().__init__(model, args, **more)

def training():
    return Training(RewardConfig, Takes, frozenset({"policy", "reward"}))

needs = frozenset({"pairs", "policy", "reward"})
MODELS = Method("Own", "Own", "#000000", "o", needs=needs, training=training)
ON_POLICY = Method("Own", "Own", "#000000", "o", needs=needs, training=training, start="policy")
ON_REWARD = Method("Own", "Own", "#000000", "o", needs=needs, training=training, start="reward")
"""


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    (tmp_path / "takes_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import takes_models

    takes_models.SEEN.clear()
    return takes_models


def test_plain_data_of_a_job_without_models_is_as_it_was():
    job = TrainReward("m", "p", groups="g", adaptation="metarm")
    assert set(plain(job)) == {
        *("kind", "model", "pairs", "eval_pairs", "groups", "adaptation", "settings", "told"),
    }
    assert not {"--policy", "--reference", "--reward"} & set(job.command("out"))


def test_a_job_keeps_its_models_in_a_file_and_in_words():
    models = {"policy": Made("p"), "reference": "sft", "reward": Made("r")}
    job = TrainReward("m", "d", adaptation="x:Y", **models)
    assert from_plain(json.loads(json.dumps(plain(job)))) == job
    assert inputs_of(job) == ("p", "r")
    words = " ".join(job.command("out"))
    assert "--policy p/model --reference sft --reward r/model" in words


@pytest.mark.parametrize(
    ("takes", "given", "message"),
    [
        ({"policy"}, {"reference": "b"}, "method m: needs today's policy; give --policy"),
        ({"policy"}, {"policy": "a"}, "method m: needs the SFT policy; give --reference"),
        ({"reward"}, {}, "method m: needs the last round's reward model; give --reward"),
        ({"groups"}, {}, "method m: needs groups; give --groups"),
        (set(), {"reward": "a"}, "method m: uses no reward; leave out --reward"),
        ({"policy"}, {"policy": "a", "reference": "b", "groups": "c"}, "uses no groups; leave out"),
    ],
)
def test_missing_and_unused_inputs_are_named(takes, given, message):
    with pytest.raises(UserError, match=message):
        Training(object, object, frozenset(takes)).check("m", given)
    Training(object, object, frozenset({"policy", "reward"})).check(
        "m", {"policy": "a", "reference": "b", "reward": "c", "groups": None}
    )


def test_a_round_starts_where_the_method_says(own_methods):
    arms = ", ".join(
        f"{name}: {{reward: 'takes_models:{attribute}'}}"
        for name, attribute in (("sft1", "MODELS"), ("policy1", "ON_POLICY"), ("re", "ON_REWARD"))
    )
    found = {s.name: s for s in plan(read_recipe("gold_demo", ["rounds=2", f"methods={{{arms}}}"]))}

    def inputs(name, number):
        job = job_of(found[f"methods/{name}/round-{number}/reward_model"])
        return [str(getattr(job, f)) for f in ("model", "policy", "reference", "reward")]

    first = ["sft/model", "sft/model", "reward_model/model"]
    assert inputs("sft1", 1) == ["sft/model", *first]
    assert inputs("policy1", 1) == ["sft/model", *first]
    assert inputs("re", 1) == ["reward_model/model", *first]
    for name in ("sft1", "policy1", "re"):
        policy = f"methods/{name}/round-1/policy/model"
        reward = f"methods/{name}/round-1/reward_model/model"
        start = {"sft1": "sft/model", "policy1": policy, "re": reward}[name]
        assert inputs(name, 2) == [start, policy, "sft/model", reward]


def test_arms_can_share_a_first_round():
    recipe = read_recipe("gold_demo", ["methods=[retrained, fresh_labels, fixed]", "rounds=2"])
    planner = Planner(recipe, sources(recipe))
    first = Before(None, "responses", Made("reward_model"), planner.inputs.pairs)
    shared, after = planner.round("retrained", recipe.methods["retrained"], 1, first)
    here = "methods/retrained/round-1"
    assert after == Before(
        f"{here}/policy", f"{here}/responses", Made(f"{here}/reward_model"), planner.inputs.pairs
    )
    stages, end = planner.round("fresh_labels", recipe.methods["fresh_labels"], 2, after)
    found = {stage.name: stage for stage in stages}
    two = "methods/fresh_labels/round-2"
    assert str(job_of(found[f"{two}/samples"]).policy) == f"{here}/policy/model"
    assert found[f"{two}/labels"].needs == (f"{two}/samples", "pairs")
    assert str(job_of(found[f"{two}/policy"]).policy) == f"{here}/policy/model"
    assert found[f"{two}/evaluation"].settings["inputs"]["before"]["stage"] == f"{here}/responses"
    assert end.pairs == Made(f"{two}/labels", "pairs.jsonl")
    _, fixed = planner.round("fixed", recipe.methods["fixed"], 2, after)
    assert fixed.policy == "methods/fixed/round-2/policy"
    assert {stage.name for stage in shared} <= {stage.name for stage in planner.stages()}


def request(tmp_path, **more):
    return TrainingRequest("rm", pairs="p", output=tmp_path / "out", settings={}, **more)


def chosen(found):
    return found.model, found.policy, found.reference, found.reward


def test_adapt_hands_over_what_a_method_uses(tmp_path):
    def fit(takes, start="sft", sampled=None, **given):
        method = Method("M", "M", "#000000", "o", start=start)
        training = Training(object, object, frozenset(takes))
        return chosen(
            with_models(request(tmp_path, **given), "m", method, training, sampled=sampled)
        )

    assert fit(()) == ("rm", None, None, None)
    assert fit((), sampled="pi", policy="pi") == ("rm", None, None, None)
    assert fit((), "policy", policy="pi", groups="g") == ("pi", None, None, None)
    assert fit((), "policy", sampled="pi", policy="pi") == ("pi", None, None, None)
    assert fit({"groups"}, groups="g") == ("rm", None, None, None)
    both = {"policy": "pi", "reference": "sft"}
    assert fit({"policy"}, groups="g", **both) == ("rm", "pi", "sft", None)
    assert fit({"policy", "reward"}, sampled="pi", **both) == ("rm", "pi", "sft", "rm")
    for takes, start, given, message in [
        ((), "policy", {"groups": "g"}, "method m: starts from today's policy; give --policy"),
        ((), "sft", {"groups": "g", "policy": "pi"}, "uses no policy; leave out --policy"),
        ((), "sft", {"groups": "g", "reference": "pi"}, "uses no reference; leave out --reference"),
        ({"policy"}, "sft", {"groups": "g", "policy": "pi"}, "SFT policy; give --reference"),
    ]:
        with pytest.raises(UserError, match=message):
            fit(takes, start, **given)


def test_a_checkpoints_fingerprint_is_of_weights_configuration_and_tokenizer(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"c" if name == "c" else b"w")
        (tmp_path / name / "README.md").write_text(name)
    one, two, other = (checkpoint_fingerprint(tmp_path / name) for name in "abc")
    assert one == two != other
    seen = {one}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt",
                 "vocab.json", "spiece.model", "generation_config.json"):  # fmt: skip
        (tmp_path / "a" / name).write_text(name)
        seen.add(checkpoint_fingerprint(tmp_path / "a"))
    assert len(seen) == 8
    before = checkpoint_fingerprint(tmp_path / "a")
    for name in ("training_log.jsonl", "training_args.bin"):
        (tmp_path / "a" / name).write_text("{}")
    (tmp_path / "a" / "tokenizer").mkdir()
    assert checkpoint_fingerprint(tmp_path / "a") == before
    adapter = {"base_model_name_or_path": str(tmp_path / "b"), "lora_alpha": 8}
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(adapter))
    found = [checkpoint_fingerprint(tmp_path / "c")]
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps({**adapter, "lora_alpha": 800}))
    found.append(checkpoint_fingerprint(tmp_path / "c"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"another base")
    found.append(checkpoint_fingerprint(tmp_path / "c"))
    assert len({*found}) == 3
    assert checkpoint_fingerprint("owner/name") == ""


def test_models_reach_the_trainer_the_card_and_the_record(own_methods, tmp_path, monkeypatch):
    from shiftrm.trainers import training

    records = []
    hold = training.work_folder.hold_work

    def hold_work(work, run):
        records.append(run)
        return hold(work, run)

    monkeypatch.setattr(training.work_folder, "hold_work", hold_work)
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    settings = {"max_steps": 1, "save_strategy": "no"}
    job = TrainReward(
        "sft", "pairs.jsonl", adaptation="takes_models:MODELS",
        policy="sft", reference="sft", reward="sft", settings=settings,
    )  # fmt: skip
    job.run(Path("out"))
    assert own_methods.SEEN == [("sft", "sft", "sft", "sft")]
    sha = checkpoint_fingerprint("sft")
    assert records[0]["data"]["policy"] == {"source": "sft", "sha256": sha[:16]}
    card = Path("out/README.md").read_text()
    assert f"| reward | `sft` | - | `{sha}` |" in card
    assert "of a model that of its configuration, tokenizer and weights" in card
    TrainReward("sft", "pairs.jsonl", settings=settings).run(Path("plain"))
    assert list(records[1]["data"]) == ["pairs"]
    assert "of a model that of" not in Path("plain/README.md").read_text()


def make_files(folder):
    from shiftrm.files import write_jsonl
    from shiftrm.world.build import WorldConfig, write_base_model

    write_base_model(folder / "sft", WorldConfig(layers=1))
    pair = {"prompt": "describe the garden :", "chosen": " roses", "rejected": " waves"}
    write_jsonl(folder / "pairs.jsonl", [pair] * 2)
