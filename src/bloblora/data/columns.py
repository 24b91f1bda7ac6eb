"""From the row of any source to a record: which column holds which field, and what a cell means."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import date, datetime, time
from string import ascii_uppercase
from typing import Any

from ..messages import quoted
from .records import ANSWERS, DataError, Record, record_kind


def _column(what: str) -> Any:
    text = f"Column of {what}; default: the one of that name, or an obvious one."
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Which columns hold the fields of a record, and what becomes of rows that can't be used.

    A column is the name in a table's header, or an object's key.
    """

    text_column: str | None = _column("`text`")
    text_pair_column: str | None = _column("`text_pair`, the second of two texts")
    label_column: str | None = _column("`label`")
    labels_column: str | None = _column("`labels`, several at once")
    value_column: str | None = _column("`value`, a number to predict")
    tokens_column: str | None = _column("`tokens`, the words of a text")
    tags_column: str | None = _column("`tags`, one for each token")
    question_column: str | None = _column("`question`")
    choices_column: str | None = _column("`choices`")
    answer_column: str | None = _column("`answer`")
    chosen_column: str | None = _column("`chosen`, the preferred of two responses")
    rejected_column: str | None = _column("`rejected`, the other one")
    margin_column: str | None = _column("`margin`, by how much a response is better")
    responses_column: str | None = _column("`responses` to give rewards")
    prompt_column: str | None = _column("`prompt`")
    response_column: str | None = _column("`response`")
    messages_column: str | None = _column("`messages`")
    skip_invalid: bool = field(
        default=False,
        metadata={"help": "Leave rows out that can't be used, and say how many there are; default: an error."},
    )

    def columns(self) -> dict[str, str]:
        """The column of each field of which one is given."""
        pairs = ((option.name.removesuffix("_column"), getattr(self, option.name)) for option in fields(self))
        return {name: column for name, column in pairs if isinstance(column, str)}


_FIELDS = {
    "text": ("text", "text_pair", "label", "labels", "value"),
    "choice": ("question", "choices", "answer"),
    "generation": ("prompt", "response", "messages"),
    "preference": ("chosen", "rejected", "margin", "responses", "prompt"),
    "tokens": ("tokens", "tags"),
}
_DECIDING = ("text", "messages", "prompt", "question", "tokens")  # the fields by which a record's kind is known
_OBVIOUS: Mapping[str, tuple[str, ...]] = {
    "text": ("query", "sentence", "utterance", "content", "message", "body", "input", "document", "question"),
    "label": ("intent", "category", "class", "target", "topic", "sentiment"),
    "value": ("rating", "score", "price", "similarityscore"),
    "labels": ("tags", "categories", "emotions"),
    "tokens": ("words",),
    "tags": ("nertags", "ner", "labels", "label"),
    "question": ("questionstem", "stem", "query"),
    "choices": ("options",),
    "answer": ("answerkey", "correctanswer", "label", "target"),
    "prompt": ("instruction",),
    "response": ("completion", "output", "answer"),
}
"""Names, normalized, that say what a column holds, besides the field's own."""
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("texta", "textb"),
)
_BEFORE = {"labels": ("label",), "value": ("label", "labels")}
"""Fields that are a record's answer rather than another one, where both could be."""
_CHOICE = re.compile(r"choice_\d{1,4}")
_LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
_WHOLE_FLOAT = re.compile(r"([+-]?[0-9]{1,15})\.0+")  # whose digits a float holds


def option(name: str) -> str:
    """The option of the command line that names a field's column."""
    return f"--{name.replace('_', '-')}-column"


