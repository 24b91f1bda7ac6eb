"""A tiny base model in a folder, as a user has one: config, tokenizer, safetensors."""

import json
from pathlib import Path

from bloblora import models
from bloblora.data import support_desk
from bloblora.files import write_hashed_json
from bloblora.runs.folder import _without_places
from tests.tasks.conftest import tiny_causal, train_tokenizer

TEXTS = {"refund": ["i was charged twice", "give the money back"], "parcel": ["where is my parcel", "it is late"]}
QUESTIONS = [
    {"question": "Which gas do plants take?", "choices": ["carbon dioxide", "iron", "sand"], "answer": 0},
    {"question": "What?", "choices": ["the second payment", "a card"], "answer": 1},
]


def save_base(folder: Path) -> Path:
    tiny_causal().save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def write_signed(file: Path, content: dict) -> None:
    """A JSON file of a run with other content and the right hash, as another version of bloblora would write it."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    write_hashed_json(file, content, *([_without_places] if file.name == "run.json" else []))


def give_base(run: Path, base: Path) -> None:
    """Make a run one of another base model, as if it had been trained with that."""
    stored = json.loads((run / "run.json").read_text())
    stored["config"]["model"], stored["base"] = str(base), models.fingerprint(str(base))
    write_signed(run / "run.json", stored)


def save_default(cache: Path) -> Path:
    """A tiny model in the place of the default one, in a cache for the environment variable BLOBLORA_CACHE."""
    base = save_base(cache / f"{models.DEFAULT_MODEL}-{models._WHEEL_SHA256[:16]}")
    models._complete(base, "a test")
    return base


def queries() -> list[dict]:
    return [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]


def several(times: int) -> list[dict]:
    """`queries` so many times, none twice."""
    return [{**record, "text": f"{record['text']} {i}"} for i in range(times) for record in queries()]


def held_out(count: int = 60) -> list[dict]:
    """Records that differ, with the same labels, and none of `queries`."""
    texts = [record["text"] for record in support_desk("test")[:count]]
    return [{"text": text, "label": ("parcel", "refund")[i % 2]} for i, text in enumerate(texts)]


def write_jsonl(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file
