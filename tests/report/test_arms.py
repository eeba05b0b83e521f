"""What the arms are comes from the configuration, or else from the records; never from a name."""

import pytest

from shiftrm.methods.method import Method
from shiftrm.records import Record
from shiftrm.report.results import Results

from .records import DEMO, recipe_records, renamed

TRACED = Method("My trace", "Trace", "#123456", "x", needs=frozenset({"groups"}), training=dict)


def evaluated(*arms: str) -> list[Record]:
    return [Record("evaluate", arm, 1, "kl", 1.0) for arm in arms]


def test_arms_of_the_demo_in_the_order_of_the_configuration(three_seeds):
    extra = Record("evaluate", "aaa", 1, "gold_mean", 1.0)
    m = Results([extra, *three_seeds], DEMO)
    assert list(m.arms) == ["sft", *DEMO["methods"], "aaa"]
    assert m.with_rewards == [*list(DEMO["methods"])[:-1], "aaa"]
    assert m.adapted == ["metarm_paper", "metarm_scale_free"]
    assert (m.vanilla, m.retrained) == ("fixed", "retrained")
    assert m.all_rounds == [1, 2, 3]
    assert m.seeds == [0, 1, 2]
    assert [arm for arm in m.arms if m.arms[arm].buys_labels] == ["fresh_labels"]


def test_folders_of_earlier_demos_list_their_methods(three_seeds):
    earlier = Results(three_seeds, {"methods": list(DEMO["methods"])[:-1], "ppo": {"steps": 40}})
    today = Results(three_seeds, DEMO)
    assert earlier.arms == today.arms
    assert earlier.name("fixed") == "Reward model kept fixed (vanilla PPO)"


def test_without_a_configuration_the_records_say_it():
    names = {"sft": "sft", "fixed": "a", "metarm": "b", "dpo": "c"}
    records = [Record(**{**r.__dict__, "method": names[r.method]}) for r in recipe_records()]
    m = Results(records)
    assert [m.name(arm) for arm in ("sft", "a", "b", "c")] == [
        "SFT", "a (vanilla)", "b (MetaRM)", "c (DPO)",
    ]  # fmt: skip
    assert (m.vanilla, m.adapted, m.with_rewards) == ("a", ["b"], ["a", "b"])
    assert len({arm.colour for arm in m.arms.values()}) == 4
    plain = [r for r in renamed(records, "b") if not r.metric.startswith("meta_")]
    assert Results(plain).retrained == "b"


def test_other_methods_on_the_pairs_are_not_plain_retraining():
    methods = {name: {"reward": name} for name in ("contrast_pairs", "bsr", "log_sigmoid")}
    assert Results(evaluated(*methods), {"methods": methods}).retrained is None
    methods["again"] = {"reward": "retrained"}
    assert Results(evaluated(*methods), {"methods": methods}).retrained == "again"


def test_a_name_says_nothing():
    config = {"methods": {"fixed": {"reward": "metarm"}, "metarm": {"reward": "fixed"}}}
    m = Results(evaluated("fixed", "metarm"), config)
    assert (m.adapted, m.vanilla) == (["fixed"], "metarm")
    assert m.name("fixed") == "fixed (MetaRM)"
    assert m.name("metarm") == "metarm (vanilla)"
    assert Results(evaluated("metarm")).adapted == []


@pytest.mark.parametrize("optimiser", [None, "rloo"])
def test_arms_of_one_method_differ_in_colour(optimiser):
    methods = {name: {"reward": "metarm", "policy": optimiser} for name in ("one", "two", "three")}
    m = Results(evaluated(*methods), {"methods": methods, "policy": {"method": "ppo"}})
    assert len({arm.colour for arm in m.arms.values()}) == 3
    assert len({arm.marker for arm in m.arms.values()}) == 3
    assert m.arms["one"].optimiser == (optimiser or "ppo")
    assert [arm.short for arm in m.arms.values()] == list(methods)


def test_gold_as_the_reward_is_not_a_reward_model_that_is_kept():
    m = Results(evaluated("gold"), {"methods": {"gold": {"reward": "gold"}}})
    assert (m.vanilla, m.with_rewards, m.ceiling) == (None, [], "gold")
    assert m.name("gold") == "Gold as the reward (ceiling)"
    assert m.arms["gold"].words == "none: the gold reward"


def test_a_method_from_outside_brings_its_label_and_colour():
    path = f"{__name__}:TRACED"
    config = {"methods": {"mine": {"reward": path}, "lost": {"reward": "no.such:thing"}}}
    m = Results(evaluated("mine", "lost"), config)
    assert (m.name("mine"), m.arms["mine"].colour) == ("mine (Trace)", "#123456")
    assert m.adapted == ["mine"]
    assert m.name("lost") == "lost (vanilla)"  # cannot be imported: what the records say


def test_groups_alone_make_no_meta_step():
    """Contrast also learns from the policy's responses; only MetaRM logs meta steps."""
    config = {"methods": {"contrast": {"reward": "contrast"}, "metarm": {"reward": "metarm"}}}
    records = evaluated("contrast", "metarm")
    for arm, metric in (("contrast", "loss"), ("metarm", "meta_influence")):
        records.append(Record("reward_model", arm, 1, metric, 0.5, step=1))
    found = Results(records, config).arms
    assert {name: arm.adapts for name, arm in found.items()} == {"contrast": False, "metarm": True}
