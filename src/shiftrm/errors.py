"""The exception for invalid user input, and functions that word its message."""


class UserError(ValueError):
    """Raised for invalid user input.

    The message is one line: what is wrong, where, and how to fix it. The command line prints it
    without a traceback and exits with status 2; in Python it is an ordinary exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def printable(text: str) -> str:
    """Escape control characters, which could control the terminal, as `\\x1b` and the like."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def shortened(text: str, length: int = 80) -> str:
    """Cut text to `length` characters, for a one-line error."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def suggest(word: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` if a known word is close, else a list of the known words."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def missing_embedding(error: IndexError) -> UserError | None:
    """Return torch's error for a token without an embedding in words; None for any other error."""
    if str(error) != "index out of range in self":
        return None
    return UserError(
        "a token has no embedding: the tokenizer is not the model's; use the model and tokenizer "
        "that were saved together"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
