"""Predictions that another program made, read from its files."""

import math

import pytest
import torch

from bloblora.data import DataError
from bloblora.decision import fit_decision
from bloblora.prediction import Prediction
from bloblora.runs import RunError
from bloblora.runs.decide import calibrate_on
from bloblora.runs.lines import repeated
from bloblora.runs.predictions import answer_of, predicted_records, read_predictions
from bloblora.tasks import Classification, MultiLabel, Regression, TokenClassification
from tests.decision.conftest import truths
from tests.tiny_base import write_jsonl

LABELS = ("card", "parcel", "refund")
PROMISES = {"risk": 0.4, "coverage": 0.8, "false_alarm": 0.1}


@pytest.fixture(scope="module")
def truth():
    """Probabilities (300, 3) and the labels that were drawn from them."""
    probabilities, labels = truths(300, 3, 1, concentration=0.3)
    return probabilities[0], labels[0]


def rows(truth, how):
    for row, label in zip(*(part.tolist() for part in truth), strict=True):
        named = dict(zip(LABELS, row, strict=True))
        if how == "by label":  # as `predict` writes them, in another order on every second line
            items = [*named.items()]
            yield {
                "label": max(named, key=named.get),
                "probabilities": dict(items[:: -1 if label else 1]),
                "target": LABELS[label],
            }
        else:
            yield {"probabilities": row, "target": label}


@pytest.mark.parametrize("how", ["by label", "list", "csv", "csv of predict"])
def test_the_rules_are_those_of_the_probabilities(truth, tmp_path, how):
    file = tmp_path / ("other.csv" if how.startswith("csv") else "other.jsonl")
    if how == "csv":
        file.write_text(
            "".join(
                [",".join([*LABELS, "target"]) + "\n"]
                + [
                    ",".join([*map(str, row["probabilities"]), LABELS[row["target"]]]) + "\n"
                    for row in rows(truth, "list")
                ]
            )
        )
    elif how == "csv of predict":
        header = ["text", "label", "confidence", *(f"probability_{label}" for label in LABELS), "target"]
        file.write_text(
            "".join(
                [",".join(header) + "\n"]
                + [
                    ",".join(["a text", "card", "0.5", *map(str, row["probabilities"]), LABELS[row["target"]]]) + "\n"
                    for row in rows(truth, "list")
                ]
            )
        )
    else:
        write_jsonl(file, [*rows(truth, how)])
    found = calibrate_on(*read_predictions(file), **PROMISES)
    expected = fit_decision(Prediction(truth[0].log().float()[None], 0), truth[1], **PROMISES).to_dict()
    assert found["decision"].keys() == expected.keys() == {"answering", "label_sets", "scope"}
    for rule, values in expected.items():
        assert found["decision"][rule] == pytest.approx(values, abs=1e-6)


def test_labels_beside_the_file(truth, tmp_path):
    unlabelled = [{k: v for k, v in row.items() if k != "target"} for row in rows(truth, "by label")]
    answers = write_jsonl(tmp_path / "answers.jsonl", unlabelled)
    right = [LABELS[label] for label in truth[1]]
    alone = read_predictions(write_jsonl(tmp_path / "whole.jsonl", [*rows(truth, "by label")]))
    beside = read_predictions(answers, targets=right)
    assert torch.equal(beside[0].log_probabilities, alone[0].log_probabilities)
    assert torch.equal(beside[1], alone[1])
    with pytest.raises(RunError, match="has 300 predictions, and there are 299 labels"):
        read_predictions(answers, targets=right[1:])


def test_choices_by_index_or_text(tmp_path):
    lines = [
        {"question": "How many?", "probabilities": {"2": 0.1, "1": 0.7, "0": 0.2}, "target": 1},
        {"question": "How many?", "probabilities": {"two": 0.25, "one": 0.75}, "target": "two"},
    ]
    prediction, columns = read_predictions(write_jsonl(tmp_path / "choices.jsonl", lines))
    assert columns.tolist() == [1, 0]
    torch.testing.assert_close(prediction.probabilities, torch.tensor([[0.1, 0.7, 0.2], [0.25, 0.75, 0.0]]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"label": "card"}, "field 'probabilities': None must be at least 2 numbers"),
        (
            {"probabilities": [0.5, 0.2], "target": 0},
            r"field .*: \[0\.5, 0\.2\] must be at least 0, with a sum of 1",
        ),
        ({"probabilities": ["half", 0.5], "target": 0}, "field 'probabilities': 'half' must be a number"),
        ({"probabilities": {"a": 0.5, "b": 0.5}}, "field 'target': missing; it is the right label"),
        ({"probabilities": {"a": 0.5, "b": 0.5}, "target": "c"}, "field 'target': 'c' is none of the 2 labels a, b"),
        ({"probabilities": [0.5, 0.5], "target": 2}, "field 'target': 2 is none of the 2 labels"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, line, message):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"probabilities": [0.5, 0.5], "target": 1}, line])
    with pytest.raises(DataError, match=f"bad.jsonl:2: {message}"):
        read_predictions(file)


