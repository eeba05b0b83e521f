"""English word lists of the text features."""

import re

_FUNCTION = """
the and for are was were been being have has had having does did doing done will would shall
should can could may might must not but nor yet than then that this these those there here who
whom whose which what when where why how you your yours yourself him his himself her hers herself
its itself our ours ourselves they them their theirs themselves she with from into onto over under
about after before between through during against above below out off again once only own same too
very just also because while until although though unless whether both each few more most other
some such any all one ones don't doesn't didn't isn't aren't wasn't weren't can't couldn't won't
wouldn't shouldn't i'm i've i'll it's that's let's get got
"""
_HEDGING = """
maybe perhaps possibly probably apparently somewhat presumably seemingly arguably might seems seem
appears likely unsure
"""

FUNCTION_WORDS = frozenset(_FUNCTION.split())
"""Words that say little about a subject. Those of two letters are not needed here."""

HEDGES = frozenset(_HEDGING.split())
"""Words by which a response commits itself less."""

REFUSAL = re.compile(
    r"""\bI(?:['\u2019]m|\ am)\ (?:very\ |so\ )?(?:sorry|afraid|unable)\b
    |\bI\ (?:can(?:no|['\u2019])t|can\ not|won['\u2019]t|will\ not|do\ not|don['\u2019]t)
        \ (?:help|assist|answer|provide|comply|do\ that|feel\ comfortable
        |have\ (?:access|enough|any|personal))\b
    |\bas\ an\ (?:AI|artificial|language)\b
    |\bI(?:['\u2019]m|\ am)\ (?:just\ |only\ )?an\ AI\b
    |\bI\ (?:do\ not|don['\u2019]t)\ (?:know|think\ I\ can)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""A phrase of a response that refuses, or cannot answer."""
