"""The one exception that means: the input is at fault, and here is what to do."""


class UserError(ValueError):
    """Bad input, said to a person: one line that names what, where and what to do.

    The command line prints it without a traceback and exits with status 2; in Python it is an
    ordinary exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def printable(text: str) -> str:
    """Foreign text for a terminal: control characters, which could rule it, as `\\x1b` and such."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def shortened(text: str, length: int = 80) -> str:
    """Foreign text for an error, which is one line to be read: its beginning, if it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def suggest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known words, or a list of them, or nothing."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
