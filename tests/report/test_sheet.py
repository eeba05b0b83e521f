"""The rater's page: foreign text stays text, keys do what they say, answers survive a reload."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shiftrm.measure.judges.comparing import Comparison
from shiftrm.measure.people.answers import read_answers
from shiftrm.measure.people.blinding import Placement, make_sheet
from shiftrm.measure.people.key_files import Key
from shiftrm.report.sheet import sheet_page
from tests.report.chromium import CHROMIUM, browser

HOSTILE = (
    '</script><script>document.title="pwned"</script><!-- <img src=x onerror=alert(1)>',
    "\"'`${alert(1)} \\u003c &lt; &amp; {{ 7 * 7 }} {% raw %}",
    "\u202egnorw\u202c مرحبا \u2066\u2028\u2029\u0085 e\u0301 😀\ud800",
    "x" * 20_000,
)
PAIRS = [
    Comparison([{"role": text[:20], "content": text}], text, f"other {text}") for text in HOSTILE
] + [Comparison("plain", "a", "")]
PLACEMENTS = [Placement(i, "AB"[i % 2]) for i in range(5)]
SHEET = make_sheet(PAIRS, PLACEMENTS, rater=1)
JS = Path(__file__).parents[2] / "src" / "shiftrm" / "report" / "sheet.js.j2"


class Elements(HTMLParser):
    """All start tags, and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_foreign_text_stays_within_its_element():
    question = '"><script>alert(1)</script>'
    page = Elements(sheet_page(SHEET, question=question))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not any("img" in tag or "onerror" in attributes for tag, attributes in page.tags)
    data = json.loads(page.scripts[0])
    assert data["id"] == SHEET.id
    assert data["items"] == [
        {"turns": [list(turn) for turn in item.turns], "a": item.a, "b": item.b}
        for item in SHEET.items
    ]
    assert page.scripts[0].isascii()


def test_no_network_and_no_other_script():
    text = sheet_page(SHEET)
    page = Elements(text)
    assert not [
        (tag, name)
        for tag, attributes in page.tags
        for name in ("src", "href", "action", "srcset")
        if attributes.get(name) not in (None, "data:,")
    ]
    assert "url(" not in text
    [policy] = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_every_field_has_a_label():
    page = Elements(sheet_page(SHEET))
    labelled = {a["for"] for tag, a in page.tags if tag == "label" and "for" in a}
    fields = {a["id"] for tag, a in page.tags if tag in ("textarea", "input")}
    assert fields - labelled == {"keys"}, "which stands within its label"
    named = {i for _, a in page.tags for i in a.get("aria-labelledby", "").split()}
    assert named <= {a.get("id") for _, a in page.tags}


# -- The logic, in node ----------------------------------------------------------------------

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(script):
    """What a script that has the state's functions as `s` prints, as JSON."""
    program = f"const s = require({json.dumps(str(JS))}); console.log(JSON.stringify({script}));"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_node
def test_answering_undoing_and_finding_open_items():
    steps = """(() => {
        const t = s.fresh(4), seen = [];
        const see = () => seen.push([t.at, t.answers.join(" ")]);
        s.answer(t, "A"); see();
        s.answer(t, "tie"); see();
        s.go(t, 0); s.answer(t, "B"); see();
        s.undo(t); see();
        s.go(t, 3); s.answer(t, "B"); see();
        s.answer(t, "A"); see();
        s.go(t, 99); see(); s.go(t, -5); see();
        seen.push([s.nextOpen(t), s.answered(t)]);
        while (s.undo(t)) ; see();
        return seen;
    })()"""
    assert node(steps) == [
        [1, "A   "],
        [2, "A tie  "],
        [2, "B tie  "],
        [0, "A tie  "],
        [2, "A tie  B"],
        [2, "A tie A B"],
        [3, "A tie A B"],
        [0, "A tie A B"],
        [False, 4],
        [0, "   "],
    ]


@needs_node
def test_keys():
    def pressed(key, writing=False, **event):
        event = {"key": key, **event}
        return node(f"s.action({json.dumps(event)}, {json.dumps(writing)})")

    keys = {"a": "A", "B": "B", "t": "tie", "u": "undo", "n": "open", "c": "comment"}
    keys |= {"ArrowLeft": "previous", "ArrowRight": "next", "x": None, "Enter": None, " ": None}
    assert {key: pressed(key) for key in keys} == keys
    assert pressed("z", ctrlKey=True) == "undo"
    assert pressed("a", ctrlKey=True) is None, "select all"
    assert pressed("a", repeat=True) is None, "a held key answers once"
    assert pressed("ArrowRight", repeat=True) == "next"
    assert pressed("ArrowLeft", altKey=True) is None, "the browser's back"
    assert pressed("a", writing=True) is None
    assert pressed("z", writing=True, ctrlKey=True) is None, "undoes the writing"
    assert pressed("Escape", writing=True) == "leave"


@needs_node
@pytest.mark.parametrize(
    "saved",
    ["", "7", "null", "[]", "{", '{"answers": 3}', '{"answers": ["C", 1, null], "at": "x"}'],
)
def test_what_was_not_saved_by_the_page_is_left_out(saved):
    assert node(f"s.restore({json.dumps(saved)}, 2)") == node("s.fresh(2)")


@needs_node
def test_saving_and_restoring():
    state = """(() => { const t = s.fresh(3); s.answer(t, "A"); s.answer(t, "tie");
        t.comments[1] = "x"; t.rater = "Ann"; return s.restore(s.save(t), 3); })()"""
    assert node(state) == {
        "answers": ["A", "tie", ""],
        "comments": ["", "x", ""],
        "rater": "Ann",
        "at": 2,
        "undo": [],
    }


