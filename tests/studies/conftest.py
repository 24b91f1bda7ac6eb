"""A small study on a tiny base model: two methods, one data set with everything that a set can have."""

from functools import partial

import pytest
import yaml

from tests.tiny_base import queries, write_jsonl


@pytest.fixture
def content(base, tmp_path):
    return make_content(base, tmp_path)


@pytest.fixture
def write(tmp_path):
    return partial(write_study, tmp_path)


def write_study(folder, content):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def make_content(base, tmp_path):
    """The study's YAML, with its data in a folder."""
    for name, records in (
        ("train", queries() * 2),
        ("test", queries()),
        ("shifted", queries()[:3]),
        ("validation", queries()),
        ("outside", [{"text": "a song"}, {"text": "the weather"}]),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    return {
        "name": "tiny",
        "models": [str(base)],
        "seeds": [0, 1],
        "samples": [0, 2, 4],
        "train": {"steps": 2, "batch_size": 2, "r": 2, "warmup_steps": 0},
        "datasets": {
            "desk": {
                "train": {"data": "train.jsonl", "learning_rate": 0.01},
                "test": "test.jsonl",
                "shifted": {"other": {"data": "shifted.jsonl"}},
                "out_of_scope": "outside.jsonl",
                "validation": "validation.jsonl",
            }
        },
        "methods": {"lora": {}, "wide blob": {"method": "blob", "prior_std": 0.5}},
    }