def find_columns(
    source: str,
    present: Sequence[str],
    given: Mapping[str, str],
    known: Mapping[str, str] | None = None,
    option: Callable[[str], str] = option,
) -> dict[str, str]:
    """The column of each field that isn't called as its field: given, known of a run, or obvious by its name.

    Args:
        source: what messages call the data.
        present: the columns that are there.
        given: column by field; each must be there, but for case and spaces.
        known: the same, used where they are there.
        option: what messages call the option that names a field's column.

    Raises:
        DataError: a column isn't there, columns of several kinds of records are given, or none is obvious; the message
            names those that are there.
    """
    found = {name: _the_given(source, option(name), column, present) for name, column in given.items()}
    found |= {name: c for name, c in (known or {}).items() if c in present and name not in found}
    if not _kinds(given):
        options = ", ".join(map(option, given))
        raise DataError([f"{source}: {options} are of several kinds of records: give those of one kind"])
    names = _Names(present)
    kind, possible = names.kind(), _kinds(given or [*found][:1])
    kind = kind if kind in possible or not found else possible[0]
    if kind is None:
        if not present:
            return {}
        first = f"of texts and their labels give {option('text')} and {option('label')}"
        ways = "; or ".join(", ".join(map(option, fields_)) for fields_ in _FIELDS.values())
        raise DataError([f"{source}: its columns are {_listed(present)}, and none is obvious; {first}; or else {ways}"])
    found = {name: column for name, column in found.items() if name in _FIELDS[kind]}
    wanted = ("messages",) if kind == "generation" and names.of("messages") else _FIELDS[kind]
    for name in wanted:
        if name in ("labels", "value") and any(other in found or names.of(other) for other in _BEFORE[name]):
            continue  # of two answers the label is meant, unless the other is asked for
        if name not in found and (column := names.of(name, taken=found.values())) is not None:
            found[name] = column
    return {name: column for name, column in found.items() if column != name}


def _kinds(names: Collection[str]) -> list[str]:
    """The kinds of records that have all these fields."""
    return [kind for kind, of in _FIELDS.items() if {*names} <= {*of}]


def obvious_kind(present: Sequence[str]) -> str | None:
    """The kind of records that columns of these names hold; None where that isn't obvious."""
    return _Names(present).kind()


def said_of(
    found: Mapping[str, str],
    given: Mapping[str, str],
    known: Mapping[str, str],
    option: Callable[[str], str] = option,
) -> str | None:
    """The line that says which columns were guessed; None where none was."""
    guessed = {name: column for name, column in found.items() if name not in given and known.get(name) != column}
    if not guessed:
        return None
    taken = ", ".join(f"{name} is column {quoted(column)}" for name, column in guessed.items())
    return f"{taken} ({', '.join(map(option, guessed))} to choose otherwise)"


def missing_hint(name: str, present: Sequence[str]) -> str:
    """What to add to the message that a field is missing."""
    return f"; its columns are {_listed(present)}: name one with {option(name)}"


