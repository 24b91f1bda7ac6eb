"""Rows in the hub's form become records; the embedded data set is what its card says, and does not drift."""

from collections import Counter
from hashlib import sha256
from importlib.resources import files

import pytest

from bloblora.data import PAPER_SETS, SPLITS, DataError, read_records, sets, support_desk

ARC = {
    "id": "Mercury_7175875",
    "question": "An astronomer observes that a planet rotates faster after a meteorite impact. What follows?",
    "choices": {"text": ["longer years", "shorter days"], "label": ["A", "B"]},
    "answerKey": "B",
}
PAIR = {"sentence1": "It rained.", "sentence2": "It was wet.", "idx": 0}
ROWS = [
    (PAPER_SETS["rte"][2], PAIR | {"label": 0}, {"text": "It rained.\nIt was wet.", "label": "0"}),
    (PAPER_SETS["rte"][2], PAIR | {"label": -1}, {"text": "It rained.\nIt was wet."}),
    (PAPER_SETS["cola"][2], {"sentence": "Us sings.", "label": 0, "idx": 3}, {"text": "Us sings.", "label": "0"}),
    (
        PAPER_SETS["wic"][2],
        PAIR | {"word": "rain", "start1": 3, "label": 1},
        {"text": "rain\nIt rained.\nIt was wet.", "label": "1"},
    ),
    (
        PAPER_SETS["boolq_text"][2],
        {"question": "is ice hot", "passage": "Ice is cold.", "idx": 1, "label": 0},
        {"text": "is ice hot?\nIce is cold.", "label": "0"},
    ),
    (
        sets.winogrande,
        {
            "sentence": "Ian ate Dennis's menudo because _ hated it.",
            "option1": "Ian",
            "option2": "Dennis",
            "answer": "2",
        },
        {"question": "Ian ate Dennis's menudo because _ hated it.", "choices": ["Ian", "Dennis"], "answer": 1},
    ),
    (sets.arc, ARC, {"question": ARC["question"], "choices": ["longer years", "shorter days"], "answer": 1}),
    (
        sets.arc,
        ARC | {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"question": ARC["question"], "choices": ["x", "y", "z"], "answer": 2},
    ),
    (
        PAPER_SETS["obqa"][2],
        {"id": "7-980", "question_stem": "The sun is responsible for", "choices": ARC["choices"], "answerKey": "A"},
        {"question": "The sun is responsible for", "choices": ["longer years", "shorter days"], "answer": 0},
    ),
    (
        sets.boolq,
        {"question": "is ice hot", "answer": False, "passage": "Ice is cold."},
        {"question": "Ice is cold.\nis ice hot?", "choices": ["no", "yes"], "answer": 0},
    ),
    (
        sets.mmlu,
        {"question": "2 + 2", "subject": "algebra", "choices": ["3", "5", "4", "2"], "answer": 2},
        {"question": "2 + 2", "choices": ["3", "5", "4", "2"], "answer": 2},
    ),
]
SHA256 = {
    "train": "87b4534f40d40b6427bd5cd0923c2bd18096c963dc58d0e55ee05a76400984b7",
    "validation": "e6f7aba5e4d559855c0b86e5bda974da1ce9a41d7f9b6436cf2fdb793730bd29",
    "test": "9af26a24b3ceb2d1e5a9dbef3d3eef63a9aa4bf011a2c4d5ae896f9e11fef8d3",
    "out_of_scope": "39b7c35efef7e408efd4a4e3f84ffcfd140dc4bcbb261de256c5ecadbde6fc88",
}


@pytest.mark.parametrize(("convert", "row", "record"), ROWS)
def test_rows(convert, row, record):
    assert convert(row) == record


@pytest.mark.parametrize(
    ("convert", "row"),
    [
        (sets.winogrande, {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}),
        (sets.arc, ARC | {"answerKey": ""}),
    ],
)
def test_a_test_split_without_answers(convert, row):
    assert "answer" not in convert(row)


def test_rows_of_another_form_are_reported_with_their_number():
    with pytest.raises(DataError) as caught:
        sets._converted("arc_easy:train", [ARC, ARC | {"answerKey": "E"}, {"text": "?"}], sets.arc)
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


def test_sizes_and_balance_of_the_support_desk():
    sizes = {"train": 12, "validation": 8, "test": 20}
    counts = {split: Counter(record["label"] for record in support_desk(split)) for split in sizes}
    for split, count in counts.items():
        assert len(count) == 24
        assert set(count.values()) == {sizes[split]}
        assert count.keys() == counts["train"].keys()
    assert Counter(record["label"] for record in support_desk("out_of_scope")) == {"out_of_scope": 200}


def test_no_query_stands_twice():
    texts = [" ".join(r["text"].lower().split()).strip(" .!?") for split in SPLITS for r in support_desk(split)]
    assert len(texts) == 1160
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert all(texts)


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_is_fixed(split):
    content = (files("bloblora.data") / "support_desk" / f"{split}.jsonl").read_bytes()
    assert sha256(content).hexdigest() == SHA256[split]


def test_unknown_split():
    with pytest.raises(ValueError, match="split 'dev' is not one of train, validation, test, out_of_scope"):
        support_desk("dev")
