"""The recipe for SmolLM2-135M: as it stands, and a small version of it with the real model."""

import pytest
from transformers import AutoModelForCausalLM

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.models.gguf_file import convert_gguf
from shiftrm.models.scoring import Scorer
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import check_settings, read_recipe
from shiftrm.records import read_records
from tests.data.public_schemas import write_rows
from tests.smollm2 import smollm2_file

NAME = "smollm2_harmless"
ARM = "metarm_by_effect"
SMALL = [
    *("rounds=1", "methods=[metarm_by_effect]", "data.heldout_share=0.4"),
    *("sampling.max_new_tokens=8", "execution.workers=1"),
    *("reward.batch_size=2", "reward.settings.max_steps=2", "reward.settings.warmup_steps=0"),
    *("reward.settings.eval_steps=2", "reward.settings.logging_steps=1"),
    *("reward.meta.meta_batch_size=1", "groups.prompts=2", "groups.responses=2"),
    *("policy.settings.steps=1", "policy.settings.prompts_per_step=2"),
    *("policy.settings.rollouts_per_prompt=2", "policy.settings.minibatch_size=4"),
    *("evaluation.prompts=2", "evaluation.sight_pairs=2"),
]  # fmt: skip


def rows():
    """Dialogues in the schema of HH-RLHF, of words that the model knows."""
    things = ["bread", "soup", "tea", "rice", "cake", "fish", "salad", "pasta", "coffee", "pie"]
    for thing in things:
        asked = f"\n\nHuman: How do I make {thing}?\n\nAssistant: "
        yield {
            "chosen": f"{asked}Gladly. First you need fresh things, then some time.",
            "rejected": f"{asked}I will not tell you, go away.",
        }


def test_the_recipe_is_understood_as_it_stands():
    recipe = read_recipe(NAME, ["model=owner/base"])
    stages = plan(recipe)
    check_settings(stages)
    names = {stage.name for stage in stages}
    assert {f"methods/{arm}/round-2/policy" for arm in recipe.methods} <= names
    assert list(recipe.methods) == [
        *("fixed", "retrained", "metarm_by_effect", "contrast_all_log_sigmoid"),
    ]


def test_its_adapters_lie_in_the_top_six_layers():
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import ModelConfig, get_peft_config

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=30,
        vocab_size=16,
    )  # fmt: skip
    lora = get_peft_config(ModelConfig(use_peft=True, **read_recipe(NAME, ["model=a/b"]).lora))
    model = get_peft_model(LlamaForCausalLM(config), lora)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in trained} == {*range(24, 30)}
    assert len(trained) == 6 * 7 * 2  # seven projections a layer, two factors each


@pytest.mark.slow
def test_a_small_run_with_the_real_model(tmp_path, here, capsys):
    convert_gguf(smollm2_file(), tmp_path / "model")
    write_rows(tmp_path / "hh.jsonl", rows())
    output = tmp_path / "run"
    words = [f"model={tmp_path / 'model'}", *SMALL]
    words += [f"data.{name}.source={tmp_path / 'hh.jsonl'}" for name in ("pairs", "prompts")]
    assert main(["run", NAME, *words, "--output", str(output)]) == 0
    assert f"Page: {output / 'report.html'}" in capsys.readouterr().out

    records = read_records(output / "records.jsonl")
    after = {r.metric: r.value for r in records if (r.method, r.round) == (ARM, 1)}
    assert 0 <= after["kl"] < 5  # one step of PPO from the policy itself
    assert after["meta_influence"] > 0
    answers = read_jsonl(output / f"methods/{ARM}/round-1/responses/responses.jsonl")
    assert len(answers) == 2
    page = (output / "report.html").read_text(encoding="utf-8")
    for row in answers:
        assert row["prompt"][-1]["content"].startswith("How do I make ")
        assert all(len(ids) <= 8 for ids in row["response_ids"])
        assert row["responses"][0].isascii()
    assert ARM in page

    # What was trained is the whole model, merged: only the top six layers differ.
    made = output / f"methods/{ARM}/round-1/policy/model"
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    moved = AutoModelForCausalLM.from_pretrained(made).state_dict()
    changed = {name for name, weight in moved.items() if not weight.equal(before[name])}
    assert changed
    assert {int(name.split(".")[2]) for name in changed} <= {*range(24, 30)}
    reward = Scorer.from_pretrained(output / f"methods/{ARM}/round-1/reward_model/model")
    assert len(reward(["How do I make tea?"], ["Boil some water."])) == 1
