"""A task of another installed package is one of ours; one that can't be used is named and skipped."""

import sys
from dataclasses import fields

import pytest

from bloblora import runs
from bloblora.tasks import TASKS, TaskError, build_task, encode_all, task_from_dict
from tests.tiny_base import queries, save_base, write_jsonl

MODULE = '''
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from bloblora.tasks import Classification


@dataclass(frozen=True, kw_only=True)
class Shouted(Classification):
    """A text's label, of the text in capitals."""

    tone: Literal["loud", "soft"] = field(default="loud", metadata={"help": "How the text is said."})
    name: ClassVar[str] = "shouted"

    def tokenize(self, record, tokenizer):
        text = record["text"].upper() if self.tone == "loud" else record["text"]
        return super().tokenize({"text": text}, tokenizer)


class Nameless(Classification):
    pass
'''
ENTRIES = """[bloblora.tasks]
shouted = shouting:Shouted
missing = shouting:Missing
nameless = shouting:Nameless
blank = shouting:Shouted
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with tasks, as an installer leaves one."""
    info = tmp_path / "site" / "shouting-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    (tmp_path / "site" / "shouting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    TASKS.__dict__.pop("_others", None)  # what was found before
    with pytest.warns(UserWarning, match="is skipped") as caught:
        assert [*TASKS][-1] == "shouted"
    yield [str(warning.message) for warning in caught]
    TASKS.__dict__.pop("_others", None)
    TASKS._loaded.pop("shouted", None)
    sys.modules.pop("shouting", None)


def test_what_cannot_be_used_is_named_and_skipped(package):
    assert [message.partition(" is skipped: ")[::2] for message in package] == [
        (
            "bloblora.tasks: 'missing' of package shouting (shouting:Missing)",
            "AttributeError: module 'shouting' has no attribute 'Missing'",
        ),
        (
            "bloblora.tasks: 'nameless' of package shouting (shouting:Nameless)",
            "ValueError: its class must have name = 'nameless', and kind one of text, choice, preference, tokens, "
            "generation",
        ),
        (
            "bloblora.tasks: 'blank' of package shouting (shouting:Shouted)",
            "ValueError: there is one of this name already",
        ),
    ]


def test_it_encodes_and_is_read_back(package, tokenizer):
    records = [{"text": "my card", "label": "card"}, {"text": "the air", "label": "air"}]
    task = build_task("shouted", records, tokenizer, tone="loud", template="{text}")
    expected = [tokenizer(text)["input_ids"] for text in ("MY CARD", "THE AIR")]
    assert [example["input_ids"] for example in encode_all(task, records, tokenizer)] == expected
    assert task_from_dict(task.to_dict()) == task
    assert build_task("auto", records, tokenizer).name == "classification"
    with pytest.raises(TaskError, match=r"'shout' is not one of regression, multi_label, classification, .*, shouted"):
        build_task("shout", records, tokenizer)


def test_it_trains_and_predicts(package, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    options = {"steps": 1, "batch_size": 2, "r": 2, "task": "shouted", "tone": "soft"}
    config = runs.RunConfig.of(
        data=str(data), output=str(tmp_path / "run"), model=str(save_base(tmp_path / "base")), **options
    )
    runs.train(config, progress=False)
    run = runs.load_run(tmp_path / "run")
    assert (run.task.name, run.task.tone) == ("shouted", "soft")
    assert run.predict(queries(), 2).probabilities.shape == (len(queries()), len(run.task.labels))


def test_the_options_of_every_task_have_a_help():
    for task in TASKS.values():
        for option in fields(task):
            if option.name != "pad_token_id":
                assert option.metadata["help"].endswith("."), (task.name, option.name)
