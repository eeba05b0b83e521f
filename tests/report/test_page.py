"""The page of a run: complete, self-contained, escaped, whole whatever is missing."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from shiftrm.cli import main
from shiftrm.files import write_jsonl
from shiftrm.records import Record, write_records
from shiftrm.report import render_page, summary, write_report
from shiftrm.report.runs import write_page
from shiftrm.report.samples import Answer, SamplePrompt, read_samples

from .records import (
    DEMO,
    EVIL,
    RECIPE,
    change,
    over_optimised,
    recipe_records,
    renamed,
    write_folder,
)

VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.stack == []
    return reader


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", " ".join(read(html).text))


def assert_harmless(html: str) -> None:
    """No script, no handler, nothing loaded from anywhere."""
    for tag, attributes in read(html).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "action", "srcset"}:
                assert (value or "").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


HEADINGS = [
    "Wins against SFT and against each other", "Did the reward model go blind?", "Pictures",
    "Over-optimisation", "Diversity", "All numbers", "Sample responses",
    "Data, configuration and versions", "How the numbers are made", "Glossary",
]  # fmt: skip


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def images(html: str) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in read(html).tags if tag == "img"]


def test_the_page_of_the_demo(three_seeds, tmp_path: Path):
    samples = [SamplePrompt("p", (Answer("fixed", 3, "r", "1.00", gold="2.00"),))]
    path = write_report(three_seeds, tmp_path, config=DEMO, samples=samples)
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    assert_harmless(html)
    assert headings(html) == [h for h in HEADINGS if h not in ("Over-optimisation", "Diversity")]
    # Opening 1, variance 3, wins 2, held-out 2 arms, normalised 1, KL 2, accuracy 2, meta steps 3.
    assert len(images(html)) == 16
    assert all(len(image["alt"] or "") > 30 for image in images(html))
    text = text_of(html)
    assert "clearly higher in gold than the reward model kept fixed at matched KL" in text
    assert "4.47 ± 0.37" in text
    assert "gold 2.00 · reward 1.00" in text
    assert "best of n (evaluation.best_of_n), diversity." in text  # is said not to be measured
    assert "second reward model" not in text


def test_the_page_of_a_recipe(tmp_path: Path):
    folder = tmp_path / "run"
    write_folder(folder)
    records = [*recipe_records(gold=True), *over_optimised()]
    html = render_page(records, config=RECIPE, samples=read_samples(folder))
    assert_harmless(html)
    assert headings(html) == HEADINGS
    # Variance 3, wins 2, held-out 1 arm, normalised 1, KL 2, accuracy 2, meta steps 3.
    assert len(images(html)) == 14
    text = text_of(html)
    assert "69 / 26 / 5 [60, 78]" in text
    assert "not measured" not in text.lower()
    assert EVIL in text
    assert "<script" not in html
    assert "secret" not in html
    assert "a reward model" not in text.split("The arms")[0]  # the judge is a language model


def test_same_records_same_page(three_seeds, undrawn):
    assert render_page(list(three_seeds), config=DEMO) == render_page(three_seeds, config=DEMO)


@pytest.mark.parametrize("metric", ["gold_mean", "accuracy_policy_before", "eval_accuracy", "kl"])
def test_a_missing_metric_reads_not_measured(one_seed, metric, undrawn):
    html = render_page([record for record in one_seed if record.metric != metric], config=DEMO)
    assert "not measured" in text_of(html).lower()


def test_what_was_not_measured_is_said(undrawn):
    text = text_of(render_page(recipe_records(judged=False), config=RECIPE))
    assert "There was no judge (judge.kind is none)" in text
    assert "no second reward model was given: evaluation.gold" in text
    assert "whether it ranks worse was not measured" in text
    assert "one seed proves little" in text
    without = [r for r in recipe_records() if "similarity" not in r.metric]
    assert "No embedder was given" in text_of(render_page(without, config=RECIPE))
    assert "Not measured" in text_of(render_page([]))


def test_every_evaluated_metric_is_on_the_page(undrawn):
    """What no block of the page shows stands in a table of its own."""
    text = text_of(render_page(recipe_records(), config=RECIPE))
    others = text.split("Other measurements")[-1]
    assert "Self-BLEU: self_bleu_2" in others
    assert "Mean reward of the reward model" in others


def test_the_judge_that_only_counts_is_named(undrawn):
    config = {**RECIPE, "judge": {"kind": "reward-model", "model": "x"}}
    assert "The judge is a reward model" in text_of(render_page(recipe_records(), config=config))


def test_several_seeds_of_a_recipe(undrawn):
    records = [record for seed in (0, 1, 2) for record in recipe_records(seed)]
    text = text_of(render_page(records, config=RECIPE))
    # Wins of MetaRM in round 3: 69, 70, 71 %; t-interval 4.3027 / sqrt(3) * 1 % = 2.48 %.
    assert "70 / 25 / 5 [68, 72]" in text
    assert "one seed" not in text.split("How the numbers")[0]
    assert "43,000 to 43,002" in text


def test_everything_foreign_is_escaped(one_seed, undrawn):
    odd = renamed(one_seed, "metarm_paper", method=EVIL, commit=EVIL, versions=EVIL)
    odd.append(Record("world", EVIL, 0, f"pairs_dropped_{EVIL}", 1.0))
    odd.append(Record("data", "sft", 0, "pairs", 3.0))
    odd.append(Record("data", "sft", 0, f"pairs_dropped_{EVIL}", 3.0))
    html = render_page(
        [*one_seed, *odd],
        config={**DEMO, "name": EVIL, EVIL: {EVIL: EVIL}, "list": [EVIL]},
        samples=[SamplePrompt(EVIL, (Answer(EVIL, 1, EVIL, EVIL, EVIL),))],
        notes=[EVIL],
    )
    assert_harmless(html)
    assert "<script" not in html
    assert " ".join(read(html).text).count("<script>alert('x')</script>") > 10  # shown, as text


@pytest.mark.parametrize(
    "keep",
    [
        lambda r: r.method == "fixed",
        lambda r: r.method in ("metarm", "metarm_scale_free", "dpo"),
        *(lambda r, stage=s: r.stage == stage for s in ("ppo", "reward_model", "compare", "data")),
        lambda r: r.stage == "world",
        lambda r: r.method != "sft",
        lambda r: not r.metric.endswith("_values_sft"),
        lambda r: "after" not in r.metric,
        lambda r: r.metric != "kl",
        lambda r: not r.metric.startswith("win"),
        lambda r: r.round < 2,
        lambda r: (r.method, r.seed) != ("fixed", 1),
        lambda r: False,
    ],
)
def test_missing_parts_do_not_crash(three_seeds, keep, undrawn):
    merged = [*recipe_records(0, gold=True), *recipe_records(1, gold=True)]
    for records, config in ((three_seeds, DEMO), (merged, RECIPE), (merged, None)):
        kept = [record for record in records if keep(record)]
        assert_harmless(render_page(kept, config=config))
        assert summary(kept, config)


def test_any_single_record_makes_a_page(one_seed, undrawn):
    kinds = {(r.stage, r.metric): r for r in [*recipe_records(gold=True), *one_seed]}
    for record in list(kinds.values())[::2]:
        for config in (None, RECIPE):
            render_page([record], config=config)
        assert summary([record])


def test_unknown_arm_is_shown_as_it_is(one_seed, undrawn):
    odd = renamed(one_seed, "retrained", method="my_arm")
    assert "my_arm (retrained)" in text_of(render_page([*one_seed, *odd], config=DEMO))


def test_several_versions_are_pointed_out(one_seed, undrawn):
    other = Record("ppo", "fixed", 1, "kl", 1.0, step=1, seed=9, versions="other")
    assert "more than one commit" in text_of(render_page([*one_seed, other]))
    assert "more than one commit" not in text_of(render_page(one_seed))


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("shiftrm.report.page.win_tables.win_table", lambda m: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- samples -------------------------------------------------------------------------------------


def test_samples_of_every_arm_beside_each_other(tmp_path: Path):
    write_folder(tmp_path)
    first, *rest = read_samples(tmp_path)
    assert len(rest) == 3
    assert first.prompt == f"user: {EVIL}\n\nassistant: Yes?\n\nuser: Go on."
    assert {(a.arm, a.round, a.reward, a.gold) for a in first.answers} == {
        ("sft", 0, "0.50", "2.25"), ("fixed", 10, "0.50", "2.25"), ("metarm", 4, "0.50", "2.25"),
        ("dpo", 1, "0.50", "2.25"),
    }  # fmt: skip
    assert [a.cut for a in rest[1].answers] == [True] * 4
    assert len(rest[1].answers[0].response) < 2100
    (tmp_path / "evaluation" / "scored.jsonl").write_text("{broken")
    assert "sft" not in [a.arm for a in read_samples(tmp_path)[0].answers]
    assert read_samples(tmp_path / "nowhere") == []


def test_samples_of_an_earlier_demo(tmp_path: Path):
    """DPO was evaluated outside a round, prompts repeat, and the numbers had other names."""
    for place in ("evaluation", "methods/dpo/evaluation", "methods/fixed/round-2/evaluation"):
        rows = [
            {"prompt": p, "responses": [f"{place} {p}"], "gold": [1.5], "proxy": [-0.5]}
            for p in ("a", "a", "b")
        ]
        write_jsonl(tmp_path / place / "responses.jsonl", rows)
    first, second = read_samples(tmp_path)
    assert (first.prompt, second.prompt) == ("a", "b")
    assert {(a.arm, a.round, a.gold, a.reward) for a in first.answers} == {
        ("sft", 0, "1.50", "-0.50"), ("dpo", 1, "1.50", "-0.50"), ("fixed", 2, "1.50", "-0.50"),
    }  # fmt: skip


def test_broken_text_is_written(tmp_path: Path, undrawn):
    """A lone surrogate has no UTF-8 form; it must not lose the page."""
    records = [Record("evaluate", "m", 1, "kl", 1.0)]
    samples = [SamplePrompt("p", (Answer("m", 1, "a\ud800b", "1.00"),))]
    path = write_report(records, tmp_path / "x.html", samples=samples)
    assert "a\ufffdb" in path.read_text(encoding="utf-8")


def test_control_characters_are_replaced(undrawn):
    """Models can write them, and no HTML may hold them."""
    records = [Record("evaluate", "m", 1, "kl", 1.0)]
    samples = [SamplePrompt("a\x1b[31mb", (Answer("m", 1, "c\x00d\x08e\n\tf", "1.00"),))]
    html = render_page(records, samples=samples, notes=["n\x7f"])
    assert re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", html) is None
    for shown in ("a\ufffd[31mb", "c\ufffdd\ufffde\n\tf", "n\ufffd"):
        assert shown in html


# -- `shiftrm report DIR...` ---------------------------------------------------------------------


def write_run(folder: Path, seed: int, **settings: object) -> Path:
    write_records(folder / "records.jsonl", recipe_records(seed))
    (folder / "config.yaml").write_text(yaml.safe_dump({**RECIPE, "seed": seed, **settings}))
    return folder


def test_report_of_several_runs(tmp_path: Path, undrawn, capsys):
    runs = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    output = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    text = text_of(output.read_text(encoding="utf-8"))
    assert "shiftrm run: hh_helpful" in text
    assert "3 arms, 4 rounds, 2 seeds." in text
    assert "with other settings" not in text
    write_run(tmp_path / "1", 1, rounds=7)
    output = tmp_path / "again.html"  # a page that is there is not written over
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    assert "rounds: 4 -> 7" in text_of(output.read_text(encoding="utf-8"))


def test_report_of_an_earlier_demo(tmp_path: Path, one_seed, undrawn):
    """Its configuration lists methods, and its training logs have other names."""
    names = {"sequence_kl": "kl", "standardised_mean": "proxy_mean"}
    old = [
        Record(**{**r.__dict__, "metric": names.get(r.metric, r.metric)})
        for r in change(one_seed, None, stage="world")
    ]
    write_records(tmp_path / "records.jsonl", old)
    config = {"seed": 0, "methods": list(DEMO["methods"])[:-1], "ppo": {"kl_target": 6.0}}
    config |= {"world": {"seed": 0}, "matched_kl": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    path = write_page([tmp_path], tmp_path / "report.html")
    text = text_of(path.read_text(encoding="utf-8"))
    assert "shiftrm: does the reward model still see?" in text
    assert "MetaRM scale-free (+0.45)" in text
    assert "the highest mean gold on the first half" in text
    dots = len(images(path.read_text(encoding="utf-8")))
    assert dots == 16