@pytest.mark.parametrize("task", [Classification(labels=("card", "parcel"), pad_token_id=0), None])
def test_columns_are_the_labels_in_whatever_order_a_row_has_them(tmp_path, task):
    ranked = [
        {"probabilities": {"card": 0.7, "parcel": 0.3}, "target": "parcel"},
        {"probabilities": {"parcel": 0.6, "card": 0.4}, "target": "parcel", "log_probabilities": [-0.5, -0.9]},
    ]
    found, targets = read_predictions(write_jsonl(tmp_path / "ranked.jsonl", ranked), task)
    assert found.log_probabilities.tolist() == [
        pytest.approx([math.log(0.7), math.log(0.3)]),
        pytest.approx([-0.9, -0.5]),
    ]
    assert targets.tolist() == [1, 1]


def test_other_labels_than_the_runs(tmp_path):
    file = write_jsonl(tmp_path / "other.jsonl", [{"probabilities": {"card": 0.5, "loan": 0.5}, "target": "card"}])
    with pytest.raises(DataError, match="of card, loan; the run's labels are card, parcel"):
        read_predictions(file, Classification(labels=("card", "parcel"), pad_token_id=0))
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"the ending '\.txt' is not one of \.jsonl, \.csv, \.tsv"):
        read_predictions(tmp_path / "a.txt")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_values_of_any_model(tmp_path, ending):
    """The threshold is the ⌈(n + 1) · coverage⌉-th smallest |y − value|/std: of 1 … 9 over 2 the 8th, 4."""
    lines = [{"value": 10.0, "std": 2.0, "epistemic_std": 0.1 * i, "target": 10 - i} for i in range(1, 10)]
    header = ",".join(lines[0])
    text = "\n".join([header, *(",".join(map(str, line.values())) for line in lines)])
    file = tmp_path / f"values.{ending}"
    file.write_text(text) if ending == "csv" else write_jsonl(file, lines)
    found = calibrate_on(*read_predictions(file, num_samples=10), coverage=0.8, false_alarm=0.2, score="epistemic_std")
    assert found["decision"]["intervals"]["threshold"] == 4.0
    assert found["decision"]["scope"]["threshold"] == pytest.approx(0.8)
    assert found["realized"] == pytest.approx({"promised_coverage": 8 / 9, "promised_width": 16, "false_alarm": 1 / 9})
    outside, none = read_predictions(file, num_samples=10, labelled=False)
    assert outside.std.tolist() == [2.0] * 9
    assert len(none) == 0
    for wrong, message in (
        ({"std": 0}, "field 'std': 0 must be above 0"),
        ({"target": "much"}, "field 'target': 'much' must be a number"),
    ):
        with pytest.raises(DataError, match=message):
            read_predictions(write_jsonl(tmp_path / "wrong.jsonl", [lines[0] | wrong]))


