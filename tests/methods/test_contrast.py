"""Prompt contrast: its pairs by definition, and a reward model that learns to read the prompt."""

import random
from types import SimpleNamespace

import pytest

from shiftrm.data.negatives import negative_pairs
from shiftrm.data.pairs import COLUMNS, FINISHED
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.methods.method import METHODS
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.job_checks import job_of
from shiftrm.pipeline.jobs import TrainReward
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.prepare import join_groups
from shiftrm.pipeline.run import read_recipe
from shiftrm.trainers.contrast_rows import as_groups, contrast_rows
from shiftrm.trainers.pair_batches import encode_pair, table
from shiftrm.trainers.settings import resolve
from shiftrm.world.build import WorldConfig, label_pairs, write_base_model
from shiftrm.world.language import demonstration

GROUPS = [
    {"prompt": "a", "responses": ["x1", "x2222"], "finished": [True, False]},
    {"prompt": "b", "responses": ["y", "y3333"], "finished": [True, True]},
    {"prompt": " a ", "responses": ["z1"], "finished": [True]},  # the same prompt as the first
    {"prompt": "b", "responses": ["x1", "  "], "finished": [True, True]},
]
OWN = {"a": {"x1", "x2222", "z1"}, "b": {"y", "y3333", "x1"}}
ENDED = {"x2222": False}


@pytest.mark.parametrize("matching", ["random", "length"])
def test_pairs_prefer_a_response_to_the_own_prompt(matching):
    pairs = negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=1)
    assert len(pairs) == 300
    for pair in pairs:
        prompt = pair["prompt"].strip()
        other = {"a": "b", "b": "a"}[prompt]
        assert pair["chosen"] in OWN[prompt]
        assert pair["rejected"] in OWN[other]
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen_finished"] == ENDED.get(pair["chosen"], True)
        assert pair["rejected_finished"] == ENDED.get(pair["rejected"], True)
    assert {pair["chosen"] for pair in pairs} == OWN["a"] | OWN["b"]
    assert pairs == negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=1)
    assert pairs != negative_pairs(GROUPS, "other_prompt", 300, matching=matching, seed=2)


def test_matching_by_length_takes_the_nearest_length():
    gaps = {
        matching: sum(
            abs(len(p["chosen"]) - len(p["rejected"]))
            for p in negative_pairs(GROUPS, "other_prompt", 300, matching=matching)
        )
        for matching in ("random", "length")
    }
    # Of 16 draws nearly always one has the nearest length: 5 for 5, and 1 or 2 for 1 or 2.
    assert gaps["length"] < 0.4 * gaps["random"]


