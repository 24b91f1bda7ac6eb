"""Files of every form give the same records, and what is wrong in them is named by file, line, field and value."""

import io
import json
import math
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from bloblora.data import DataError, Known, as_records, kind_of, read_batches, read_records
from bloblora.data.records import record_kind
from bloblora.messages import quoted
from tests.tiny_base import write_jsonl

TEXTS = [{"text": "wo ist mein päckchen, bitte?", "label": "parcel"}, {"text": 'a "quote"\nand a line', "label": "7"}]
QUESTIONS = [
    {"question": "Gas?", "choices": ["iron", "carbon, dioxide", "sand"], "answer": 1},
    {"question": "Which?", "choices": ["this", "that", "none"], "answer": 2},
]


UNQUOTED = "a cell that begins with a quote must end with the next one"


def as_jsonl(records, folder):
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


def as_json(records, folder):
    file = folder / "data.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return file


def as_table(separator, flat=True):
    def write(records, folder):
        columns = [
            {k: v for k, v in r.items() if k != "choices"}
            | (
                {f"choice_{i}": c for i, c in enumerate(r["choices"])}
                if flat
                else {"choices": json.dumps(r["choices"])}
            )
            if "choices" in r
            else r
            for r in records
        ]
        file = folder / ("data.csv" if separator == "," else "data.tsv")
        pd.DataFrame(columns).to_csv(file, sep=separator, index=False)
        return file

    return write


def as_parquet(records, folder):
    file = folder / "data.parquet"
    parquet.write_table(pa.Table.from_pylist(records), file)
    return file


def as_pandas_parquet(records, folder):
    frame = pd.DataFrame(records)
    if "choices" in frame:
        frame["choices"] = frame["choices"].map(np.array)
        frame["answer"] = frame["answer"].astype(float)  # as pandas has it once one was missing
    file = folder / "frame.parquet"
    frame.to_parquet(file)
    return file


def as_dataset(records, folder):
    Dataset.from_list(records).save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = [as_jsonl, as_json, as_table(","), as_table("\t"), as_parquet, as_pandas_parquet, as_dataset]


def problems_of(file, content, **options):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_records(file, **options)
    return caught.value.problems


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("records", [TEXTS, QUESTIONS], ids=["texts", "questions"])
def test_every_form(write, records, tmp_path):
    assert read_records(write(records, tmp_path)) == records


def test_choices_as_json_in_a_table(tmp_path):
    assert read_records(as_table(",", flat=False)(QUESTIONS, tmp_path)) == QUESTIONS


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('["late", "damaged"]', ["late", "damaged"]),
        ("['late', 'damaged']", ["late", "damaged"]),
        (" ['late',\n 'damaged'] ", ["late", "damaged"]),
        ("""["customer's", 'a "b"', 3]""", ["customer's", 'a "b"', "3"]),
        ("[]", []),
        ("late; damaged", ["late", "damaged"]),
        ("['late' 'damaged']", None),
        ("[late, damaged]", None),
        ("['late', ['damaged']]", None),
        ("['late', None]", None),
    ],
)
def test_several_labels_in_a_cell(cell, labels, tmp_path):
    pd.DataFrame([{"text": "a", "labels": cell}]).to_csv(file := tmp_path / "data.csv", index=False)
    if labels is None:
        with pytest.raises(DataError) as caught:
            read_records(file)
        assert f"field 'labels': {quoted(cell)} must be a list of texts, which may be empty" in str(caught.value)
    else:
        assert read_records(file) == [{"text": "a", "labels": labels}]


def test_lists_as_python_prints_them(tmp_path):
    frame = pd.DataFrame(QUESTIONS)
    frame.to_csv(tmp_path / "data.csv", index=False)
    assert read_records(tmp_path / "data.csv") == QUESTIONS