def test_several_labels_of_any_model(tmp_path):
    """Of label a the right ones have 0.1 … 0.9: at least 0.8 of them, k = 8 of 9, are named from 0.2 on."""
    lines = [
        {"probabilities": {"a": i / 10, "b": 0.5}, "target": ["a"] if i else [], "mutual_information": i / 100}
        for i in range(10)
    ]
    rules = {"coverage": 0.8, "false_alarm": 0.2}
    inside, right = read_predictions(write_jsonl(tmp_path / "tags.jsonl", lines), num_samples=5)
    assert right.tolist() == [[int(i > 0), 0] for i in range(10)]
    torch.testing.assert_close(inside.probabilities[:, 0], torch.arange(10).double() / 10)
    found = calibrate_on(inside, right, score="mutual_information", **rules)
    assert found["decision"]["label_thresholds"]["thresholds"] == pytest.approx([0.2, 0.5])
    assert found["decision"]["scope"]["threshold"] == pytest.approx(0.08)
    rows = [f"{i / 10},0.5,{'a|b' if i else ''}" for i in range(10)]
    (tmp_path / "tags.csv").write_text("\n".join(["labels,a,b,target", *(f"[],{row}" for row in rows)]))
    labels = read_predictions(tmp_path / "tags.csv")[1]
    assert labels.tolist() == [[int(i > 0)] * 2 for i in range(10)]
    (tmp_path / "plain.csv").write_text("\n".join(["a,b,target", "0.5,0.9,a", *rows]))
    plain, labels = read_predictions(tmp_path / "plain.csv")
    assert plain.kind == "bernoulli"
    assert labels.tolist() == [[1, 0], *([int(i > 0)] * 2 for i in range(10))]
    (tmp_path / "one.csv").write_text("a,b,a|b,target\n0.5,0.2,0.3,a|b")  # a label of that name
    assert read_predictions(tmp_path / "one.csv")[1].tolist() == [2]
    for wrong, message in (
        ({"target": ["c"]}, r"field 'target': \['c'\]; it must be a list of labels among a, b"),
        ({"probabilities": {"a": 1.5, "b": 0}}, r"must be in \[0, 1\]"),
        ({"probabilities": {"a": 0.5}}, "field 'probabilities': of a; the labels are a, b"),
    ):
        with pytest.raises(DataError, match=message):
            read_predictions(write_jsonl(tmp_path / "wrong.jsonl", [lines[0], lines[1] | wrong]))


def test_tags_of_any_model(tmp_path):
    """The least probability of a right tag is 0.1 ... 0.9: k = 8 of 9 records have theirs in sets from 0.2 on."""
    lines = [
        {
            "probabilities": [{"O": 0.95, "B-x": 0.05}, *[{"B-x": 1 - i / 10, "O": i / 10}] * (i % 2)],
            "target": ["O"] * (1 + i % 2) if i % 2 else ["B-x"],
            "mutual_information": i / 100,
        }
        for i in range(1, 10, 2)
    ]
    lines += [{"probabilities": [{"O": i / 10, "B-x": 1 - i / 10}], "target": ["O"]} for i in range(2, 10, 2)]
    inside, right = read_predictions(write_jsonl(tmp_path / "tags.jsonl", lines), num_samples=5)
    assert right.tolist() == [[0, 0]] * 5 + [[0, -100]] * 4
    assert inside.tags()[:2] == [["O", "B-x"], ["O", "B-x"]]
    found = calibrate_on(inside, right, coverage=0.8, false_alarm=0.2)
    assert found["decision"]["tag_sets"]["threshold"] == pytest.approx(0.2)
    assert found["realized"]["set_coverage"] == pytest.approx(8 / 9)
    entropy = torch.special.entr(torch.tensor([0.95, 0.05, 0.1, 0.9])).sum() / 2
    assert inside.predictive_entropy[0] == pytest.approx(entropy.item())
    assert inside.mutual_information.isnan().tolist() == [False] * 5 + [True] * 4
    outside, _ = read_predictions(
        write_jsonl(tmp_path / "out.jsonl", [{"probabilities": [{"O": 1, "B-x": 0}]}]), labelled=False
    )
    assert outside.predictive_entropy.item() == pytest.approx(0, abs=1e-12)
    for wrong, message in (
        ({"target": ["O", "O"]}, r"field 'target': \['O', 'O'\]; it must be a list of 1 tags among O, B-x"),
        ({"target": ["B-y"]}, r"field 'target': \['B-y'\]; it must be"),
        ({"probabilities": [{"O": 1}]}, "field 'probabilities': of O; the tags are O, B-x"),
        ({"probabilities": [{"O": 1, "B-x": 1}]}, "must be at least 0, with a sum of 1"),
        ({"probabilities": None}, "a list with an object by tag for each word, as in a file of `bloblora evaluate"),
    ):
        with pytest.raises(DataError, match=message):
            read_predictions(write_jsonl(tmp_path / "wrong.jsonl", [lines[-1], lines[-1] | wrong]))
    task = TokenClassification(labels=("O", "B-x"), pad_token_id=0)
    for logits in ([0.1, 0.2], [[0.1, 0.2, 0.3]], [["a", "b"]], [[1e999, 0.0]]):
        file = write_jsonl(tmp_path / "kept.jsonl", [{"logits": logits, "target": ["O"]}])
        with pytest.raises(DataError, match=r"kept.jsonl:1: (field '(logits|probabilities)'|not valid JSON)"):
            read_predictions(file, task)


