"""A blind sheet as a self-contained page for a rater; foreign text is escaped."""

import base64
import hashlib
import json

from shiftrm.measure.people.blinding import Sheet
from shiftrm.report.page import page_template

QUESTION = "Which response is better?"


def sheet_page(sheet: Sheet, *, question: str = QUESTION) -> str:
    """Return the page's HTML, which depends only on the sheet.

    The texts are embedded as JSON that cannot close its script element, and shown as text, not
    markup. The content security policy allows only this script, by its hash.
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
    """Return ASCII JSON that is safe within a script element."""
    text = json.dumps(content, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
