"""Every format gives the same rows, and what cannot be read is named by file and line or row."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import read_pairs
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import json_line, write_jsonl

CHAT = [{"role": "user", "content": "über 🌹"}]
ANSWER = [{"role": "assistant", "content": "yes"}]
CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
TEXT_PAIRS = [
    {"prompt": "the", "chosen": "a, b", "rejected": 'say "c"\nor d'},
    {"chosen": "[1] is a list", "rejected": "no"},
]
CHAT_PAIRS = [
    {"prompt": CHAT, "chosen": ANSWER, "rejected": CALL},
    {"prompt": CHAT, "chosen": CALL, "rejected": ANSWER, "id": "x"},
]
GROUPS = [
    {"prompt": "the", "responses": ["a", "b\nc"], "finished": [True, False]},
    {"prompt": "x", "responses": ["d", "e", ""]},
]


def write(path, rows):
    """The rows in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(map(json_line, rows)).encode()))
        return path
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_same_keys(rows)), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as handle:
            writer = csv.DictWriter(handle, list(_same_keys(rows)[0]))
            writer.writeheader()
            for row in rows:
                cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(cells)
    else:
        table = datasets.Dataset.from_list(_same_keys(rows))
        if path.name == "disk":
            table.save_to_disk(path)
        elif path.name == "splits":
            datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(path)
        else:
            path.mkdir()
            table.to_parquet(path / "train-00000.parquet")
            table.select([0]).to_parquet(path / "test-00000.parquet")
    return path


def _same_keys(rows):
    return [{key: row.get(key) for other in rows for key in other} for row in rows]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet", "x.csv", "folder", "disk", "splits"]
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    for number, (rows, reader) in enumerate(
        [(TEXT_PAIRS, read_pairs), (CHAT_PAIRS, read_pairs), (GROUPS, read_groups)]
    ):
        (tmp_path / str(number)).mkdir()
        read = reader(write(tmp_path / str(number) / name, rows))
        if name == "x.csv" and rows is CHAT_PAIRS:
            assert read[0].pop("id") == "", "an empty cell of a column of one's own"
        assert read == rows


def test_where_rows_stand(tmp_path):
    rows = [{"chosen": "a\nb", "rejected": "c"}, {"chosen": "d", "rejected": "e"}]
    for name, expected in {
        "x.jsonl": ["x.jsonl:1", "x.jsonl:2"],
        "x.jsonl.gz": ["x.jsonl.gz:1", "x.jsonl.gz:2"],
        "x.csv": ["x.csv:2", "x.csv:4"],  # the header, and a row of two lines
        "x.json": ["x.json: row 1", "x.json: row 2"],
        "x.parquet": ["x.parquet: row 1", "x.parquet: row 2"],
        "folder": ["train-00000.parquet: row 1", "train-00000.parquet: row 2"],
        "disk": ["disk[train] row 1", "disk[train] row 2"],
    }.items():
        found = [where for where, _ in iterate_rows(write(tmp_path / name, rows))]
        assert [where.rsplit("/", 1)[1] for where in found] == expected


def test_splits(tmp_path):
    for name in ("folder", "splits"):
        path = write(tmp_path / name, TEXT_PAIRS)
        for source, split in ((path, "test"), (f"{path}::test", "train")):
            [(where, _)] = iterate_rows(source, split=split)
            at = "/test-00000.parquet:" if name == "folder" else "[test]"
            assert where == f"{path}{at} row 1"
        with pytest.raises(UserError, match=r"split .*nope.* (one of|has) .*train"):
            list(iterate_rows(f"{path}::nope"))