@pytest.mark.parametrize(
    "groups",
    [
        [{"prompt": "a", "responses": ["x", "y"]}, {"prompt": "a ", "responses": ["z"]}],
        [{"prompt": "a", "responses": ["x", "x"]}, {"prompt": "b", "responses": ["x", " "]}],
    ],
)
def test_one_prompt_or_one_response_cannot_be_contrasted(groups):
    with pytest.raises(UserError, match="at least two prompts"):
        negative_pairs(groups, "other_prompt", 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrast_share": 1.0}, "contrast_share is 1.0; it must lie in"),
        ({"contrast_matching": "lenght"}, "did you mean 'length'"),
        ({"contrast_source": "pair"}, "contrast_source is 'pair'; did you mean 'pairs'"),
        ({"contrast_negatives": ["cut", "shufled"]}, "did you mean 'shuffled'"),
        ({"contrast_negatives": []}, "contrast_negatives is empty"),
        ({"contrast_negatives": ["cut", "other_prompt", "cut"]}, "cut, other_prompt, cut.; name"),
        ({"contrast_negatives": ["cut"], "contrast_matching": "hard"}, "but cut is made without"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        METHODS.get("contrast").training().config(output_dir=str(tmp_path), **settings)


def test_a_meta_objective_must_read_which_response_is_better(tmp_path):
    config_of = METHODS.get("contrast_meta").training().config
    with pytest.raises(UserError, match="meta_objective is 'difference', which does not read"):
        config_of(output_dir=str(tmp_path), meta_objective="difference")
    for name in ("ordered", "ordered_difference"):
        assert config_of(output_dir=str(tmp_path), meta_objective=name).meta_objective == name
    mixed = {"contrast_negatives": ["cut", "other_prompt"], "contrast_matching": "hard"}
    assert config_of(output_dir=str(tmp_path), **mixed).contrast_matching == "hard"


def pair_rows(count=6, **more):
    return [
        {"prompt": f"q{n}", "chosen": f"c{n} long one", "rejected": f"d{n}", **more}
        for n in range(count)
    ]


def config(tmp_path, method="contrast", **settings):
    return METHODS.get(method).training().config(output_dir=str(tmp_path), seed=3, **settings)


def test_pairs_are_contrasted_in_place_of_the_policys_responses(tmp_path):
    pairs = pair_rows(chosen_finished=True, rejected_finished=False)
    for source, expected in (("policy", {"a", "b"}), ("pairs", {f"q{n}" for n in range(6)})):
        args = config(tmp_path, contrast_source=source)
        made = contrast_rows(args, pairs, GROUPS, None, count=100)
        assert len(made) == 100
        assert {row["prompt"].strip() for row in made} == expected
    for row in made:  # of pairs: own response against one to another prompt, flags kept
        assert row["chosen"][1] == row["prompt"][1] != row["rejected"][1]
        assert row["chosen_finished"] == row["chosen"].startswith("c")
        assert row["rejected_finished"] == row["rejected"].startswith("c")
    args = config(tmp_path, contrast_source="both")
    both = contrast_rows(args, pairs, GROUPS, None, count=101)
    assert [row["prompt"].startswith("q") for row in both] == [False] * 51 + [True] * 50
    assert both[:51] == negative_pairs(GROUPS, "other_prompt", 51, seed=3)
    assert len(contrast_rows(args, pairs, GROUPS, None, count=None)) == 6 + 12  # none for blanks


def test_pairs_and_contrast_of_chats_fit_one_table(tokenizer):
    """Pairs hold messages, sampled answers text: the tokens are those of each way alone."""

    def chat(content):
        return [{"role": "user", "content": content}]

    def said(content):
        return [{"role": "assistant", "content": content}]

    pairs = [{"prompt": chat("the cat"), "chosen": said("runs"), "rejected": said("sits")}]
    groups = [
        {"prompt": chat(who), "responses": ["a fish", "flies"], "finished": [True, False]}
        for who in ("a dog", "the bird")
    ]
    made = negative_pairs(groups, "other_prompt", 8)
    found = table("pairs", [{**pairs[0], **dict.fromkeys(FINISHED, True)}, *made], COLUMNS)
    for number, row in enumerate([*pairs, *made]):
        in_table = encode_pair(found[number], number, tokenizer, "train")
        alone = encode_pair(row, number, tokenizer, "train")
        assert in_table["chosen_ids"] == alone["chosen_ids"]
        assert in_table["rejected_ids"] == alone["rejected_ids"]
    text = [{"prompt": "the cat", "chosen": "runs", "rejected": "sits"}]
    assert table("pairs", text, COLUMNS)[0]["chosen"] == "runs"
    with pytest.raises(UserError, match="pairs: the rows do not fit one table"):
        table("pairs", [*text, *pairs], COLUMNS)


def test_each_way_makes_as_many(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    groups = [{"prompt": p, "responses": [" ".join([p, *words])]} for p in "ab"]
    args = config(tmp_path, contrast_negatives=["other_prompt", "cut", "shuffled"])
    made = contrast_rows(args, [], groups, None, count=32)
    lengths = [len(row["rejected"].split()) for row in made]
    assert all(length == 9 for length in [*lengths[:11], *lengths[22:]])
    assert all(length < 9 for length in lengths[11:22])
    assert made[:11] == negative_pairs(groups, "other_prompt", 11, seed=3)


def test_a_way_that_can_do_nothing_is_left_out(tmp_path, caplog):
    args = config(tmp_path, contrast_negatives=["language", "other_prompt", "cut"])
    made = contrast_rows(args, [], GROUPS, None, count=30)
    assert made == negative_pairs(GROUPS, "other_prompt", 30, seed=3)
    assert (
        "contrast leaves out cut of the groups, which needs finished responses of six"
        in caplog.text
    )


def test_the_default_is_other_prompts_of_the_policys_responses(tmp_path):
    args = config(tmp_path)
    assert (args.contrast_source, args.contrast_matching) == ("policy", "random")
    assert args.contrast_negatives == ["other_prompt"]
    made = contrast_rows(args, pair_rows(), GROUPS, None, count=50)
    assert made == negative_pairs(GROUPS, "other_prompt", 50, seed=3)


@pytest.mark.parametrize(
    ("settings", "groups", "message"),
    [
        ({}, None, "contrast_source is 'policy', which needs groups"),
        ({"contrast_source": "both"}, None, "contrast_source is 'both', which needs groups"),
        ({"contrast_matching": "hard"}, GROUPS, "needs the last round's reward model; use a"),
        ({"contrast_negatives": "language"}, GROUPS, "language: general sentences"),
    ],
)
def test_what_a_contrast_lacks_is_named(settings, groups, message, tmp_path):
    with pytest.raises(UserError, match=message):
        contrast_rows(config(tmp_path, **settings), pair_rows(), groups, None, count=5)


def test_groups_of_a_meta_step_are_better_then_worse():
    [group] = as_groups([{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_finished": False}])
    assert group == {"prompt": "p", "responses": ["c", "r"], "finished": [False, True]}


def test_settings_of_the_commands_are_read(tmp_path):
    classes = METHODS.get("contrast").training()
    given = {"contrast_negatives": "[other_prompt, cut]", "contrast_share": "0.5"}
    args = resolve(given, classes.config, work=tmp_path, command_name="train").args
    assert args.contrast_negatives == ["other_prompt", "cut"]
    one = resolve(
        {"contrast_negatives": "cut"}, classes.config, work=tmp_path, command_name="train"
    )
    assert one.args.contrast_negatives == ["cut"]


def rows(rng, count):
    """Groups of two demonstrations, which keep to the topic of their prompt."""
    prompts = [f"describe the {rng.choice(('garden', 'ocean'))} :" for _ in range(count)]
    return [{"prompt": p, "responses": [demonstration(rng, p, 0.8) for _ in "ab"]} for p in prompts]


SETTINGS = {"max_steps": 120, "learning_rate": 3e-3, "per_device_train_batch_size": 64}
SETTINGS |= {"save_strategy": "no", "lr_scheduler_type": "linear", "logging_steps": 120}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains a reward model by a method and returns its folder."""
    folder = tmp_path_factory.mktemp("contrast")
    rng = random.Random(0)
    write_base_model(folder / "base", WorldConfig(layers=1))
    made = rows(rng, 600)
    firsts, seconds = ([row["responses"][k] for row in made] for k in (0, 1))
    pairs = label_pairs([row["prompt"] for row in made], firsts, seconds, seed=0)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "groups.jsonl", rows(rng, 600))

    def run(method, **settings):
        needs = METHODS.get(method).needs
        job = TrainReward(
            str(folder / "base"),
            str(folder / "pairs.jsonl"),
            groups=str(folder / "groups.jsonl") if "groups" in needs else None,
            reward=str(folder / "retrained") if "reward" in needs else None,
            adaptation=method,
            settings=SETTINGS | settings,
        )
        job.run(folder / method)
        return folder / method

    return run


def sight(folder):
    """How often a reward model prefers a response under its own prompt."""
    tests = negative_pairs(rows(random.Random(1), 200), "other_prompt", 200, matching="length")
    scorer, prompts = Scorer.from_pretrained(folder), [test["prompt"] for test in tests]
    own, other = (scorer(prompts, [t[side] for t in tests]) for side in ("chosen", "rejected"))
    return sum(a > b for a, b in zip(own, other, strict=True)) / len(tests)


def test_a_reward_model_learns_to_read_the_prompt(train):
    blind = sight(train("retrained"))
    seeing = sight(train("contrast", contrast_share=0.5))
    hard = sight(train("contrast_hard", contrast_share=0.5))
    assert min(seeing, hard) > max(0.75, blind + 0.15)


def test_a_meta_step_raises_the_contrast(train):
    groups = {"contrast_negatives": "[other_prompt, shuffled]", "contrast_groups": 50}
    folder = train("contrast_meta", max_steps=4, logging_steps=1, meta_batch_size=32, **groups)
    steps = [row for row in read_jsonl(folder / "training_log.jsonl") if "meta_objective" in row]
    assert len(steps) == 4
    for step in steps:
        assert step["meta_objective"] < step["meta_objective_after"] < 0  # mean log sigmoid
        assert step["meta_influence"] > 0


def test_contrast_over_rounds_gets_the_groups_of_all_rounds(tmp_path):
    arms = "methods=[contrast, contrast_rounds]"
    found = {stage.name: stage for stage in plan(read_recipe("gold_demo", [arms, "rounds=3"]))}
    here = "methods/contrast_rounds/round-{}/{}".format

    def groups(method, number):
        return str(job_of(found[f"methods/{method}/round-{number}/reward_model"]).groups)

    assert groups("contrast", 3) == "methods/contrast/round-3/groups/groups.jsonl"
    assert groups("contrast_rounds", 1) == here(1, "groups/groups.jsonl")
    assert groups("contrast_rounds", 3) == here(3, "all_groups/groups.jsonl")
    assert found[here(2, "all_groups")].needs == (here(1, "groups"), here(2, "groups"))
    joined = found[here(3, "all_groups")]
    assert joined.needs == (here(2, "all_groups"), here(3, "groups"))
    for number, place in enumerate(joined.needs):
        (tmp_path / place).mkdir(parents=True)
        write_jsonl(tmp_path / place / "groups.jsonl", GROUPS[number : number + 2])
    join_groups(SimpleNamespace(stage=joined, root=tmp_path, out=tmp_path))
    assert read_jsonl(tmp_path / "groups.jsonl") == [*GROUPS[:2], *GROUPS[1:3]]
