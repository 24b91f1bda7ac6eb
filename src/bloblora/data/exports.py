"""Rows as other tools export them: Rasa's NLU data and Label Studio's annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..files import parse_yaml
from ..messages import quoted
from .records import DataError, Record

# Rasa marks entities: [Berlin](city) and [Berlin]{"entity": "city"}
_ENTITY = re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\{[^}]*\})")


def rasa_rows(source: str, text: str) -> Iterator[Record | str]:
    """The examples of each intent of a Rasa NLU file, without the marks of entities.

    Raises:
        DataError: not YAML, or no list ``nlu``.
    """
    try:
        content = parse_yaml(text, as_texts=True)  # an intent may be called "yes", which YAML 1.1 takes for true
    except ValueError as error:
        raise DataError([f"{source}: not readable as YAML: {error}"]) from error
    if not isinstance(content, dict) or not isinstance(content.get("nlu"), list):
        raise DataError([f"{source}: must be Rasa's NLU data, with a list 'nlu' of an intent and examples each"])
    for item in content["nlu"]:
        if isinstance(item, dict) and "intent" in item:
            for example in _examples(item.get("examples")):
                yield {"text": _ENTITY.sub(r"\1", example).strip(), "label": str(item["intent"])}


def _examples(examples: Any) -> Iterator[str]:
    """Those of a text of lines that begin with a hyphen, or of a list of texts or of ``{"text"}``."""
    if isinstance(examples, list):
        yield from (str(one.get("text", "") if isinstance(one, dict) else one).strip("- \n") for one in examples)
    else:
        lines = str(examples or "").splitlines()
        yield from (line.strip()[1:] for line in lines if line.strip().startswith("-"))


def label_studio_row(row: Record) -> Record | str:
    """A task of Label Studio's JSON export as its data and the chosen label; another row as it is."""
    annotations, data = row.get("annotations"), row.get("data")
    if not isinstance(annotations, list) or not isinstance(data, dict):
        return row
    try:
        chosen = {
            choice
            for annotation in annotations
            if not annotation.get("was_cancelled")
            for result in annotation.get("result", [])
            if result.get("type") == "choices"
            for choice in result["value"]["choices"]
        }
    except (AttributeError, KeyError, TypeError):
        return f"field 'annotations': must be as Label Studio exports them, got {quoted(annotations)}"
    if len(chosen) > 1:
        return f"annotated with several choices: {', '.join(sorted(map(quoted, chosen)))}; a record has one label"
    return {**data, **({"id": row["id"]} if "id" in row else {}), **({"label": chosen.pop()} if chosen else {})}