def test_a_folder_of_several_files(tmp_path):
    """Their columns and their formats may differ; each is read as it is by itself."""
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    rows = [{"chosen": f"c{n}", "rejected": "no", f"own{n}": n} for n in range(5)]
    write(folder / "a.jsonl", rows[:1])
    write(folder / "b.csv", [{**rows[1], "own1": "1"}])
    write(folder / "c.jsonl.gz", rows[2:3])
    write(folder / "d.parquet", rows[3:4])
    write(folder / "more" / "e.json", rows[4:])
    (folder / "README.md").write_text("# Mine")
    (folder / "LICENSE").write_text("MIT")
    (folder / ".hidden.jsonl").write_text("{")
    rows[1]["own1"] = "1"
    assert read_pairs(folder) == rows
    assert [where.rpartition("/")[2] for where, _ in iterate_rows(f"{folder}::train")] == [
        "a.jsonl:1", "b.csv:2", "c.jsonl.gz:1", "d.parquet: row 1", "e.json: row 1",
    ]  # fmt: skip
    write(folder / "f.jsonl", [{"chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match=r"folder/f\.jsonl:1: chosen and rejected are equal"):
        read_pairs(folder)
    (folder / "f.jsonl").rename(folder / "f.jsonl.zst")
    with pytest.raises(UserError, match=r"f\.jsonl\.zst: cannot be read beside the other files"):
        read_pairs(folder)
    (folder / "f.jsonl.zst").unlink()
    with pytest.raises(UserError, match=r"folder: has no split 'test'; it has 'train'"):
        list(iterate_rows(folder, split="test"))


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pairs.jsonl", TEXT_PAIRS)
    write(tmp_path / "folder", TEXT_PAIRS)
    assert read_pairs("~/pairs.jsonl") == TEXT_PAIRS
    assert read_pairs("~/folder::train") == read_pairs("~/folder") == TEXT_PAIRS


def test_one_folder_of_a_folder(tmp_path):
    """As data sets on the hub are laid out that keep their subsets apart; through `datasets`."""
    for part, rows in (("base", TEXT_PAIRS), ("online", TEXT_PAIRS[:1])):
        (tmp_path / "hub" / part).mkdir(parents=True)
        for split in ("train", "test"):
            write(tmp_path / "hub" / part / f"{split}.jsonl.gz", rows)
    [(where, row)] = iterate_rows(tmp_path / "hub", data_dir="online", split="test")
    assert (where, row) == (f"{tmp_path}/hub/online[test] row 1", TEXT_PAIRS[0])
    assert len(list(iterate_rows(tmp_path / "hub", data_dir="base"))) == 2


@pytest.mark.parametrize(
    "content",
    [
        '{"version": 1, "data": [{"a": 1}, {"a": 2}]}',
        '{"a": 1}\n{"a": 2}\n',
        '\ufeff[{"a": 1}, {"a": 2}]',
    ],
)
def test_the_other_shapes_of_json(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert [row for _, row in iterate_rows(tmp_path / "x.json")] == [{"a": 1}, {"a": 2}]


def test_a_json_file_of_one_chat(tmp_path):
    row = {"prompt": CHAT, "response": "yes", "tools": [{"name": "f"}]}
    (tmp_path / "x.json").write_text(json.dumps(row))
    assert [row for _, row in iterate_rows(tmp_path / "x.json")] == [row]


def test_spreadsheets_write_booleans_in_capitals(tmp_path):
    (tmp_path / "x.csv").write_text("chosen,rejected,margin,chosen_finished\na,b,2,FALSE\nc,d,,\n")
    rows = [row for _, row in iterate_rows(tmp_path / "x.csv")]
    assert rows[0] == {"chosen": "a", "rejected": "b", "margin": 2, "chosen_finished": False}
    assert rows[1] == {"chosen": "c", "rejected": "d"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a", r"x\.txt: cannot read \.txt files; give one of \.jsonl, \.json, "),
        ("x.csv.gz", b"a", r"cannot read \.gz files"),
        ("x.jsonl.gz", b"a", r"x\.jsonl\.gz: not a whole gzip file after line 0"),
        ("x.json", b'[{"a": 1}', r"x\.json:1: not valid JSON at column 10"),
        ("x.json", b'[\n{"a": "\xff"}]', r"x\.json:2: not valid UTF-8"),
        ("x.json", b"[1]", r"x\.json: row 1: expected a JSON object, found int"),
        ("x.json", b"3", r"x\.json: expected a list of objects, found int"),
        ("x.json", b'{"a": [{"b": 1}], "c": [{"b": 1}]}', r"several lists of objects \(a, c\)"),
        ("x.json", b'[{"b": 1}]', r"x\.json: row 1: column 'a' is missing; the row has 'b'"),
        ("x.json", b'{"a": 1}\n{"a": \n', r"x\.json:2: not valid JSON"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x\.csv:3: 3 cells for 2 columns"),
        ("x.csv", b'a,b\n1,"2\n', r"x\.csv:2: not valid CSV \(unexpected end of data\)"),
        ("x.csv", b"a,b\n1,\xff\n", r"x\.csv:2: not valid UTF-8 at byte 3"),
        ("x.csv", b"a,a\n", r"x\.csv:1: two columns are called 'a'"),
        ("x.csv", b"b\n1\n", r"x\.csv:2: column 'a' is missing"),
        ("x.csv", b"a,responses\n1,\"['x']\"\n", r"x\.csv:2: column 'responses' is not valid JSON"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet: not a whole Parquet file after row 0"),
        ("x.parquet", b"", r"x\.parquet: not a whole Parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(iterate_rows(tmp_path / name, required=("a",)))


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.jsonl"])
def test_empty_files_have_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert list(iterate_rows(tmp_path / name)) == []
    with pytest.raises(UserError, match="no preference pairs"):
        read_pairs(tmp_path / name)


def test_a_truncated_parquet_file(tmp_path):
    path = write(tmp_path / "x.parquet", TEXT_PAIRS * 100)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"x\.parquet: not a whole Parquet file after row 0"):
        list(iterate_rows(path))


def test_bad_rows_of_parquet_are_named(tmp_path):
    path = write(tmp_path / "x.parquet", [*TEXT_PAIRS, {"chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match=r"x\.parquet: row 3: chosen and rejected are equal"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", r"nobody/nothing: cannot be downloaded \(.*give a local file"),
        ("nobody/nothing:helpful:test", "nobody/nothing: cannot be downloaded"),
        ("data/pairs.jsonl", r"data/pairs\.jsonl: no such file; check the path"),
        ("nothing", "nothing: no such file"),
        ("/some/where/else", "/some/where/else: no such file"),
    ],
)
def test_sources_that_are_not_there(source, message):
    """The hub is out of reach in tests."""
    with pytest.raises(UserError, match=message):
        list(iterate_rows(source))


def test_folders_that_are_no_data_sets(tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded as a data set .*any data files"):
        list(iterate_rows(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"train\.jsonl:2: not valid JSON"):
        list(iterate_rows(tmp_path))


def test_columns_of_ones_own_stay_writable(tmp_path):
    """Dates and bytes become text: what is read can be written as JSON again."""
    import datetime

    rows = [{"when": datetime.date(2026, 11, 21), "raw": b"x", "score": 0.5}]
    path = write(tmp_path / "x.parquet", rows)
    read = [row for _, row in iterate_rows(path)]
    assert read == [{"when": "2026-11-21", "raw": "b'x'", "score": 0.5}]
    write_jsonl(tmp_path / "y.jsonl", read)


@pytest.mark.parametrize("column", ["conversations", "completions", "summaries"])
def test_the_lists_inside_one_row_are_no_rows(tmp_path, column):
    row = {"id": 1, column: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "one.json").write_text(json.dumps(row))
    assert [found for _, found in iterate_rows(tmp_path / "one.json")] == [row]


def bad_text(rows=1030, at=1025):
    """A table with a text that is no UTF-8, in the second batch that is read."""
    texts = [b"fine"] * rows
    texts[at - 1] = b"\xff\xfe"
    column = pyarrow.array(texts, type=pyarrow.binary()).cast(pyarrow.string(), safe=False)
    return pyarrow.table({"prompt": ["the"] * rows, "response": column})


def test_parquet_text_that_is_no_utf8_is_named_by_row_and_column(tmp_path):
    pyarrow.parquet.write_table(bad_text(), tmp_path / "x.parquet")
    rows = iterate_rows(tmp_path / "x.parquet")
    assert next(rows)[1] == {"prompt": "the", "response": "fine"}
    message = r"x\.parquet: row 1025: column 'response': text that is not valid UTF-8; write it"
    with pytest.raises(UserError, match=message):
        list(rows)


def test_saved_text_that_is_no_utf8_is_named_by_row(tmp_path):
    datasets.Dataset(bad_text()).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved\[train\] row 1025: text that is not valid UTF-8"):
        list(iterate_rows(tmp_path / "saved"))


def test_a_parquet_date_that_python_cannot_hold_is_named(tmp_path):
    dates = pyarrow.array([0, 2**40], type=pyarrow.int64()).cast(pyarrow.timestamp("s"))
    table = pyarrow.table({"prompt": ["a", "b"], "at": dates})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 2: column 'at': a value cannot be read"):
        list(iterate_rows(tmp_path / "x.parquet"))


def test_a_csv_number_of_too_many_digits_is_named(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,responses\nthe,[{'9' * 5000}]\n")
    with pytest.raises(UserError, match=r"x\.csv:2: column 'responses' is .*number too long"):
        list(iterate_rows(tmp_path / "x.csv"))
