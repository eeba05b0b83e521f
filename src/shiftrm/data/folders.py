"""Which files of a folder are data, and of which split."""

import re
from pathlib import Path

from shiftrm.errors import UserError

__all__ = ["SUFFIXES", "files_of", "is_saved"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz")
"""Ends of names of files that `sources` reads."""

PACKED = (".json.gz", ".csv.gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tsv", ".arrow", ".ndjson")
"""Ends of names of data that is not read here; in a folder it would be lost in silence."""


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split that are read here; none where the folder is for `datasets` alone.

    Raises:
        UserError: no such split, or files beside them that neither can read along.
    """
    import datasets.data_files

    card = folder / "README.md"
    configured = card.is_file() and "\nconfigs:" in card.read_text("utf-8", "replace")
    if configured or is_saved(folder):
        return []
    try:
        patterns = datasets.data_files.get_data_patterns(str(folder))
    except datasets.data_files.EmptyDatasetError:
        return []
    # By name, as the shell lists them; what else lies there (a licence, notes) is no data.
    found = {
        str(name): [Path(file) for file in sorted(files)]
        for name, files in datasets.data_files.DataFilesDict.from_patterns(
            patterns, base_path=str(folder)
        ).items()
    }
    ours = {name: [f for f in files if _is_data(f)] for name, files in found.items()}
    if not any(ours.values()):
        return []
    for file in (file for files in found.values() for file in files):
        if file.name.lower().endswith(PACKED):
            raise UserError(
                f"{file}: cannot be read beside the other files of its folder; give files that end "
                f"in {', '.join(SUFFIXES)}, or take it away"
            )
    if split not in found:
        if re.search(r"[\[+]", split):  # "train[:100]" is for `datasets`
            return []
        raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(map(repr, found))}")
    return ours[split]


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