def test_questions_of_a_table_may_have_fewer_choices(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("question,choice_0,choice_1,choice_2,answer\nGas?,a,b,,1\n")
    assert read_records(file) == [{"question": "Gas?", "choices": ["a", "b"], "answer": 1}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a", "label": "b"}\n'),
        ("crlf.jsonl", b'{"text": "a", "label": "b"}\r\n\r\n'),
        ("blank.jsonl", b'\n  \n{"text": "a", "label": "b"}\n\n'),
        ("bom.csv", b"\xef\xbb\xbftext,label\r\na,b\r\n"),
        ("blank.tsv", b"text\tlabel\n\na\tb\n"),
        ("bom.json", b'\xef\xbb\xbf[{"text": "a", "label": "b"}]'),
        ("UPPER.JSONL", b'{"text": "a", "label": "b"}'),
    ],
)
def test_what_editors_leave(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_records(tmp_path / name) == [{"text": "a", "label": "b"}]


@pytest.mark.parametrize(
    "text",
    [
        "Dear team,\nbye",
        "a, b\nc, d\ne",
        'say "a"',
        '"a", b',
        '5" wide',
        "f:\n\treturn",
        "f:\n\tif a:\n\t\treturn",
        "\n",
    ],
)
@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("columns", [["text", "label"], ["label", "text"]])
def test_any_text_in_quotes(text, separator, columns, tmp_path):
    record = {"text": f"{text}.", "label": "a"}
    pd.DataFrame([record] * 2)[columns].to_csv(file := tmp_path / "data.csv", sep=separator, index=False)
    assert read_records(file) == [record] * 2


@pytest.mark.parametrize(
    ("label", "text"), [(3, "3"), (3.0, "3"), (0.5, "0.5"), (True, "true"), (False, "false"), ("3", "3")]
)
def test_labels_become_texts(label, text, tmp_path):
    assert read_records(as_jsonl([{"text": "a", "label": label}], tmp_path))[0]["label"] == text


@pytest.mark.parametrize(("answer", "index"), [("1", 1), (" 1 ", 1), ("B", 1), ("c", 2), (2.0, 2)])
def test_answers_as_text_and_letter(answer, index, tmp_path):
    file = as_jsonl([{"question": "q", "choices": ["x", "y", "z"], "answer": answer}], tmp_path)
    assert read_records(file)[0]["answer"] == index


@pytest.mark.parametrize("answer", [3, -1, True, 1.5, "D", "w", "²", "9" * 5000, [1]])
def test_answers_that_are_no_index(answer, tmp_path):
    file = as_jsonl([QUESTIONS[0], {"question": "q", "choices": ["x", "y", "z"], "answer": answer}], tmp_path)
    with pytest.raises(DataError) as caught:
        read_records(file)
    text = ", nor the letter or the text of exactly one" if isinstance(answer, str) else ""
    problem = f"{file}:2: field 'answer': {quoted(answer)} is not an index into 3 choices (0..2){text}"
    assert caught.value.problems == [problem]


def test_a_letter_that_is_also_a_choice_is_not_guessed(tmp_path):
    file = as_jsonl([{"question": "Which letter?", "choices": ["B", "A"], "answer": "A"}], tmp_path)
    with pytest.raises(DataError, match="field 'answer': 'A'"):
        read_records(file)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_label_in_parquet(missing, tmp_path):
    column = pa.array([1.0, missing], from_pandas=False)
    parquet.write_table(pa.table({"text": ["a", "b"], "label": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 2: field 'label': missing"):
        read_records(tmp_path / "x.parquet")
    assert read_records(tmp_path / "x.parquet", require_labels=False)[1] == {"text": "b"}


def test_all_problems_at_once_with_line_field_and_value(tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = [
        '{"text": "fine", "label": "a"}',
        '{"text": "", "label": "a"}',
        "",
        '{"text": "no label"}',
        '{"text": 5, "label": {"a": 1}}',
        "{oops}",
        '"a text alone"',
        "[1]",
        '{"body": "x"}',
        '{"question": "q", "choices": ["one"], "answer": 0}',
        '{"question": "q", "choices": ["a", "b"], "answer": 0}',
        '{"text": "half \\ud800", "label": "a"}',
    ]
    assert problems_of(file, "\n".join(lines)) == [
        f"{file}:2, 5: field 'text': '', 5 must be a text that isn't empty",
        f"{file}:4: field 'label': missing; each training or evaluation record needs one",
        f"{file}:5: field 'label': {{'a': 1}} must be a text that isn't empty",
        f"{file}:6: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        f"{file}:7: 'a text alone' is not a JSON object",
        f"{file}:8: [1] is not a JSON object",
        f"{file}:9: it has body; it must have 'text' (and 'label', 'labels' or 'value'), 'tokens' (and 'tags'), "
        "'question' and 'choices' (and 'answer'), 'chosen' and 'rejected' (and 'prompt'), 'prompt' (and 'response'), "
        "or 'messages'",
        f"{file}:10: field 'choices': ['one'] must be a list of at least 2 texts",
        f"{file}:11: it has 'question', those before 'text'; keep the kinds in separate files",
        f"{file}:12: field 'text': 'half \\ud800' has half a surrogate pair, which is no text",
    ]


def test_the_same_problem_of_many_rows_is_one_line(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "x"}\n' * 50)
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert str(caught.value) == (
        f"{file}:1, 2, 3, 4, 5 and 45 more: field 'label': missing; each training or evaluation record needs one; its "
        "columns are text: name one with --label-column"
    )


def test_a_long_list_of_problems_is_cut_in_the_message_alone(tmp_path):
    lines = [json.dumps({"question": "q", "choices": ["a", "b"], "answer": "b"} | {f"extra {i}": 0}) for i in range(50)]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([lines[0], *(line.replace('"question"', '"ask"') for line in lines[1:])]))
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert len(caught.value.problems) == 49
    assert len(str(caught.value).splitlines()) == 21
    assert "29 more problems" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("half.csv", "text,label\nä,ß\ncafé,b\n".encode() + b"caf\xe9,b\n", ":4: not UTF-8: byte 0xe9"),
        ("cut.utf16.csv", "text,label\na,b".encode("utf-16")[:-1], ": not readable as utf-16"),
        ("not.csv.gz", b"text,label\n", ": not readable as gzip"),
        ("not.xlsx", b"PK", ": not readable as .xlsx"),
        ("not.yml", b"a: [", ": not readable as YAML"),
        ("other.yml", b"a: 1", ": must be Rasa's NLU data"),
        ("cells.csv", b"text,label\na,b\na, and more,b\n", ":3: more cells than the header has columns: ['b']"),
        (
            "twice.csv",
            b"text,label,text\na,b,\n",
            ":1: column 'text' is there twice; rename one of both, or take it out",
        ),
        ("long.csv", b"text,label\na,b\n" + b"a " * 70_000 + b",b\n", ":3: not a table: a cell has more than 131,072"),
        ("long_header.csv", b"a" * 140_000, ":1: not a table: a cell has more than 131,072 characters"),
        ("open.tsv", b'text\tlabel\na\tb\n"c\td\n\nsay "e"\tf\n', f":3: not a table: {UNQUOTED}"),
        ("open.csv", b'text,label\na,b\n\n"c,d\ne,f\n', f":4: not a table: {UNQUOTED}"),
        ("closed.tsv", b'text\tlabel\n"c\td\ne\tf\n5"\tb\n', f":2: a cell holds the cells of other rows; {UNQUOTED}"),
        ("closed.tsv", b'label\ttext\nd\t"c\nf\te\nb\t5"\n', f":2: a cell holds the cells of other rows; {UNQUOTED}"),
        ("header.csv", b"text,label\n", ": there are no records in it"),
        ("empty.jsonl", b"\n", ": there are no records in it"),
        ("cut.json", b'[{"text": "a",\n "label"', ":2: not valid JSON"),
        ("object.json", b'{"text": "a"}', ": must hold a list of objects, or an object with exactly one such list"),
        ("two.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', ": must hold a list of objects, or an object"),
        (
            "lines.json",
            b'{"text": "a"}\n{"text": "b"}',
            ":2: not valid JSON: Extra data; name a file of JSON lines .jsonl",
        ),
        ("item.json", b'[{"text": "a", "label": "b"}, 3]', ": item 2: 3 is not a JSON object"),
        ("not.parquet", b"PAR", ": not readable as Parquet"),
        ("deep.jsonl", b"[" * 100_000, ":1: not valid JSON"),
        ("choices.csv", b'question,choices,answer\nq,"a, b",0\n', ":2: field 'choices': 'a, b' must be a list"),
    ],
)
def test_files_that_cannot_be_read(name, content, problem, tmp_path):
    found = problems_of(tmp_path / name, content)
    assert len(found) == 1
    assert found[0].startswith(f"{tmp_path / name}{problem}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "data 'nowhere.jsonl': no such file or folder, and not one of support_desk, winogrande_s"),
        ("support_desk:dev", "split 'dev' is not one of train, validation, test, out_of_scope"),
    ],
)
def test_unknown_names(source, message):
    with pytest.raises(DataError, match=message):
        read_records(source)


def test_unknown_ending_and_folder(tmp_path):
    (tmp_path / "data.docx").touch()
    with pytest.raises(DataError, match=r"ending '\.docx' is not one of \.jsonl"):
        read_records(tmp_path / "data.docx")
    with pytest.raises(DataError, match="not readable as a folder that `datasets` saved"):
        read_records(tmp_path)


def test_a_folder_with_splits_names_them(tmp_path):
    DatasetDict(train=Dataset.from_list(TEXTS), test=Dataset.from_list(TEXTS[:1])).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=f"several splits; give one of {tmp_path}/d/train, {tmp_path}/d/test"):
        read_records(tmp_path / "d")
    assert read_records(tmp_path / "d" / "test") == TEXTS[:1]


def test_a_file_in_a_folder_named_mmlu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mmlu").mkdir()
    as_jsonl(QUESTIONS, tmp_path / "mmlu")
    assert read_records("mmlu/data.jsonl") == QUESTIONS


def stdin(monkeypatch, stream):
    # latin-1, because a terminal's encoding need not be UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream, encoding="latin-1"))


def test_standard_input(monkeypatch):
    stdin(monkeypatch, io.BytesIO(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in TEXTS)))
    assert read_records("-") == TEXTS


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input: there are no records"), (b"\n{}", "standard input:2: it has nothing")],
)
def test_bad_standard_input(content, message, monkeypatch):
    stdin(monkeypatch, io.BytesIO(content))
    with pytest.raises(DataError, match=message):
        read_records("-", require_labels=False)


