"""Finds the data files of a folder and the split that each belongs to."""

import re
from pathlib import Path

from shiftrm.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz")
"""Suffixes of files that `sources` reads."""

PACKED = (".json.gz", ".csv.gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tsv", ".arrow", ".ndjson")
"""Suffixes of data that `sources` cannot read and would skip silently in a folder."""


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split; none if only `datasets` can load the folder.

    Raises:
        UserError: no such split, or further data files that `sources` cannot read.
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
    # Sorted by name; other files in the folder (a licence, notes) are not data.
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
                f"in {', '.join(SUFFIXES)}, or remove it"
            )
    if split not in found:
        if re.search(r"[\[+]", split):  # "train[:100]" is for `datasets`
            return []
        raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(map(repr, found))}")
    return ours[split]


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
