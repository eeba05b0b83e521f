"""Seeds on the command lines of the studies."""

from shiftrm.errors import UserError


def seeds_of(word: str, wrong: str) -> range:
    """Return the seeds of "3" or "0-9".

    Args:
        wrong: what to say of anything else.

    Raises:
        UserError: with `wrong`.
    """
    first, _, last = word.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise UserError(wrong)
    return range(int(first), int(last or first) + 1)
