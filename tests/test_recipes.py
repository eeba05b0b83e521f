"""Every recipe is understood; those for real data run on made-up rows in the public schemas."""

import re
from pathlib import Path

import pytest

from shiftrm.cli import main
from shiftrm.config import read_yaml
from shiftrm.data.amazon import amazon_domains, read_amazon
from shiftrm.data.domains import write_domains
from shiftrm.data.shp import LEAVE_OUT, read_shp, shp_domains
from shiftrm.files import write_jsonl
from shiftrm.models.scoring import Scorer
from shiftrm.oodpl.training_command import settings_of
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from tests.pipeline.conftest import LOOP
from tests.pipeline.test_external_recipes import EXTERNAL

RECIPES = Path(__file__).parents[1] / "recipes"
REAL = ("shp", "amazon")
SMALL = ["max_steps=1", "support_batch_size=4", "query_batch_size=2", "save_strategy=no"]


def snippet(name):
    """The Python that a recipe's first step gives."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line.removeprefix("#").removeprefix("      ") for line in text.splitlines()]
    return "\n".join(lines).split("<<'END'\n")[1].split("\nEND")[0]


def test_all_recipes_are_tested():
    """Those of `shiftrm run` in tests/pipeline: test_recipes, _smollm2, _external_recipes."""
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        *REAL,
        "gold_domains",
        "gold_demo",
        "smollm2_harmless",
        *LOOP,
        *EXTERNAL,
    }


def test_the_gold_worlds_recipe_plans_stages_whose_needs_come_before_them():
    config = read_recipe("gold_domains")
    assert len(config.domains.betas) >= 5
    seen = set()
    for stage in plan(config):
        assert seen.issuperset(stage.needs), stage.name
        assert stage.name not in seen
        seen.add(stage.name)
    targets = config.domains.targets
    assert {f"policies/{m}/{target}" for m in config.methods for target in targets} <= seen


@pytest.mark.parametrize("name", REAL)
def test_settings_are_known(name, tmp_path):
    settings = read_yaml(RECIPES / f"{name}.yaml")
    args = settings_of({**settings, "bf16": False}, work=tmp_path / "work")
    for key in ("max_steps", "learning_rate", "inner_learning_rate", "beta", "domains_per_step"):
        assert getattr(args, key) == float(settings[key])
    assert (args.normalize_weights, args.reduction) == (True, "mean")


def shp_rows():
    for name in ("askacademia", "askanthropology", "askbaking", "askvet", "askdocs", "askhr"):
        for post in range(24):
            for split in ("train", "test"):
                yield {
                    "post_id": f"{name}{post}{split}",
                    "domain": f"{name}_{split}",
                    "history": f"the {name} {split} cat {post}?",
                    "human_ref_A": f"the red dog runs {post}",
                    "human_ref_B": f"a fish {post}",
                    "score_A": 10,
                    "score_B": 4,
                    "labels": 1,
                    "score_ratio": 2.5,
                }


def amazon_rows(category):
    for product in range(60):
        for rating, words in ((5, "large blue bird flies"), (1, "small green dog sits")):
            yield {
                "rating": float(rating),
                "title": "cat",
                "text": f"{category} {product} {rating} the a red cat runs swims user "
                f"{words} {product} {category} and on",
                "asin": f"{category}{product}",
                "parent_asin": f"{category}{product}",
            }


@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_runs_as_it_says(name, tmp_path, monkeypatch, policy, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    policy.save_pretrained("sft")
    tokenizer.save_pretrained("sft")
    if name == "shp":
        write_jsonl("rows.jsonl", shp_rows())
        scope = {"read_shp": lambda: read_shp(["rows.jsonl"])}
    else:
        categories = re.findall(r'"(\w+)"', snippet(name).split("names = ")[1].split("]")[0])
        assert len(categories) == 8
        for category in categories:
            write_jsonl(f"{category}.jsonl", amazon_rows(category))
        scope = {"read_amazon": read_amazon}
    scope |= {"shp_domains": shp_domains, "amazon_domains": amazon_domains}
    scope |= {"write_domains": write_domains, "LEAVE_OUT": LEAVE_OUT}
    imports = [line for line in snippet(name).splitlines() if line.startswith("from ")]
    for line in imports:
        exec(line, {})  # what it imports exists
    exec("\n".join(line for line in snippet(name).splitlines() if line not in imports), scope)
    recipe = str(RECIPES / f"{name}.yaml")
    status = main(
        ["meta-train", "--config", recipe, "--model", "sft", "--domains", name, "--output", "out",
         *SMALL]
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "1 outer steps of 4 tasks" in said.out
    Scorer.from_pretrained("out")