def test_standard_input_is_not_read_further_than_a_batch(monkeypatch):
    class Endless(io.RawIOBase):
        served = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            line = b'{"text": "abc"}\n'
            buffer[: len(line)] = line
            self.served += 1
            return len(line)

    endless = Endless()
    stdin(monkeypatch, io.BufferedReader(endless, buffer_size=64))
    batches = read_batches("-", 10, require_labels=False)
    assert next(batches) == [{"text": "abc"}] * 10
    assert endless.served < 30
    assert len(next(batches)) == 10


def test_batches_of_a_file(tmp_path):
    file = as_jsonl([{"text": str(i)} for i in range(7)], tmp_path)
    assert [len(b) for b in read_batches(file, 3, require_labels=False)] == [3, 3, 1]
    file.write_text('{"text": "a"}\n' * 9 + "{}")
    with pytest.raises(DataError, match=":10: it has nothing"):
        next(read_batches(file, 3, require_labels=False))


def test_kinds():
    assert kind_of(TEXTS) == "text"
    assert kind_of(QUESTIONS) == "choice"
    with pytest.raises(DataError, match="several kinds: some have 'question', some have 'text'"):
        kind_of([*TEXTS, *QUESTIONS])
    with pytest.raises(DataError, match="no records"):
        kind_of([])
    with pytest.raises(DataError, match="a record must have 'text'"):
        kind_of([{"body": "x"}])