@needs_node
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_what_the_page_saves_is_read_back(tmp_path, kind):
    comment = '=1+1, "so";\nanother line'
    state = f"""(() => {{ const t = s.fresh(2); s.answer(t, "B"); t.rater = "Ann";
        t.comments[0] = {json.dumps(comment)}; return s.{kind}(t, "s1"); }})()"""
    path = tmp_path / f"a.{kind}"
    path.write_text(node(state), newline="")
    found = read_answers(
        [path],
        Key({name: Comparison(name, "", "") for name in "pq"}, {"s1": [("p", "B"), ("q", "A")]}),
    )
    assert [(a.rater, a.pair, a.outcome) for a in found] == [
        ("Ann", "p", "win"),
        ("Ann", "q", None),
    ]
    assert found[0].comment == ("'" if kind == "csv" else "") + comment


@needs_node
def test_names_of_files():
    assert (
        node('s.fileName({rater: " ../Ann \\"é\\"/x "}, "s1", ".csv")') == "answers-s1-Ann-é-x.csv"
    )
    assert node('s.fileName({rater: ""}, "s1", ".json")') == "answers-s1.json"


# -- In a browser ----------------------------------------------------------------------------

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def text_of(page, name):
    return page.evaluate(f"document.getElementById('{name}').textContent")


class TestInABrowser:
    pytestmark = in_a_browser

    @pytest.mark.parametrize("width", [1280, 390])
    def test_a_sheet_from_the_first_key_to_the_file(self, tmp_path, width):
        path = tmp_path / "sheet.html"
        path.write_text(sheet_page(SHEET))
        with browser(tmp_path, width=width) as page:
            page.open(path)
            title = page.evaluate("document.title")
            shown = []
            for at in range(5):
                shown.append((text_of(page, "a"), text_of(page, "b")))
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert text_of(page, "where") == f"Item {at + 1} of 5"
                page.press("ArrowRight")
            assert shown == [(i.a or "(empty)", i.b or "(empty)") for i in SHEET.items]
            assert page.evaluate("document.title") == title, "no foreign script ran"
            assert page.evaluate("document.images.length") == 0

            for _ in range(4):
                page.press("ArrowLeft")
            page.press("a")
            page.press("a", repeat=True)
            page.press("t")
            assert text_of(page, "where") == "Item 3 of 5"
            page.press("u")
            assert text_of(page, "progress") == "1 of 5 answered"
            assert text_of(page, "where") == "Item 2 of 5"
            page.press("c")
            page.write("about b")
            page.press("Escape")
            page.press("b")
            page.evaluate("document.getElementById('answer-tie').click()")
            assert text_of(page, "progress") == "3 of 5 answered"
            assert page.evaluate("document.activeElement.id") == "where"

            page.open(path)
            assert text_of(page, "progress") == "3 of 5 answered", "saved, and there again"
            assert text_of(page, "where") == "Item 4 of 5"
            page.press("ArrowLeft")
            page.press("ArrowLeft")
            assert page.evaluate("document.getElementById('comment').value") == "about b"
            pressed = "document.querySelector('[aria-pressed=true]').id"
            assert page.evaluate(pressed) == "answer-B"
            page.evaluate("document.getElementById('rater').focus()")
            page.write("Ann")
            assert text_of(page, "progress") == "3 of 5 answered", "the name is no answer"
            for kind in ("json", "csv"):
                page.evaluate(f"document.getElementById('save-{kind}').click()")
                page.wait("document.getElementById('saved').textContent.includes('was downloaded')")
                saved = tmp_path / f"answers-{SHEET.id}-Ann.{kind}"
                page.wait_for_file(saved)
                key = Key(
                    {str(i): pair for i, pair in enumerate(PAIRS)},
                    {SHEET.id: [(str(p.pair), p.ours) for p in PLACEMENTS]},
                )
                found = read_answers([saved], key)
                assert [a.choice for a in found] == ["A", "B", "tie", None, None]
                assert [a.outcome for a in found[:3]] == ["win", "win", "tie"]
                assert {a.rater for a in found} == {"Ann"}
            assert page.problems == []

    def test_without_storage_it_says_so(self, tmp_path):
        path = tmp_path / "sheet.html"
        path.write_text(sheet_page(SHEET))
        with browser(tmp_path) as page:
            page.before(
                "Object.defineProperty(window, 'localStorage', {get() {throw Error('no')}})"
            )
            page.open(path)
            hidden = "document.getElementById('no-storage').hidden"
            assert page.evaluate(hidden) is False
            page.press("a")
            assert page.evaluate(hidden) is False
            assert text_of(page, "progress") == "1 of 5 answered"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, tmp_path, scheme):
        """All text at least 4.5 to 1 against what it stands on (WCAG AA)."""
        path = tmp_path / "sheet.html"
        path.write_text(sheet_page(SHEET))
        with browser(tmp_path) as page:
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.call("Emulation.setEmulatedMedia", features=features)
            page.open(path)
            page.press("a")
            page.press("ArrowLeft")
            ratios = page.evaluate(CONTRAST)
            assert len(ratios) > 20
            assert min(ratio for _, ratio in ratios) >= 4.5, sorted(ratios, key=lambda r: r[1])[:3]


CONTRAST = """(() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const colour = rgb(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll("body *")]
        .filter((e) => e.offsetParent && !e.disabled && !e.closest(":disabled")
            && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((e) => {
            const [one, two] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
            return [e.tagName + " " + e.className + e.id,
                (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05)];
        });
})()"""
