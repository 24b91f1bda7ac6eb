"""What a page may take for granted: files, trained runs, and a few names in Python; all of them tiny."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bloblora import BlobConfig, bayesianize, models, runs
from bloblora.data import support_desk
from tests.docs.blocks import ROOT
from tests.docs.reader import Reader
from tests.tasks.conftest import tiny_causal
from tests.tiny_base import QUESTIONS, queries, save_default, write_jsonl

OPTIONS = {"steps": 2, "batch_size": 2, "r": 2}
ANSWERS = [
    {"prompt": "Question: Which gas do plants take?\nAnswer:", "response": "carbon dioxide"},
    {"prompt": "Question: What was charged twice?\nAnswer:", "response": "my card"},
]


def _write_different(place: Path, records: list[dict[str, Any]], *names: str) -> None:
    """Files of which none has a record of another, on which nothing is calibrated."""
    for i, name in enumerate(names):
        write_jsonl(place / f"{name}.jsonl", records[60 * i : 60 * (i + 1)])


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with data files, trained runs, and a cache whose default model is tiny."""
    place = tmp_path_factory.mktemp("docs")
    save_default(place / "cache")
    texts = [record["text"] for record in support_desk("test")[:240]]
    labelled = [{"text": text, "label": ("parcel", "refund")[i % 2]} for i, text in enumerate(texts)]
    write_jsonl(place / "queries.jsonl", queries())
    write_jsonl(place / "tuesday.jsonl", queries())
    _write_different(place, labelled, "held_out", "validation", "test", "new_queries")
    valued = [{"text": text, "value": len(text) / 10} for text in texts]
    _write_different(place, valued, "reviews", "held_out_reviews", "validation_reviews")
    tagged = [{"text": text, "labels": ["late", "damaged"][: i % 3]} for i, text in enumerate(texts)]
    _write_different(place, tagged, "tagged", "held_out_tagged", "validation_tagged")
    words = [text.split() for text in texts]
    sentences = [{"tokens": row, "tags": ["B-X" if len(word) > 4 else "O" for word in row]} for row in words]
    _write_different(place, sentences, "sentences", "held_out_sentences", "validation_sentences")
    preferred = [{"prompt": text, "chosen": "it is late", "rejected": text[:9]} for text in texts]
    _write_different(place, preferred, "preferences", "held_out_preferences")
    write_jsonl(place / "other.jsonl", support_desk("out_of_scope")[:20])
    write_jsonl(place / "choices.jsonl", QUESTIONS)
    (place / "tickets.csv").write_text(
        "subject;queue\n" + "".join(f"{record['text']};{record['label']}\n" for record in queries())
    )
    write_jsonl(place / "answers.jsonl", ANSWERS)
    write_jsonl(place / "prompts.jsonl", ANSWERS)
    write_jsonl(place / "examples.jsonl", [{"text": text} for text in texts[:3]])
    shutil.copytree(place, place / "FOLDER", ignore=shutil.ignore_patterns("cache", "FOLDER"))
    data = {"train": {"data": "queries.jsonl"}, "test": "test.jsonl", "validation": "validation.jsonl"}
    study = {"name": "study", "seeds": [0], "samples": [0, 2], "train": OPTIONS, "datasets": {"NAME": data}}
    (place / "study.yaml").write_text(yaml.safe_dump(study | {"methods": {"blob": {}}, "baseline": "blob"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOBLORA_CACHE", str(place / "cache"))
        for name, file, options in (
            ("desk", "queries", {}),
            ("desk-lora", "queries", {"method": "lora"}),
            ("arc", "choices", {}),
            ("answers", "answers", {"task": "generation"}),
        ):
            config = runs.RunConfig.of(
                data=f"{place}/{file}.jsonl", output=f"{place}/runs/{name}", **OPTIONS, **options
            )
            runs.train(config, progress=False)
    for name in ("demo/blob", "big"):
        shutil.copytree(place / "runs/desk", place / "runs" / name)
    return place


@pytest.fixture
def reader_of(place, tmp_path, monkeypatch):
    """A reader in a copy of the place, without the runs that the page trains itself."""
    readers = []

    def reader_of(page: str) -> Reader:
        folder = tmp_path / "place"
        made = re.findall(r"bloblora train .*--output (\S+)", (ROOT / page).read_text(encoding="utf-8"))
        shutil.copytree(place, folder, ignore=shutil.ignore_patterns("cache"))
        for run in made:
            shutil.rmtree(folder / run, ignore_errors=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("BLOBLORA_CACHE", str(place / "cache"))
        readers.append(Reader(names(place, page), monkeypatch))
        return readers[-1]

    yield reader_of
    for reader in readers:
        reader.close()


def names(place: Path, page: str) -> dict[str, Any]:
    """What Python blocks use without saying where it comes from; a classifier, and where text is written, a writer."""
    base = next((place / "cache").glob(f"{models.DEFAULT_MODEL}-*"))
    tokenizer = models.load_tokenizer(str(base))
    records = [json.loads(line) for line in (place / "validation.jsonl").read_text().splitlines()]
    texts = [record["text"] for record in queries()]
    encoded = [tokenizer(text, padding="max_length", max_length=16) for text in texts]
    classifiers: list[Any] = [AutoModelForSequenceClassification.from_pretrained(base, num_labels=2) for _ in range(3)]
    if page in ("docs/generation.md", "docs/scoring.md"):
        bare, kind = tiny_causal(), "CAUSAL_LM"
    else:
        bare, kind = classifiers.pop(), "SEQ_CLS"
    model = get_peft_model(bare, LoraConfig(task_type=kind, r=4, target_modules=["q_proj", "v_proj"]))
    return {
        # what the exported adapters of a multiple-choice run belong to, and elsewhere a classifier
        "base": AutoModelForCausalLM.from_pretrained(base) if page == "docs/export.md" else classifiers[0],
        "fresh_base": classifiers[1],
        "tokenizer": tokenizer,
        "texts": texts,
        "dataset": [{**padded, "labels": i % 2} for i, padded in enumerate(encoded)],
        "held_out": [{**padded, "labels": i % 2} for i, padded in enumerate(encoded)],
        "model": model,
        "posterior": bayesianize(model, BlobConfig()),
        "inputs": tokenizer(texts, padding=True, return_tensors="pt"),
        "prompts": [record["prompt"] for record in ANSWERS],
        "data": Dataset.from_list([{"prompt": r["prompt"], "completion": r["response"]} for r in ANSWERS]),
        "answer_tokens": 10,
        "records": records,
        "new": [{"text": text} for text in texts],
    }
