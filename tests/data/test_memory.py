"""Records of what is in memory, against the same written by hand."""

import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from bloblora.data import DataError, Known, ReadingOptions, as_records, read_records

RECORDS = [{"text": "where is my parcel", "label": "parcel"}, {"text": "give the money back", "label": "refund"}]
TEXTS = [record["text"] for record in RECORDS]
CHOICES = [
    {"question": "Which?", "choices": ["a card", "a gas"], "answer": 1},
    {"question": "What?", "choices": ["iron", "sand", "water"], "answer": 0},
]


@pytest.mark.parametrize(
    "source",
    [
        RECORDS,
        tuple(RECORDS),
        iter(RECORDS),
        pandas.DataFrame(RECORDS),
        pandas.DataFrame(RECORDS, index=[7, 3]),
        Dataset.from_list(RECORDS),
        Dataset.from_list(RECORDS).to_iterable_dataset(),
        Dataset.from_pandas(pandas.DataFrame(RECORDS)),
    ],
    ids=lambda source: type(source).__name__,
)
def test_each_kind_gives_the_same_records(source):
    assert as_records(source, require_labels=True) == RECORDS


def test_polars():
    polars = pytest.importorskip("polars")
    assert as_records(polars.DataFrame(RECORDS), require_labels=True) == RECORDS
    assert as_records(polars.DataFrame(CHOICES), require_labels=True) == CHOICES
    assert as_records(polars.Series(TEXTS)) == [{"text": text} for text in TEXTS]
    coded = polars.DataFrame({"text": TEXTS, "label": [1, None]})
    assert as_records(coded) == [{"text": TEXTS[0], "label": "1"}, {"text": TEXTS[1]}]


def test_texts():
    expected = [{"text": text} for text in TEXTS]
    for source in (TEXTS, pandas.Series(TEXTS), np.array(TEXTS), (text for text in TEXTS)):
        assert as_records(source) == expected
    assert as_records(TEXTS[0]) == expected[:1]
    assert as_records(RECORDS[0]) == RECORDS[:1]
    assert as_records([TEXTS[0], RECORDS[1]]) == [expected[0], RECORDS[1]]
    assert as_records(TEXTS, known=Known(kind="generation")) == [{"prompt": text} for text in TEXTS]


def test_a_table_means_what_it_means_in_a_file(tmp_path):
    rows = [{"text": "a", "label": 1, "id": 5}, {"text": "b", "label": 0, "id": 6}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame(CHOICES).to_parquet(tmp_path / "choices.parquet")
    assert as_records(pandas.DataFrame(rows)) == read_records(tmp_path / "rows.parquet")
    for source in (CHOICES, pandas.DataFrame(CHOICES), pandas.read_parquet(tmp_path / "choices.parquet")):
        assert as_records(source, require_labels=True) == CHOICES == read_records(tmp_path / "choices.parquet")


def test_class_labels_keep_their_names():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["refund", "parcel"])})
    coded = Dataset.from_dict({"text": [*TEXTS, "another"], "label": [1, 0, -1]}, features=features)
    assert as_records(coded) == [*RECORDS, {"text": "another"}]


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA])
def test_what_is_null_is_missing(missing):
    frame = pandas.DataFrame({"text": TEXTS, "label": pandas.Series(["parcel", missing], dtype=object)})
    assert as_records(frame) == [RECORDS[0], {"text": TEXTS[1]}]
    with pytest.raises(DataError, match="row 2: field 'label': missing; each training or evaluation record needs one"):
        as_records(frame, require_labels=True)


def test_labels_are_those_of_a_file(tmp_path, caplog):
    rows = [{"text": text, "label": label} for text, label in zip("abc", (" card", "Card", "card"), strict=True)]
    pandas.DataFrame(rows).to_json(file := tmp_path / "rows.jsonl", orient="records", lines=True)
    caplog.set_level("INFO", "bloblora")
    assert as_records(rows) == read_records(file)
    case = "labels that differ by case alone are different labels: 'Card' and 'card'"
    said = [f"{name}: {what}" for name in ("the records", file) for what in ("took white space off 1 label", case)]
    assert caplog.messages == said


