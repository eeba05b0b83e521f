"""A blind sheet -> one self-contained page for a rater: no network, foreign text escaped."""

import base64
import hashlib
import json

from shiftrm.measure.people.blinding import Sheet
from shiftrm.report.page import page_template

QUESTION = "Which response is better?"


def sheet_page(sheet: Sheet, *, question: str = QUESTION) -> str:
    """The page as text; the same sheet, the same text.

    The texts stand in the page as JSON in which no character can end the element they stand in,
    and the script puts them on the screen as text, never as markup. Only this script may run: the
    page's policy names its hash.
    """
    script = page_template("sheet.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content = {
        "id": sheet.id,
        "items": [
            {"turns": [list(turn) for turn in item.turns], "a": item.a, "b": item.b}
            for item in sheet.items
        ],
    }
    return page_template("sheet.html.j2").render(
        question=question,
        count=len(sheet.items),
        script=script,
        script_hash=f"sha256-{digest}",
        data=json_for_html(content),
    )


def json_for_html(content: object) -> str:
    """JSON that is safe within a script element, in ASCII."""
    text = json.dumps(content, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