def to_record(row: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    """A row as a record: fields from their columns, choices from lists, JSON or columns, answers as an index, numbers
    and booleans as labels as text, several labels as a list,
    a value as a number, an ``id`` of any type as JSON can hold it; null is missing.
    """
    moved = {name: row[column] for name, column in columns.items() if column in row}
    others = {*_DECIDING}.difference(*(_FIELDS[kind] for kind in _kinds(columns))) if columns else ()
    rest = {name: value for name, value in row.items() if name not in columns.values() and name not in others}
    record = {name: value for name, value in (rest | moved).items() if not _is_missing(name, value)}
    for name in {"labels", "value", "tokens"} & {*rest, *moved}:
        record.setdefault(name, None)  # so that it is what is said to be missing
    if record_kind(record) is None:
        record |= {name: None for name in [name for name in _DECIDING if name in (*rest, *moved)][:1]}
    if record.get("prompt") == "" and {"chosen", "responses"} & {*record}:
        del record["prompt"]  # which a preference need not have
    if flat := _flat_choices(rest) if "choices" not in record else []:
        record = {name: value for name, value in record.items() if not _CHOICE.fullmatch(name)} | {"choices": flat}
    for name in ("choices", "responses", "tokens", "tags", "claims"):
        if isinstance(record.get(name), str):
            record[name] = _parsed(record[name])  # what is no list is reported with its value by the check that follows
    record, names = _named_choices(record)
    if "answer" in record:
        record["answer"] = _index(record["answer"], record.get("choices"), names)
    if flat:
        record = _without_gaps(record)
    if isinstance(record.get("label"), list | tuple):
        record["labels"] = record.pop("label")
    if isinstance(record.get("labels"), bool | int | float):  # as transformers calls the class of an example
        record["label"] = record.pop("labels")
    if "label" in record:
        record["label"] = _label(record["label"])
    if record.get("labels") is not None:
        record["labels"] = label_list(record["labels"])
    if isinstance(record.get("tags"), list | tuple):
        record["tags"] = [_label(tag) for tag in record["tags"]]
    for name in ("value", "margin"):
        if (value := record.get(name)) is not None and not isinstance(value, bool | int | float):
            with suppress(ValueError, TypeError):  # what isn't a number is reported with its value
                record[name] = float(value)
    if "id" in record:
        record["id"] = _json_value(record["id"])
    return record


def _label(value: Any) -> Any:
    """A number or a boolean as the text that JSON has for it, a date as `date_text`; NaN and infinity are no labels."""
    if isinstance(value, date | time):
        return date_text(value)
    if not isinstance(value, bool | int | float) or value != value or abs(value) == math.inf:
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def is_boolean(label: str) -> bool:
    """Whether a text is what a table of texts has for a boolean."""
    return label.casefold() in ("true", "false")


def is_whole_float(label: str) -> bool:
    """Whether a text is what a table of texts has for a float that is a whole number, such as ``1.0``."""
    return _WHOLE_FLOAT.fullmatch(label) is not None


def typed(label: str) -> str:
    """The label that a boolean or a whole float becomes where it isn't a text, of such a text; else the text itself."""
    if found := _WHOLE_FLOAT.fullmatch(label):
        return str(int(found[1]))
    return label.casefold() if is_boolean(label) else label


def date_text(value: date | time) -> str:
    """A date or a time in ISO 8601, with a space between them; without the time where that is midnight."""
    midnight = isinstance(value, datetime) and value.tzinfo is None and value.time() == time()
    return str(value.date() if isinstance(value, datetime) and midnight else value)


def label_list(value: Any) -> Any:
    """Labels as a list: of JSON, as Python prints one, or of a text with ``|``, ``;`` or else a comma between them.

    What only looks like a list stays a text.
    """
    if isinstance(value, str) and isinstance(found := _parsed(value), list):
        value = found
    if isinstance(value, str) and not _LIST.fullmatch(value):
        mark = next((mark for mark in "|;," if mark in value), "|")
        value = [part for part in value.split(mark) if part.strip()]
    if not isinstance(value, list | tuple):
        return value
    return [label.strip() if isinstance(label, str) else _label(label) for label in value]


def _parsed(text: str) -> Any:
    """What a cell says in JSON, or the list of texts and numbers that Python prints so; else the cell itself."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if _LIST.fullmatch(text):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(text.strip())
            # Without commas, as numpy prints texts, Python would join them.
            alike = "".join(repr(found).split()) == "".join(text.split())
            if alike and isinstance(found, list) and all(isinstance(item, str | int | float) for item in found):
                return found
    return text


def _json_value(value: Any) -> Any:
    """The value as JSON can hold it: dates and times in ISO 8601, bytes as UTF-8 or hexadecimal, others as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_json_value, value)]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return value.isoformat() if isinstance(value, date | time) else str(value)  # Decimal, timedelta, UUID, …


class _Names:
    """The columns that are there, looked up as people mean them: case, spaces, hyphens and a BOM apart."""

    def __init__(self, present: Sequence[str]) -> None:
        self._present = present
        self._by_name: dict[str, list[str]] = {}
        for column in present:
            self._by_name.setdefault(_normal(column), []).append(column)

    def of(self, name: str, taken: Collection[str] = ()) -> str | None:
        """The only column that obviously holds a field; the field's own name goes before others."""
        if name in self._present:
            return name
        for names in ((_normal(name),), *self._pair(name), _OBVIOUS.get(name, ())):
            columns = [column for other in names for column in self._by_name.get(other, ()) if column not in taken]
            if columns:
                return columns[0] if len(columns) == 1 else None
        return None

    def _pair(self, name: str) -> list[tuple[str]]:
        """The first or the second name of a pair that is there."""
        if name not in ("text", "text_pair") or "text" in self._by_name:
            return []
        place = ("text", "text_pair").index(name)
        return [(pair[place],) for pair in _PAIRS if all(one in self._by_name for one in pair)]

    def kind(self) -> str | None:
        """The kind of records that columns of these names hold; None where that isn't obvious."""
        own = record_kind(dict.fromkeys(self._present))
        if own in (None, "generation") and self.of("chosen") and self.of("rejected"):
            return "preference"
        with_choices = self.of("choices") or any(_CHOICE.fullmatch(column) for column in self._present)
        if own not in (None, "choice") or (own and with_choices):
            return own
        if self.of("question") and with_choices:
            return "choice"
        if own is None and self.of("tokens") and self.of("tags"):
            return "tokens"
        if own is None and (self.of("messages") or self.of("prompt")):
            return "generation"
        if self.of("text") and (own is None or self.of("label") or self.of("labels") or self.of("value")):
            return "text"
        return own


