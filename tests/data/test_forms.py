"""Files as people have them: other encodings, separators, exports and columns give the records that they mean."""

import gzip
import io
import json
import logging

import openpyxl
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from bloblora.data import DataError, Known, Reader, ReadingOptions, as_records, read_batches, read_records

RECORDS = [{"text": "wo ist mein päckchen?", "label": "parcel"}, {"text": "geld zurück", "label": "refund"}]


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged, as a list that grows."""
    messages = []
    caplog.set_level(logging.INFO, logger="bloblora")
    monkeypatch.setattr(caplog.handler, "emit", lambda record: messages.append(record.getMessage()))
    return messages


def table(separator):
    rows = [RECORDS[0].keys(), *(record.values() for record in RECORDS)]
    return "".join(f"{separator.join(row)}\n" for row in rows)


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_csv_without_commas(separator, name, tmp_path, said):
    file = write(tmp_path / "data.csv", table(separator))
    assert read_records(file) == RECORDS
    assert said == [f"{file}: read as cells between {name}"]


def test_a_csv_with_commas_and_utf8_says_nothing(tmp_path, said):
    assert read_records(write(tmp_path / "data.csv", b"\xef\xbb\xbf" + table(",").encode())) == RECORDS
    assert said == []


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("latin-1", "cp1252"), ("cp1252", "cp1252"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le")],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_an_encoding_is_said(encoding, name, suffix, tmp_path, said):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    text = {"csv": table(","), "jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]"}[suffix]
    file = write(tmp_path / f"data.{suffix}", text.encode(encoding))
    assert read_records(file) == RECORDS
    assert said == [f"{file}: not UTF-8, read as {name}"]


def test_bytes_that_windows_does_not_know(tmp_path, said):
    file = write(tmp_path / "data.csv", b"text,label\n\x81\xe4,a\n")
    assert read_records(file) == [{"text": "\x81ä", "label": "a"}]
    assert said == [f"{file}: not UTF-8, read as latin-1"]


def test_gz_of_each(tmp_path):
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "data.parquet")
    contents = {
        "csv": table(",").encode("utf-16"),
        "tsv": table("\t").encode(),
        "jsonl": b"\n".join(json.dumps(record).encode() for record in RECORDS),
        "json": json.dumps(RECORDS).encode(),
        "parquet": (tmp_path / "data.parquet").read_bytes(),
    }
    for suffix, content in contents.items():
        file = write(tmp_path / f"packed.{suffix}.gz", gzip.compress(content))
        assert read_records(file) == RECORDS, suffix


def test_xlsx(tmp_path, said):
    book = openpyxl.Workbook()
    book.active.title = "Queries"
    for row in (["Text", "Label", None], ["a", 1, "x"], [None, None, None], [12.0, 2, None], [" ", "", None]):
        book.active.append(row)
    book.create_sheet("Notes")
    book.save(file := tmp_path / "data.xlsx")
    assert read_records(file) == [{"text": "a", "label": "1"}, {"text": "12", "label": "2"}]
    assert said == [
        f"{file}: read the first sheet, Queries; not Notes",
        f"{file}: left out 2 blank rows",
        f"{file}: text is column 'Text', label is column 'Label' (--text-column, --label-column to choose otherwise)",
    ]


def test_an_xlsx_with_a_column_twice(tmp_path):
    book = openpyxl.Workbook()
    for row in (["text", "label", "label"], ["a", "x", "y"]):
        book.active.append(row)
    book.save(file := tmp_path / "data.xlsx")
    with pytest.raises(DataError, match=r"data\.xlsx: row 1: column 'label' is there twice"):
        read_records(file)


@pytest.mark.parametrize(
    "content",
    [
        {"data": RECORDS, "version": 1},
        json.loads(pd.DataFrame(RECORDS).to_json()),
        json.loads(pd.DataFrame(RECORDS).to_json(orient="index"))["0"] | {"rows": RECORDS},
    ],
    ids=["data", "pandas", "one list among values"],
)
def test_json_of_other_forms(content, tmp_path):
    assert read_records(write(tmp_path / "data.json", json.dumps(content))) == RECORDS


@pytest.mark.parametrize("columns", [["text", "label"], ["Query", "what for"]])
@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table", "list"])
def test_json_of_each_orient_of_pandas(orient, columns, tmp_path):
    frame = pd.DataFrame([record.values() for record in RECORDS], columns=columns)
    text = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    options = ReadingOptions(text_column=columns[0], label_column=columns[1])
    records = read_records(write(tmp_path / "data.json", text), options)
    assert [{name: record[name] for name in ("text", "label")} for record in records] == RECORDS


def test_tables_in_json_that_are_none(tmp_path):
    frame = pd.DataFrame(RECORDS)
    named = frame.set_index(pd.Index([f"row {i}" for i in range(len(RECORDS))]))
    assert read_records(write(tmp_path / "data.json", named.to_json(orient="index"))) == RECORDS
    short = json.dumps({"columns": ["text", "label"], "data": [["a", "b"], ["c"]]})
    for text, message in (
        (frame.to_json(orient="values"), "its rows are lists, without the names of columns; write a list of objects"),
        (short, "a row of 'data' hasn't a cell for each of 'columns': text, label"),
    ):
        with pytest.raises(DataError, match=message):
            read_records(write(tmp_path / "data.json", text))


CHOICES = "question,choice_0,choice_1,choice_2,choice_3,answer\n"


@pytest.mark.parametrize(
    ("cells", "choices", "answer"),
    [
        ("a,,c,d,2", ["a", "c", "d"], 1),
        ("a,,c,d,D", ["a", "c", "d"], 2),
        ("a,,c,d,0", ["a", "c", "d"], 0),
        (",b,c,,2", ["b", "c"], 1),
        ("a,b,,,B", ["a", "b"], 1),
        ("a,,c,d,c", ["a", "c", "d"], 1),
        ("a,,c,d,", ["a", "c", "d"], None),
    ],
)
def test_an_answer_is_of_the_columns_whichever_are_empty(cells, choices, answer, tmp_path):
    expected = {"question": "q", "choices": choices} | ({} if answer is None else {"answer": answer})
    file = write(tmp_path / "data.csv", f"{CHOICES}q,{cells}\n")
    assert read_records(file, require_labels=False) == [expected]
    row = dict(zip(CHOICES.strip().split(","), [cell or None for cell in f"q,{cells}".split(",")], strict=True))
    for cleaned in (row, {name: cell for name, cell in row.items() if cell or name == "choice_0"}):
        if cleaned.get("choice_0") or len(cleaned) == len(row):
            lines = write(tmp_path / "data.jsonl", json.dumps(cleaned))
            assert read_records(lines, require_labels=False) == [expected]


@pytest.mark.parametrize("answer", ["1", "B"])
def test_an_answer_that_is_empty(answer, tmp_path):
    file = write(tmp_path / "data.csv", f"{CHOICES}q,a,,c,d,{answer}\nq,a,b,,,3\n")
    with pytest.raises(DataError) as error:
        read_records(file)
    assert error.value.problems == [
        f"{file}:2: field 'answer': 1 must be the index of a choice that isn't empty",
        f"{file}:3: field 'answer': 3 is not an index into 2 choices (0..1)",
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["True", "False", ""], ["true", "false", None]),
        (["TRUE", "FALSE"], ["true", "false"]),
        (["1.0", "-2.00", "10.0", ""], ["1", "-2", "10", None]),
        (["True", "False", "unknown"], None),
        (["1.0", "2.5"], None),
        (["1.0", "2.0", "1.0.1"], None),
        (["1", "007"], None),
    ],
)
def test_labels_of_a_table_of_texts_are_those_of_other_forms(written, read, tmp_path, said):
    rows = [*zip("abcd", written, strict=False), *(("x", written[0]) for _ in range(300))]
    file = write(tmp_path / "data.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows[::-1]))
    found = [record.get("label") for record in read_records(file, require_labels=False)][: -len(written) - 1 : -1]
    assert found == (read or written)
    pairs = [f"{text!r} as {label!r}" for text, label in zip(written, read or (), strict=False) if label]
    assert [sorted(line.partition("read label ")[2].split(", ")) for line in said] == ([sorted(pairs)] if read else [])


def test_dates_as_labels(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b"], "label": pd.to_datetime(["2020-01-01", "2021-02-03"])})
    for column, labels in (
        (frame["label"], ["2020-01-01", "2021-02-03"]),
        (frame["label"] + pd.Timedelta(hours=1), ["2020-01-01 01:00:00", "2021-02-03 01:00:00"]),
    ):
        dates = frame.assign(label=column)
        dates.to_parquet(tmp_path / "data.parquet")
        dates.to_excel(tmp_path / "data.xlsx", index=False)
        dates.to_csv(tmp_path / "data.csv", index=False)
        expected = [{"text": text, "label": label} for text, label in zip("ab", labels, strict=True)]
        for suffix in ("parquet", "xlsx", "csv"):
            assert read_records(tmp_path / f"data.{suffix}") == expected, suffix
        assert as_records(dates) == expected


def test_a_number_beyond_all_is_no_label(tmp_path):
    file = write(tmp_path / "data.jsonl", '{"text": "a", "label": 1e400}')
    with pytest.raises(DataError, match="field 'label': inf must be a text"):
        read_records(file)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_empty_second_text_is_none(suffix, tmp_path):
    content = {"csv": "text,text_pair,label\na,,p\n", "jsonl": '{"text": "a", "text_pair": "", "label": "p"}'}
    file = write(tmp_path / f"data.{suffix}", content[suffix])
    assert read_records(file) == [{"text": "a", "label": "p"}]


RASA = """
version: "3.1"
nlu:
- intent: book
  examples: |
    - a table in [Berlin](city)
    - a table for [two]{"entity": "number", "value": 2}