def test_problems():
    with pytest.raises(DataError) as error:
        as_records([{"text": ""}, 5, {"words": "x"}, RECORDS[0], {"text": " "}, CHOICES[0], {"text": ""}])
    assert [problem.partition(";")[0] for problem in error.value.problems] == [
        "row 1, 5, 7: field 'text': '', ' ' must be a text that isn't empty",
        "row 2: 5 is neither a dict nor a text",
        "row 3: it has words",
        "row 6: it has 'question', those before 'text'",
    ]
    with pytest.raises(DataError, match=r"several splits; give one of 'train', 'test'"):
        as_records(DatasetDict(train=Dataset.from_list(RECORDS), test=Dataset.from_list(RECORDS)))
    with pytest.raises(DataError, match="5 of type int holds no records; give a list of dicts or texts, a table"):
        as_records(5)


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA, pandas.NaT])
def test_a_null_cell_means_what_it_means_in_a_file(missing, tmp_path):
    rows = [
        {"text": "a", "text_pair": "x", "labels": ["p"], "tie": None},
        {"text": "b", "text_pair": missing, "labels": missing, "tie": missing},
    ]
    expected = [{"text": "a", "text_pair": "x", "labels": ["p"]}, {"text": "b", "labels": None}]
    assert as_records(rows) == as_records(pandas.DataFrame(rows)) == expected
    with pytest.raises(DataError, match="row 2: field 'labels': missing"):
        as_records(rows, require_labels=True)
    question = {"question": "q", "choice_0": "x", "choice_1": "y", "choice_2": missing, "answer": 1.0}
    frame = pandas.DataFrame([question, question | {"choice_2": "z", "answer": 2.0}])
    two = {"question": "q", "choices": ["x", "y"], "answer": 1}
    assert as_records(frame) == [two, {"question": "q", "choices": ["x", "y", "z"], "answer": 2}]
    frame.to_csv(file := tmp_path / "choices.csv", index=False)
    assert read_records(file) == as_records(frame)
    with pytest.raises(DataError, match="row 1: field 'text': missing; it must be a text"):
        as_records([{"text": missing, "label": "a"}])
    pair = {"chosen": "a", "rejected": "b"}
    assert as_records([pair | {"prompt": missing}]) == as_records([pair | {"prompt": ""}]) == [pair]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_no_label(number):
    for record, field in (
        ({"text": "a", "labels": ["x", number]}, "'labels', item 1"),
        ({"tokens": ["a", "b"], "tags": ["O", number]}, "'tags', item 1"),
    ):
        with pytest.raises(DataError, match=f"field {field}: {number} must be a text that isn't empty"):
            as_records([record])
    if number == number:
        with pytest.raises(DataError, match=f"row 1: field 'label': {number} must be a text that isn't empty"):
            as_records([{"text": "a", "label": number}])
    assert as_records([{"text": "a", "label": 10**400}]) == [{"text": "a", "label": str(10**400)}]


def test_polars_nan():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"text": ["a", "b"], "label": [1.0, float("nan")]})
    assert as_records(frame) == [{"text": "a", "label": "1"}, {"text": "b"}]


def test_columns_by_the_options_of_python(caplog):
    with pytest.raises(
        DataError, match="q, x, and none is obvious; of texts and their labels give text_column and label_column"
    ):
        as_records([{"q": "a", "x": "b"}])
    caplog.set_level("INFO", "bloblora")
    options = ReadingOptions(text_column="q")
    assert as_records([{"q": "a", "topic": "b"}], options) == [{"text": "a", "label": "b"}]
    assert caplog.messages == ["the records: label is column 'topic' (label_column to choose otherwise)"]
    with pytest.raises(DataError, match="text_column 'q': there is no such column; it has x"):
        as_records([{"x": "a"}], options)


def test_labels_of_a_run_in_another_form():
    found = as_records(
        [{"text": "a", "label": label} for label in ("True", True, 1, "1.0", "x")], known=Known(labels=("true", "1.0"))
    )
    assert [record["label"] for record in found] == ["true", "true", "1.0", "1.0", "x"]
    both = as_records(
        [{"text": "a", "label": label} for label in ("True", "true", "TRUE")], known=Known(labels=("True", "true"))
    )
    assert [record["label"] for record in both] == ["True", "true", "TRUE"]