def test_fields_of_several_kinds(tmp_path, caplog):
    """A prompt with its response is text to write, whatever else is there; a kind that is asked for goes first."""
    written = {"prompt": "what?", "response": "a gas", "chosen": True, "responses": ["a gas", "iron"]}
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a gas"}]
    pair = {"prompt": "what?", "chosen": chat, "rejected": [chat[0], chat[1] | {"content": "no"}], "messages": chat}
    assert [record_kind(one) for one in (written, pair)] == ["generation", "preference"]
    assert record_kind({"messages": chat, "responses": ["a"]}) == "generation"
    with caplog.at_level("INFO", logger="bloblora"):
        assert as_records([pair], require_labels=True) == [pair]
    assert "read as records with 'chosen' and 'rejected', or 'responses'; it also has 'prompt' or" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="bloblora"):
        file = write_jsonl(tmp_path / "pairs.jsonl", [pair])
        (found,) = read_records(file, known=Known(kind="generation"))
        assert record_kind(found) == "generation"
        assert found["messages"] == chat
        del written["chosen"]
        assert record_kind(as_records([written], known=Known(kind="preference"))[0]) == "preference"
        words = {"text": "the card", "tokens": ["the", "card"], "tags": ["O", "B-X"]}
        assert as_records([words], known=Known(kind="tokens")) == [{name: words[name] for name in ("tokens", "tags")}]
    assert not caplog.text
    assert as_records([{"question": "what?", "label": "gas"}], known=Known(kind="text"))[0]["text"] == "what?"