- intent: greet
  examples:
  - text: |
      hello
- synonym: two
  examples: |
    - 2
- intent: no
  examples:
  - text: off
  - no
- intent: 007
  examples: |
    - yes
"""


def test_rasa(tmp_path):
    assert read_records(write(tmp_path / "nlu.yml", RASA)) == [
        {"text": "a table in Berlin", "label": "book"},
        {"text": "a table for two", "label": "book"},
        {"text": "hello", "label": "greet"},
        {"text": "off", "label": "no"},
        {"text": "no", "label": "no"},
        {"text": "yes", "label": "007"},
    ]


def tagged(words, tags):
    return {"tokens": words.split(), "tags": tags.split()}


@pytest.mark.parametrize(
    ("lines", "records", "comments"),
    [
        (
            "# id 5b1 domain=en\nAda B-P\nlives O\n\n# id 5b2 domain=en\nin O\n",
            [("Ada lives", "B-P O"), ("in", "O")],
            2,
        ),
        ("# sent_id = 1\n# text = Ada lives\nAda\t_\t_\tB-P\nlives\t_\t_\tO\n", [("Ada lives", "B-P O")], 2),
        ("# sent_id = 1\nAda\t_\t_\tB-P\n", [("Ada", "B-P")], 1),
        ("# a b c\n# d e f\nAda B-P\n", [("Ada", "B-P")], 2),
        ("# made by a tool\n\nAda B-P\n\n# O\n", [("Ada", "B-P"), ("#", "O")], 1),
        ("# O\n1 O\n# O\n\n#\tO\n", [("# 1 #", "O O O"), ("#", "O")], 0),
        ("# id 5b1 =\n# O\n1 O\n", [("# 1", "O O")], 1),
    ],
)
def test_comments_in_conll(lines, records, comments, tmp_path, said):
    file = write(tmp_path / "data.conll", lines)
    assert read_records(file) == [tagged(*record) for record in records]
    assert said == ([f"{file}: left out {comments} comment line{'s' * (comments > 1)}"] if comments else [])


def test_conll_with_lines_of_different_columns(tmp_path):
    file = write(tmp_path / "data.conll", "Ada B-P\n\nin O\nNew York B-L\n\nthen\nO O\n")
    with pytest.raises(DataError) as caught:
        read_records(file)
    told = "columns; each must have as many as the others"
    assert caught.value.problems == [f"{file}:3: its lines have 2, 3 {told}", f"{file}:6: its lines have 1, 2 {told}"]


def annotated(number, text, *choices, cancelled=False):
    result = [{"type": "choices", "from_name": "c", "to_name": "t", "value": {"choices": [*choices]}}]
    return {"id": number, "data": {"content": text}, "annotations": [{"was_cancelled": cancelled, "result": result}]}


def test_label_studio(tmp_path):
    rows = [annotated(1, "a", "x"), annotated(2, "b", "y"), annotated(3, "c", "y", cancelled=True)]
    file = write(tmp_path / "export.json", json.dumps(rows))
    records = [{"id": 1, "label": "x", "text": "a"}, {"id": 2, "label": "y", "text": "b"}, {"id": 3, "text": "c"}]
    assert read_records(file, require_labels=False) == records
    assert read_records(file, ReadingOptions(skip_invalid=True)) == records[:2]
    write(file, json.dumps([annotated(1, "a", "x", "y")]))
    with pytest.raises(DataError, match="item 1: annotated with several choices: 'x', 'y'; a record has one label"):
        read_records(file)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"query": "a", "intent": "x"}, {"text": "a", "label": "x"}),
        ({"Sentence": "a", "CLASS": 3}, {"text": "a", "label": "3"}),
        ({"Text": "a", " label": "x", "content": "b"}, {"text": "a", "label": "x", "content": "b"}),
        ({"\ufeffutterance": "a", "category": "x"}, {"text": "a", "label": "x"}),
        ({"question": "a", "intent": "x"}, {"text": "a", "label": "x"}),
        ({"premise": "a", "hypothesis": "b", "label": "x"}, {"text": "a", "text_pair": "b", "label": "x"}),
        ({"question1": "a", "question2": "b", "label": 0}, {"text": "a", "text_pair": "b", "label": "0"}),
        ({"instruction": "a", "output": "b"}, {"prompt": "a", "response": "b"}),
        (
            {"Question": "a", "options": ["b", "c"], "Answer": "c"},
            {"question": "a", "choices": ["b", "c"], "answer": 1},
        ),
    ],
)
def test_obvious_columns(row, record, tmp_path, said):
    file = write(tmp_path / "data.jsonl", json.dumps(row))
    assert read_records(file) == [record]
    assert len(said) == 1
    assert said[0].startswith(f"{file}: ")
    assert "-column" in said[0]


def test_what_is_called_as_its_field_is_not_guessed(tmp_path, said):
    row = {"text": "a", "label": "x", "intent": "y", "query": "b"}
    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row))) == [row]
    assert said == []


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("id,first,second", "its columns are id, first, second, and none is obvious; of texts"),
        ("query,sentence,label", "its columns are query, sentence, label, and none is obvious; of texts"),
        (
            "text,topic,category",
            "field 'label': missing; each training or evaluation record needs one; its columns are text, topic, "
            "category: name one with --label-column",
        ),
    ],
)
def test_columns_that_are_not_obvious_are_one_message(header, message, tmp_path):
    file = write(tmp_path / "data.csv", f"{header}\n" + "a,b,c\n" * 50)
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_given_columns(tmp_path, said):
    file = write(tmp_path / "data.csv", "text,query,sentence,tag,question\na,b,c,d,e\n")
    options = ReadingOptions(text_column="sentence", label_column="tag")
    assert read_records(file, options) == [{"text": "c", "label": "d", "query": "b"}]
    assert said == []
    with pytest.raises(DataError, match="--text-column 'body': there is no such column; it has text, query, sentence"):
        read_records(file, ReadingOptions(text_column="body"))
    with pytest.raises(DataError, match="--text-column, --answer-column are of several kinds of records"):
        read_records(file, ReadingOptions(text_column="text", answer_column="tag"))


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ({}, {}),
        ({"text": "query", "label": "intent"}, {}),
        ({"label": "intent"}, {}),
        ({}, {"text": "query", "label": "intent"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_the_first_rows_lack(given, known, stream, tmp_path, monkeypatch):
    rows = [{"query": "a"}, {"query": "b", "intent": None}, {"query": "c", "intent": "x", "second": "y"}]
    records = [{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x", "second": "y"}]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    source = "-" if stream else write(tmp_path / "data.jsonl", content)
    options = ReadingOptions(**{f"{name}_column": column for name, column in given.items()})
    for size in (10, 3):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        batches = read_batches(source, size, options, known=Known(columns=known), require_labels=False)
        assert [record for batch in batches for record in batch] == records
    paired = ReadingOptions(text_pair_column="second", **{f"{name}_column": column for name, column in given.items()})
    if not stream:
        assert read_records(source, paired, known=Known(columns=known), require_labels=False)[2]["text_pair"] == "y"
        with pytest.raises(
            DataError, match="--label-column 'tag': there is no such column; it has query, intent, second"
        ):
            read_records(source, ReadingOptions(label_column="tag"), require_labels=False)


def test_columns_of_the_run_are_used_where_they_are_there(tmp_path, said):
    known = Known(columns={"text": "sentence", "label": "tag"})
    here = write(tmp_path / "here.csv", "query,sentence,tag\na,b,c\n")
    there = write(tmp_path / "there.csv", "query,intent\na,b\n")
    assert read_records(here, known=known) == [{"text": "b", "label": "c", "query": "a"}]
    assert said == []
    assert read_records(there, known=known) == [{"text": "a", "label": "b"}]
    assert len(said) == 1
    (reader := Reader(there)).__iter__().__next__()
    assert reader.columns == {"text": "query", "label": "intent"}


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_that_begins_with_blank_lines(separator, tmp_path):
    assert read_records(write(tmp_path / "data.csv", f"\n{separator}\n" + table(separator))) == RECORDS


def test_blank_and_invalid_rows(tmp_path, said):
    file = write(tmp_path / "data.csv", "text,label\na,x\n,\n ,\nb,\n,y\nc,y\nd,\n")
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert caught.value.problems == [
        f"{file}:5, 8: field 'label': missing; each training or evaluation record needs one",
        f"{file}:6: field 'text': '' must be a text that isn't empty",
    ]
    said.clear()
    options = ReadingOptions(skip_invalid=True)
    right = [{"text": "a", "label": "x"}, {"text": "c", "label": "y"}]
    assert read_records(file, options) == right
    assert said[0] == f"{file}: left out 2 blank rows"
    assert said[1].startswith(f"{file}: left out 3 invalid rows: {file}:5, 8: field 'label': missing")
    said.clear()
    assert [*read_batches(file, 1, options)] == [[record] for record in right]
    assert len(said) == 2
    with pytest.raises(DataError, match="must be a text"):
        read_records(write(file, "text,label\n,x\n"), options)


@pytest.mark.parametrize("answer", ["1", "b", "B", "Paris", " Paris "])
def test_answers_as_people_write_them(answer, tmp_path):
    row = {"question": "q", "choices": ["Rome", "Paris"], "answer": answer}
    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row)))[0]["answer"] == 1


def test_an_answer_that_could_be_two_choices_is_an_error(tmp_path):
    row = {"question": "1 + 1", "choices": ["1", "2", "3"], "answer": "2"}
    with pytest.raises(DataError, match=r"'2' is not an index into 3 choices .*letter or the text of exactly one"):
        read_records(write(tmp_path / "data.jsonl", json.dumps(row)))
    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row | {"answer": "3"})))[0]["answer"] == 2
    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row | {"answer": 0})))[0]["answer"] == 0


@pytest.mark.parametrize(
    "choices",
    [
        {"text": ["iron", "light"], "label": ["1", "2"]},
        [{"text": "iron", "label": "1"}, {"text": "light", "label": "2"}],
    ],
)
def test_choices_as_arc_has_them(choices, tmp_path):
    row = {"id": "x", "question": "q", "choices": choices, "answerKey": "2"}
    record = {"id": "x", "question": "q", "choices": ["iron", "light"], "answer": 1}
    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row))) == [record]
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    assert read_records(tmp_path / "data.parquet") == [record]
    pd.DataFrame([row | {"choices": json.dumps(choices)}]).to_csv(tmp_path / "data.csv", index=False)
    assert read_records(tmp_path / "data.csv") == [record]


def test_class_labels_keep_their_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "saved.parquet")
    records = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c"}]
    for name in ("saved", "saved.parquet"):
        assert read_records(tmp_path / name, require_labels=False) == records


def test_labels_that_differ_by_space_or_case(tmp_path, said):
    file = write(tmp_path / "data.csv", "text,label\na,refund\nb, refund\nc,refund \nd,Refund\n")
    assert [record["label"] for record in read_records(file)] == ["refund", "refund", "refund", "Refund"]
    assert said == [
        f"{file}: took white space off 2 labels",
        f"{file}: labels that differ by case alone are different labels: 'Refund' and 'refund'",
    ]


def test_without_openpyxl_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"needs openpyxl: pip install 'bloblora\[xlsx\]'"):
        read_records(write(tmp_path / "data.xlsx", b""))