def _normal(column: str) -> str:
    return re.sub(r"[\s_\-\ufeff]+", "", column).casefold()


def _the_given(source: str, option: str, column: str, present: Sequence[str]) -> str:
    same = [other for other in present if _normal(other) == _normal(column)]
    if column in present or len(same) == 1:
        return column if column in present else same[0]
    raise DataError([f"{source}: {option} {quoted(column)}: there is no such column; it has {_listed(present)}"])


def _listed(columns: Sequence[str]) -> str:
    shown = [repr(column) if column != column.strip() or not column else column for column in columns[:20]]
    return ", ".join(shown) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _is_missing(name: str, value: Any) -> bool:
    """Null, the NaN that pandas has for it, and an empty cell of what a record need not have.

    An empty cell of labels is none of them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return value == "" and (name in ("margin", "text_pair") or (name in ANSWERS and name != "labels"))


def _flat_choices(row: Mapping[str, Any]) -> list[Any]:
    """The choices that have a column each, without empty ones at the end; one between others is an empty text."""
    texts = {int(name[7:]): value for name, value in row.items() if _CHOICE.fullmatch(name)}
    there = [number for number, value in texts.items() if value != "" and not _is_missing("choices", value)]
    return [texts[number] if number in there else "" for number in range(min(texts), max(there) + 1)] if there else []


def _without_gaps(record: Record) -> Record:
    """The record without empty choices, and its answer's index among the others; an empty answer stays, an error."""
    choices, answer = record["choices"], record.get("answer")
    places = [place for place, choice in enumerate(choices) if choice != ""]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        if answer not in places:
            return record
        answer = places.index(answer)
    return record | {"choices": [choices[place] for place in places]} | ({} if answer is None else {"answer": answer})


def _named_choices(record: Record) -> tuple[Record, list[str]]:
    """Choices as ARC has them, ``{"text": […], "label": […]}`` or a list of ``{"text", "label"}``: texts and labels."""
    choices = record.get("choices")
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):
        texts, names = choices["text"], choices.get("label")
    elif isinstance(choices, list) and choices and all(isinstance(c, Mapping) and "text" in c for c in choices):
        texts, names = [c["text"] for c in choices], [c.get("label") for c in choices]
    else:
        return record, []
    names = [str(name) for name in names] if isinstance(names, list) and len(names) == len(texts) else []
    return {**record, "choices": list(texts)}, names


def _index(answer: Any, choices: Any, names: Sequence[str]) -> Any:
    """An answer as an index, where it is one choice's label, or can be meant as one choice only: as an index written as
    text, as a letter, or as the choice's text.
    """
    if not isinstance(choices, list):
        return answer
    if not isinstance(answer, bool) and names.count(str(answer)) == 1:
        return names.index(str(answer))
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if not isinstance(answer, str):
        return answer
    meant = {i for i, choice in enumerate(choices) if isinstance(choice, str) and choice.strip() == answer.strip()}
    letter = (answer if meant else typed(answer.strip())).strip().upper()
    # ASCII, because "²" is a digit too, of which int() makes nothing
    if letter.isascii() and letter.isdigit() and len(letter) < 10:
        meant |= {int(letter)} if int(letter) < len(choices) or not meant else set()
    elif len(letter) == 1 and 0 <= (index := ascii_uppercase.find(letter)) < len(choices):
        meant.add(index)
    return meant.pop() if len(meant) == 1 else answer
