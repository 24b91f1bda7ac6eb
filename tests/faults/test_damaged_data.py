"""Data files of every form with parts gone, of another type or flipped: records, or an error that says which file."""

import gzip
import json
import random
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook

from bloblora.data import DataError, read_records, sources
from tests.faults.test_altered_files import altered
from tests.tiny_base import QUESTIONS, queries

COLUMNS = ["text", "label"]
CELLS = [["a card", "x"], ["a parcel", "y"]]
ROWS = [dict(zip(COLUMNS, cells, strict=True)) for cells in CELLS]
CHOSEN = [{"result": [{"type": "choices", "value": {"choices": ["x"]}}], "was_cancelled": False}]
JSON = {
    "list": ROWS,
    "inside": {"data": ROWS},
    "split": {"columns": COLUMNS, "index": [0, 1], "data": CELLS},
    "by_row": {str(i): row for i, row in enumerate(ROWS)},
    "by_column": {name: {"0": "a", "1": "b"} for name in COLUMNS},
    "label_studio": [{"id": 1, "data": {"text": "a"}, "annotations": CHOSEN}],
    "arc": [{"question": "what", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}],
    "questions": QUESTIONS,
    "chats": [{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}],
    "tags": [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}],
    "claims": [{"prompt": "a", "response": "b c", "claims": ["b", [0, 1]], "right": True, "margin": 1.0}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole file of each form."""
    folder = tmp_path_factory.mktemp("data")
    for name, content in JSON.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "rasa.yml").write_text(
        "nlu:\n- intent: x\n  examples: |\n    - a [b](c)\n- {intent: y, examples: [- a]}\n"
    )
    (folder / "words.conll").write_text("a O\nb B-x\n\nc O\n")
    (folder / "rows.csv").write_text('text,label\na,x\n"b\nb",y\n')
    (folder / "rows.jsonl.gz").write_bytes(
        gzip.compress(b"".join(f"{json.dumps(row)}\n".encode() for row in queries()))
    )
    book = Workbook()
    for row in (COLUMNS, *CELLS):
        book.active.append(row)
    book.save(folder / "rows.xlsx")
    features = {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    (folder / "features.json").write_text(json.dumps({"info": {"features": features}}))
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    pq.write_table(table, folder / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder


def damaged(folder, generator, share):
    """Each file to read, once for each damage of a share of all."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        before, read = file.read_bytes(), folder / "saved" if file.parent.name == "saved" else file
        for content in altered(file, generator):
            if generator.random() > share:
                continue
            file.write_bytes(content)
            if file.name == "features.json":  # as the metadata of a Parquet file
                read = folder / "damaged.parquet"
                table = pq.read_table(folder / "rows.parquet")
                pq.write_table(table.replace_schema_metadata({b"huggingface": content}), read)
            yield read
            file.write_bytes(content[: generator.randrange(len(content))])
            yield read
        file.write_bytes(before)
    (folder / "damaged.parquet").unlink()


def damaged_parts(folder, generator, share):
    """The workbook, whose parts are packed: a flipped bit of the package is found by its checksum."""
    file = folder / "damaged.xlsx"
    with zipfile.ZipFile(folder / "rows.xlsx") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    for name, content in parts.items():
        for _ in range(round(100 * share)):
            flipped = bytearray(content)
            flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            with zipfile.ZipFile(file, "w") as package:
                for part, kept in parts.items():
                    package.writestr(part, bytes(flipped) if part == name else kept)
            yield file


def said_of(read):
    """What is wrong with a file; nothing where its records can be read."""
    try:
        read_records(read, require_labels=False)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("share", [0.03, pytest.param(1.0, marks=pytest.mark.long)])
def test_records_or_a_message(folder, share):
    generator = random.Random(0)
    for damages in (damaged, damaged_parts):
        for read in damages(folder, generator, share):
            if said := said_of(read):
                assert str(read) in said
                assert max(map(len, said.splitlines())) < 2_000


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("label_studio.json", '"value": {"choices": ["x"]}', '"value": 5', "'annotations': must be as Label Studio"),
        ("split.json", '"label"], "index"', '5], "index"', "the names in 'columns' must be texts, got 5"),
        ("saved/state.json", '"filename": ', '"name": ', "not readable as a folder that `datasets` saved: 'filename'"),
        ("saved/dataset_info.json", '"features": {', '"features": {"a": [], ', "not readable as a folder that"),
    ],
)
def test_what_a_message_says(folder, name, old, new, message):
    file = folder / name
    before = file.read_text()
    assert old in before
    file.write_text(before.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_records(folder / "saved" if "/" in name else file)
    file.write_text(before)


def _rows_gz(file, text):
    file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(f'{{"text": "{text}", "label": "x"}}\n'.encode() * 4))
    return file.with_suffix(".jsonl.gz")


def _one_line_gz(file, text):
    file.with_suffix(".json.gz").write_bytes(gzip.compress(f'[{{"text": "{text}", "label": "x"}}]'.encode()))
    return file.with_suffix(".json.gz")


def _sheet(file, text):
    book = Workbook()
    for cells in (COLUMNS, [text[:32_000], "x"], [text[:32_001], "y"]):
        book.active.append(cells)
    book.save(file.with_suffix(".xlsx"))
    return file.with_suffix(".xlsx")


def _sheet_gz(file, text):
    sheet = _sheet(file, text)
    packed = file.with_suffix(".xlsx.gz")
    packed.write_bytes(gzip.compress(sheet.read_bytes()))
    return packed


@pytest.mark.parametrize("make", [_rows_gz, _one_line_gz, _sheet, _sheet_gz])
def test_a_file_that_unpacks_to_a_thousand_times_its_size(tmp_path, monkeypatch, make):
    file = make(tmp_path / "bomb", "a" * 500_000)
    assert len(read_records(file)) > 0  # both limits: a small file may be packed as well as can be
    monkeypatch.setattr(sources, "_MOST_UNPACKED", 50_000)
    monkeypatch.setattr(sources, "_MOST_TIMES", 7)
    with pytest.raises(DataError, match=r"bomb\.\S+: unpacks to more than 7 times its size; .* give it unpacked"):
        read_records(file)
