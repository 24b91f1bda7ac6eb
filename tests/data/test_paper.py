"""Rows in the hub's form become records; without a network an error says so."""

import pytest

from bloblora.data import PAPER_SETS, DataError, paper, read_records

ARC = {
    "id": "Mercury_7175875",
    "question": "An astronomer observes that a planet rotates faster after a meteorite impact. What follows?",
    "choices": {"text": ["longer years", "shorter days"], "label": ["A", "B"]},
    "answerKey": "B",
}
PAIR = {"sentence1": "It rained.", "sentence2": "It was wet.", "idx": 0}
ROWS = [
    (paper.pair, PAIR | {"label": 0}, {"text": "It rained.\nIt was wet.", "label": "0"}),
    (paper.pair, PAIR | {"label": -1}, {"text": "It rained.\nIt was wet."}),
    (paper.cola, {"sentence": "Us sings.", "label": 0, "idx": 3}, {"text": "Us sings.", "label": "0"}),
    (
        paper.wic,
        PAIR | {"word": "rain", "start1": 3, "label": 1},
        {"text": "rain\nIt rained.\nIt was wet.", "label": "1"},
    ),
    (
        paper.boolq_text,
        {"question": "is ice hot", "passage": "Ice is cold.", "idx": 1, "label": 0},
        {"text": "is ice hot?\nIce is cold.", "label": "0"},
    ),
    (
        paper.winogrande,
        {
            "sentence": "Ian ate Dennis's menudo because _ hated it.",
            "option1": "Ian",
            "option2": "Dennis",
            "answer": "2",
        },
        {"question": "Ian ate Dennis's menudo because _ hated it.", "choices": ["Ian", "Dennis"], "answer": 1},
    ),
    (paper.arc, ARC, {"question": ARC["question"], "choices": ["longer years", "shorter days"], "answer": 1}),
    (
        paper.arc,
        ARC | {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"question": ARC["question"], "choices": ["x", "y", "z"], "answer": 2},
    ),
    (
        paper.openbookqa,
        {"id": "7-980", "question_stem": "The sun is responsible for", "choices": ARC["choices"], "answerKey": "A"},
        {"question": "The sun is responsible for", "choices": ["longer years", "shorter days"], "answer": 0},
    ),
    (
        paper.boolq,
        {"question": "is ice hot", "answer": False, "passage": "Ice is cold."},
        {"question": "Ice is cold.\nis ice hot?", "choices": ["no", "yes"], "answer": 0},
    ),
    (
        paper.mmlu,
        {"question": "2 + 2", "subject": "algebra", "choices": ["3", "5", "4", "2"], "answer": 2},
        {"question": "2 + 2", "choices": ["3", "5", "4", "2"], "answer": 2},
    ),
]


@pytest.mark.parametrize(("convert", "row", "record"), ROWS)
def test_rows(convert, row, record):
    assert convert(row) == record


@pytest.mark.parametrize(
    ("convert", "row"),
    [
        (paper.winogrande, {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}),
        (paper.arc, ARC | {"answerKey": ""}),
    ],
)
def test_a_test_split_without_answers(convert, row):
    assert "answer" not in convert(row)


def test_rows_of_another_form_are_reported_with_their_number():
    with pytest.raises(DataError) as caught:
        paper._converted("arc_easy:train", [ARC, ARC | {"answerKey": "E"}, {"text": "?"}], paper.arc)
    assert [problem.partition(": not of")[0] for problem in caught.value.problems] == [
        "arc_easy:train: row 2",
        "arc_easy:train: row 3",
    ]


def test_the_sets_of_the_paper():
    names = {"winogrande_s", "winogrande_m", "arc_challenge", "arc_easy", "obqa", "boolq"}
    assert PAPER_SETS.keys() == names | {"rte", "mrpc", "wic", "cola", "boolq_text"}
    assert {hub_id for hub_id, _, _ in PAPER_SETS.values()} == {
        "allenai/winogrande",
        "allenai/ai2_arc",
        "allenai/openbookqa",
        "google/boolq",
        "nyu-mll/glue",
        "aps/super_glue",
    }


@pytest.mark.parametrize("name", ["arc_easy", "mmlu/college_physics"])
def test_without_a_network(name, monkeypatch, tmp_path):
    import datasets.config

    # Nothing may come from an earlier download; HF_HUB_OFFLINE is set for all tests.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub_id = "cais/mmlu" if name.startswith("mmlu") else "allenai/ai2_arc"
    with pytest.raises(DataError, match=f"{name}:test: {hub_id} can't be read from the hub: "):
        read_records(f"{name}:test")
