"""The paper's data sets by name, through `datasets` with their public ids."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import DataError

Row = Mapping[str, Any]
Record = dict[str, Any]


def winogrande(row: Row) -> Record:
    """WinoGrande: ``answer`` is "1" or "2", empty in the test split."""
    record = {"question": row["sentence"], "choices": [row["option1"], row["option2"]]}
    return record | ({"answer": int(row["answer"]) - 1} if row["answer"] else {})


def arc(row: Row) -> Record:
    """ARC: ``answerKey`` is one of the choices' labels, letters or digits."""
    labels = list(row["choices"]["label"])
    record = {"question": row["question"], "choices": list(row["choices"]["text"])}
    return record | ({"answer": labels.index(row["answerKey"])} if row["answerKey"] else {})


def openbookqa(row: Row) -> Record:
    """OpenBookQA: ARC's form with the question as ``question_stem``."""
    return arc({**row, "question": row["question_stem"]})


def boolq(row: Row) -> Record:
    """BoolQ: passage and question, answered by no or yes."""
    return {
        "question": f"{row['passage']}\n{row['question']}?",
        "choices": ["no", "yes"],
        "answer": int(row["answer"]),
    }


def mmlu(row: Row) -> Record:
    """MMLU: four choices, ``answer`` is the index."""
    return {"question": row["question"], "choices": list(row["choices"]), "answer": int(row["answer"])}


def pair(row: Row) -> Record:
    """GLUE's RTE and MRPC: two sentences, a line each; ``label`` is -1 in the test split."""
    return _labelled(f"{row['sentence1']}\n{row['sentence2']}", row)


def cola(row: Row) -> Record:
    """CoLA: one sentence."""
    return _labelled(row["sentence"], row)


def wic(row: Row) -> Record:
    """WiC: a word, and two sentences that have it."""
    return _labelled(f"{row['word']}\n{row['sentence1']}\n{row['sentence2']}", row)


def boolq_text(row: Row) -> Record:
    """SuperGLUE's BoolQ: question and passage."""
    return _labelled(f"{row['question']}?\n{row['passage']}", row)


def _labelled(text: str, row: Row) -> Record:
    return {"text": text} | ({} if row["label"] < 0 else {"label": str(row["label"])})


PAPER_SETS: dict[str, tuple[str, str | None, Callable[[Row], Record]]] = {
    "winogrande_s": ("allenai/winogrande", "winogrande_s", winogrande),
    "winogrande_m": ("allenai/winogrande", "winogrande_m", winogrande),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", arc),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", arc),
    "obqa": ("allenai/openbookqa", "main", openbookqa),
    "boolq": ("google/boolq", None, boolq),
    "rte": ("nyu-mll/glue", "rte", pair),
    "mrpc": ("nyu-mll/glue", "mrpc", pair),
    "cola": ("nyu-mll/glue", "cola", cola),
    "wic": ("aps/super_glue", "wic", wic),
    "boolq_text": ("aps/super_glue", "boolq", boolq_text),
}
"""Name → hub id, configuration, and how a row becomes a record; ``mmlu/<subject>`` comes beside these."""


def read_paper_set(name: str, split: str) -> list[Record]:
    """Records of a set of the paper, for example ``arc_easy`` or ``mmlu/college_physics``.

    Raises:
        DataError: the hub can't be reached, or has no such subject or split.
    """
    from datasets import load_dataset

    hub_id, config, convert = ("cais/mmlu", name[5:], mmlu) if name.startswith("mmlu/") else PAPER_SETS[name]
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
            problems.append(f"{source}: row {number}: not of the form that is known: {error!r} in {dict(row)!r}")
    if problems:
        raise DataError(problems)
    return records