def test_preferences_of_any_model(tmp_path):
    """As of choices: of 9 right responses with 0.1 ... 0.9, the sets hold 8 from 0.2 on."""
    lines = [{"probabilities": {"yes": i / 10, "no": 1 - i / 10}, "target": "yes"} for i in range(1, 10)]
    chat = {"chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}], "rejected": "no"}
    assert answer_of(chat) == "yes"
    inside, right = read_predictions(write_jsonl(tmp_path / "pairs.jsonl", lines))
    found = calibrate_on(inside, right, coverage=0.8)
    assert found["decision"]["label_sets"]["threshold"] == pytest.approx(0.8)
    assert found["realized"]["set_coverage"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("named", [True, False])
def test_a_number_is_no_index_where_labels_are_numbers(named, tmp_path):
    labels = ("1", "2", "3")
    values = dict(zip(labels, (0.5, 0.3, 0.2), strict=True)) if named else [0.5, 0.3, 0.2]
    task = None if named else Classification(labels=labels, pad_token_id=0)
    lines = [{"probabilities": values, "target": target} for target in (1, "3", 2.0, 0)]
    file = write_jsonl(tmp_path / "numbers.jsonl", lines)
    message = r"numbers.jsonl:4: field 'target': 0 is none of the 3 labels 1, 2, 3; it is no index, because label '1'"
    with pytest.raises(DataError, match=message) as error:
        read_predictions(file, task)
    assert len(error.value.problems) == 1
    _, targets = read_predictions(write_jsonl(file, lines[:3]), task)
    assert targets.tolist() == [0, 2, 1]
    bare = write_jsonl(file, [{"probabilities": [0.5, 0.5], "target": target} for target in (0, "1", 1.0)])
    assert read_predictions(bare)[1].tolist() == [0, 1, 1]


def test_a_boolean_target(tmp_path):
    lines = [{"probabilities": {"false": 0.5, "true": 0.5}, "target": target} for target in (True, "False", 0)]
    assert read_predictions(write_jsonl(tmp_path / "a.jsonl", lines))[1].tolist() == [1, 0, 0]


def test_lines_out_of_scope_are_not_in_scope(tmp_path):
    lines = [
        {"probabilities": {"a": 0.9, "b": 0.1}, "target": "a"},
        {"probabilities": {"a": 0.4, "b": 0.6}, "outside": True},
        {"probabilities": {"a": 0.2, "b": 0.8}, "target": "b", "outside": False},
    ]
    file = write_jsonl(tmp_path / "both.jsonl", lines)
    inside, targets = read_predictions(file, targets=None)
    assert (inside.probabilities[:, 0].tolist(), targets.tolist()) == ([pytest.approx(0.9), pytest.approx(0.2)], [0, 1])
    outside, _ = read_predictions(file, labelled=False, outside=True)
    assert outside.probabilities[:, 0].tolist() == [pytest.approx(0.4)]
    assert read_predictions(file, targets=["b", "b"])[1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("task", "records"),
    [
        (
            Regression(value_mean=0.0, value_std=1.0, pad_token_id=0),
            [{"text": "a", "value": 2}, {"text": "b", "value": 0.1}, {"text": "c", "label": "1.5"}],
        ),
        (
            MultiLabel(labels=("x", "y"), pad_token_id=0),
            [{"text": "a", "labels": ["y", "x"]}, {"text": "b", "label": "x"}],
        ),
        (TokenClassification(labels=("O", "B"), pad_token_id=0), [{"tokens": ["a", "b"], "tags": ["O", "B"]}]),
        (Classification(labels=("x", "1"), pad_token_id=0), [{"text": "a", "text_pair": "b", "label": "1"}]),
    ],
)
def test_records_of_lines(task, records, tmp_path):
    """They are those that the lines were made of."""
    probabilities = {} if task.name != "classification" else {"probabilities": {"x": 0.5, "1": 0.5}}
    lines = [repeated(record) | probabilities | {"target": answer_of(record, task)} for record in records]
    file = write_jsonl(tmp_path / "lines.jsonl", [*lines, {"target": "x"}, {"text": "a", "tokens": ["a"]}])
    assert predicted_records(file, task) == [*records, None, None]
