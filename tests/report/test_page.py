"""The page: complete, self-contained, escaped, whole whatever is missing."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shiftrm.records import Record
from shiftrm.report import write_report
from shiftrm.report.page import SAMPLES_PER_ARM, render_page, sample_groups

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/a onerror=alert(1)>"
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


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which is most of a page's time."""
    monkeypatch.setattr("shiftrm.report.page.plots.render", lambda figure: b"<svg/>")


def test_page_has_everything_in_order(three_seeds, tmp_path: Path):
    samples = [{"method": "fixed", "round": 1, "prompt": "p", "response": "r", "gold": 1.0}]
    path = write_report(three_seeds, tmp_path, config={"seed": 0}, samples=samples)
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    assert_harmless(html)
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Did the reward model go blind?", "Pictures", "Wins against SFT, vanilla PPO and DPO",
        "All numbers", "Sample responses", "Configuration and versions",
        "How the numbers are made", "Glossary",
    ]  # fmt: skip
    images = [attributes for tag, attributes in read(html).tags if tag == "img"]
    assert len(images) == 9
    assert all(len(image["alt"] or "") > 30 for image in images)
    text = text_of(html)
    assert "clearly higher in gold than the reward model kept fixed at matched KL" in text
    assert "4.47 ± 0.37" in text
    assert "Not measured" not in text


def test_same_records_same_page(three_seeds):
    assert render_page(three_seeds) == render_page(three_seeds)


def test_everything_foreign_is_escaped(one_seed):
    odd = [
        Record(**{**r.__dict__, "method": EVIL, "commit": EVIL, "versions": EVIL})
        for r in one_seed
        if r.method == "metarm_paper"
    ]
    odd.append(Record("world", EVIL, 0, f"pairs_dropped_{EVIL}", 1.0))
    html = render_page(
        [*one_seed, *odd],
        config={EVIL: {EVIL: EVIL}, "list": [EVIL]},
        samples=[dict.fromkeys(("method", "round", "prompt", "response", "gold", "proxy"), EVIL)],
    )
    assert_harmless(html)
    assert "<script" not in html
    text = " ".join(read(html).text)
    assert text.count("<script>alert('x')</script>") > 10  # shown, as text


def test_no_records_and_no_samples():
    html = render_page([])
    assert_harmless(html)
    assert "Not measured" in text_of(html)


@pytest.mark.parametrize(
    "keep",
    [
        lambda r: r.method == "fixed",
        lambda r: r.method in ("metarm_scale_free", "dpo"),
        lambda r: r.stage == "ppo",
        lambda r: r.stage == "reward_model",
        lambda r: r.stage == "compare",
        lambda r: r.stage == "world",
        lambda r: r.method != "sft",
        lambda r: not r.metric.endswith("_values_sft"),
        lambda r: "after" not in r.metric,
        lambda r: r.metric != "kl",
        lambda r: r.round < 2,
        lambda r: (r.method, r.seed) != ("fixed", 1),
    ],
)
def test_missing_parts_do_not_crash(three_seeds, keep, undrawn):
    html = render_page([record for record in three_seeds if keep(record)])
    assert_harmless(html)


@pytest.mark.parametrize("metric", ["gold_mean", "accuracy_policy_before", "eval_accuracy", "kl"])
def test_a_missing_metric_reads_not_measured(one_seed, metric, undrawn):
    html = render_page([record for record in one_seed if record.metric != metric])
    assert "not measured" in text_of(html).lower()


def test_any_single_record_makes_a_page(one_seed, undrawn):
    kinds = {(r.stage, r.metric): r for r in one_seed if r.method in ("metarm_paper", "fixed")}
    for record in kinds.values():
        render_page([record])


def test_unknown_arm_is_shown_as_it_is(one_seed, undrawn):
    odd = [
        Record(**{**r.__dict__, "method": "my_arm"}) for r in one_seed if r.method == "retrained"
    ]
    assert "my_arm" in text_of(render_page([*one_seed, *odd]))


def test_samples_are_grouped_and_limited():
    samples = [
        {"method": method, "round": round_, "response": f"{method} {round_}"}
        for method in ("fixed", "sft")
        for round_ in range(6)
    ]
    sft, fixed = sample_groups(samples)
    assert (sft.name, fixed.name) == ("SFT", "Reward model kept fixed (vanilla PPO)")
    assert [sample["response"] for sample in fixed.samples] == [
        f"fixed {round_}" for round_ in (5, 4, 3, 2)
    ]
    assert fixed.left_out == 6 - SAMPLES_PER_ARM
    assert fixed.samples[0]["gold"] == "not measured"


def test_broken_text_is_written(tmp_path: Path):
    """A lone surrogate has no UTF-8 form; it must not lose the page."""
    path = write_report([], tmp_path / "x.html", samples=[{"response": "a\ud800b", "method": "m"}])
    assert "a?b" in path.read_text(encoding="utf-8")


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("shiftrm.report.page.tables.win_table", lambda m: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_same_coefficient_is_said(undrawn):
    assert "same KL coefficient" in text_of(render_page([], config={"matched_kl": False}))
    assert "same KL coefficient" not in text_of(render_page([], config={"matched_kl": True}))


def test_several_versions_are_pointed_out(one_seed, undrawn):
    other = Record("ppo", "fixed", 1, "kl", 1.0, step=1, seed=9, versions="other")
    assert "more than one commit" in text_of(render_page([*one_seed, other]))
    assert "more than one commit" not in text_of(render_page(one_seed))
