"""Data sets by name: the embedded support desk, and the paper's sets through `datasets` with their public ids."""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any

from ..messages import quoted
from .records import DataError, Record

Row = Mapping[str, Any]
SPLITS = ("train", "validation", "test", "out_of_scope")


def support_desk(split: str = "train") -> list[Record]:
    """Records ``{"text", "label"}``, queries to a support desk with their intents; see the README beside its files.

    Raises:
        DataError: ``split`` is not one of ``SPLITS``.
    """
    if split not in SPLITS:
        raise DataError([f"support_desk: split {quoted(split)} is not one of {', '.join(SPLITS)}"])
    text = (files(__package__) / "support_desk" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def winogrande(row: Row) -> Record:
    """WinoGrande: ``answer`` is "1" or "2", empty in the test split."""
    record = {"question": row["sentence"], "choices": [row["option1"], row["option2"]]}
    return record | ({"answer": int(row["answer"]) - 1} if row["answer"] else {})


def arc(row: Row) -> Record:
    """ARC: ``answerKey`` is one of the choices' labels, letters or digits; OpenBookQA calls the question otherwise."""
    labels = list(row["choices"]["label"])
    question = row["question_stem"] if "question_stem" in row else row["question"]
    record = {"question": question, "choices": list(row["choices"]["text"])}
    return record | ({"answer": labels.index(row["answerKey"])} if row["answerKey"] else {})


def boolq(row: Row) -> Record:
    """BoolQ: passage and question, answered by no or yes."""
    question = f"{row['passage']}\n{row['question']}?"
    return {"question": question, "choices": ["no", "yes"], "answer": int(row["answer"])}


def mmlu(row: Row) -> Record:
    """MMLU: four choices, ``answer`` is the index."""
    return {"question": row["question"], "choices": list(row["choices"]), "answer": int(row["answer"])}


def texts(template: str) -> Callable[[Row], Record]:
    """The (Super)GLUE sets: a text of a row's columns; ``label`` is -1 in the test split."""

    def convert(row: Row) -> Record:
        return {"text": template.format_map(row)} | ({} if row["label"] < 0 else {"label": str(row["label"])})

    return convert


_pair = texts("{sentence1}\n{sentence2}")
PAPER_SETS: dict[str, tuple[str, str | None, Callable[[Row], Record]]] = {
    "winogrande_s": ("allenai/winogrande", "winogrande_s", winogrande),
    "winogrande_m": ("allenai/winogrande", "winogrande_m", winogrande),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", arc),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", arc),
    "obqa": ("allenai/openbookqa", "main", arc),
    "boolq": ("google/boolq", None, boolq),
    "rte": ("nyu-mll/glue", "rte", _pair),
    "mrpc": ("nyu-mll/glue", "mrpc", _pair),
    "cola": ("nyu-mll/glue", "cola", texts("{sentence}")),
    "wic": ("aps/super_glue", "wic", texts("{word}\n{sentence1}\n{sentence2}")),
    "boolq_text": ("aps/super_glue", "boolq", texts("{question}?\n{passage}")),
}
"""Name → hub id, configuration, and how a row becomes a record; ``mmlu/<subject>`` comes beside these."""


def hub_source(name: str) -> tuple[str, str | None, Callable[[Row], Record]] | None:
    """What `PAPER_SETS` says of a name, or of ``mmlu/<subject>``; None for another name."""
    return ("cais/mmlu", name[5:], mmlu) if name.startswith("mmlu/") else PAPER_SETS.get(name)


def read_paper_set(name: str, split: str) -> list[Record]:
    """Records of a set of the paper, for example ``arc_easy`` or ``mmlu/college_physics``.

    Raises:
        DataError: the hub can't be reached, or has no such subject or split.
    """
    from datasets import load_dataset

    source = hub_source(name)
    assert source is not None
    hub_id, config, convert = source
    try:
        rows = load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub's client raises many kinds, some of them not documented
        raise DataError([f"{name}:{split}: {hub_id} can't be read from the hub: {error}"]) from error
    return _converted(f"{name}:{split}", rows, convert)


def _converted(source: str, rows: Iterable[Row], convert: Callable[[Row], Record]) -> list[Record]:
    """Rows as records; a row of another form than the hub's card says is reported with its number."""
    records: list[Record] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(convert(row))
        except (KeyError, ValueError, TypeError) as error:
            problems.append(f"{source}: row {number}: not of the form that is known: {error!r} in {quoted(dict(row))}")
    if problems:
        raise DataError(problems)
    return records
