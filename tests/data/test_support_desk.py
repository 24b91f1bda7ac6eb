"""The embedded data set is what its card says, and does not drift."""

from collections import Counter
from hashlib import sha256
from importlib.resources import files

import pytest

from bloblora.data import SPLITS, support_desk

SHA256 = {
    "train": "87b4534f40d40b6427bd5cd0923c2bd18096c963dc58d0e55ee05a76400984b7",
    "validation": "e6f7aba5e4d559855c0b86e5bda974da1ce9a41d7f9b6436cf2fdb793730bd29",
    "test": "9af26a24b3ceb2d1e5a9dbef3d3eef63a9aa4bf011a2c4d5ae896f9e11fef8d3",
    "out_of_scope": "39b7c35efef7e408efd4a4e3f84ffcfd140dc4bcbb261de256c5ecadbde6fc88",
}


def test_sizes_and_balance():
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
    content = files("bloblora.data.support_desk").joinpath(f"{split}.jsonl").read_bytes()
    assert sha256(content).hexdigest() == SHA256[split]


def test_unknown_split():
    with pytest.raises(ValueError, match="split 'dev' is not one of train, validation, test, out_of_scope"):
        support_desk("dev")
