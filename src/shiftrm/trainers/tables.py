"""Convert rows to the tables that trainers take."""

from collections.abc import Sequence

from datasets import Dataset

from shiftrm.errors import UserError
from shiftrm.files import Row, encodable

__all__ = ["table"]


def table(source: str, rows: list[Row], columns: Sequence[str]) -> Dataset:
    """Return a table of the columns that training reads.

    Args:
        source: for errors.

    Raises:
        UserError: rows whose columns have several types.
    """
    kept = [{c: encodable(row[c]) for c in columns if c in row} for row in rows]
    try:
        return Dataset.from_list(kept)
    except (TypeError, ValueError, NotImplementedError) as error:  # from Arrow
        words = str(error).partition("\n")[0]
        raise UserError(f"{source}: the rows do not fit one table ({words})") from None
