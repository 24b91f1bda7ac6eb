"""What a record is and what can be wrong with one; and rows that stay on the disk.

A record is a plain dict: ``{"text", "label"}`` for classification, ``{"text", "labels"}`` for several at once,
``{"text", "value"}`` for regression, each with ``text_pair`` where two texts belong together,
``{"tokens", "tags"}``, two lists of equal length, for the classification of tokens,
``{"question", "choices", "answer"}`` for multiple choice with ``answer`` the index of the right choice,
``{"chosen", "rejected"}``, with ``margin``, or ``{"responses"}``, with ``prompt`` where there is one, for preferences,
``{"prompt", "response"}`` or ``{"messages"}`` for open text, with messages ``{"role", "content"}`` of which the last is
the assistant's. For prediction the answer, or the last message, may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..messages import quoted

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]
Place = tuple[str, int]
"""Where a row stands: what goes before its number, and the number."""
KINDS = {
    "text": "'text'",
    "choice": "'question' and 'choices'",
    "preference": "'chosen' and 'rejected', or 'responses'",
    "tokens": "'tokens'",
    "generation": "'prompt' or 'messages'",
}
"""Kinds of records by what is asked, and what records of each must have."""
_KIND_OF = {
    "text": "text",
    "chosen": "preference",
    "responses": "preference",
    "messages": "generation",
    "prompt": "generation",
    "question": "choice",
    "tokens": "tokens",
}
_SHARED = {"preference": ("prompt",)}
_WHOLE: dict[str, list[set[str]]] = {
    "text": [{"text"}],
    "preference": [{"chosen", "rejected"}, {"responses"}],
    "generation": [{"messages"}, {"prompt", "response"}],
    "choice": [{"question", "choices"}],
    "tokens": [{"tokens"}],
}
_FORMS = (
    "'text' (and 'label', 'labels' or 'value'), 'tokens' (and 'tags'), 'question' and 'choices' (and 'answer'), "
    "'chosen' and 'rejected' (and 'prompt'), 'prompt' (and 'response'), or 'messages'"
)
ANSWERS = ("label", "labels", "value", "tags", "answer", "response")
"""The fields of which one is a record's answer, but for messages."""
_SHOWN, _SHOWN_ROWS, _SHOWN_VALUES = 20, 5, 3
_VALUE = re.compile(
    r"(field '\w+'(?:, item \d+)?: )(?!missing)(.+?)( must be | is not an index | has half a ).*", re.DOTALL
)
_MISSING = "field '{}': missing; each {} record needs one"
_LEAVE_OUT = "leave the record out, as --skip-invalid does"
_ROWS_AT_A_TIME = 1000
_LARGEST = 1e30  # of a value: its square is a float64, and no float32 is made of it before it is standardized


class DataError(ValueError):
    """Records that can't be used; ``problems`` lists every one, the message the first 20.

    ``advice`` is what the command line says after it.
    """

    def __init__(self, problems: Sequence[str], advice: str = "") -> None:
        self.problems, self.advice = list(problems), advice
        more = [f"… and {len(problems) - _SHOWN} more problems"] if len(problems) > _SHOWN else []
        super().__init__("\n".join([*self.problems[:_SHOWN], *more]))


class Problems:
    """What is wrong with rows: each kind of problem once, with its first values and the first rows that have it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], _Found] = {}
        self.rows = 0

    def add(self, place: Place, problems: Sequence[str]) -> None:
        """Those of a row."""
        self.rows += bool(problems)
        for problem in problems:
            parts = _VALUE.fullmatch(problem)
            start, value = (parts[1], parts[2]) if parts else (problem, "")
            end = problem[len(start) + len(value) :]
            found = self._found.setdefault((place[0], start, end), _Found())
            found.count += 1
            if len(found.rows) < _SHOWN_ROWS:
                found.rows.append(place[1])
            if value not in found.values and len(found.values) <= _SHOWN_VALUES:
                found.values.append(value)

    def lines(self) -> list[str]:
        """One line for each kind of problem, in the order of the first rows."""
        return [found.line(*key) for key, found in self._found.items()]


class _Found:
    def __init__(self) -> None:
        self.count, self.rows, self.values = 0, list[int](), list[str]()

    def line(self, place: str, start: str, end: str) -> str:
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        values = ", ".join([*self.values[:_SHOWN_VALUES], *(["…"] if len(self.values) > _SHOWN_VALUES else [])])
        return f"{place}{', '.join(map(str, self.rows))}{more}: {start}{values}{end}"


def record_kind(record: Mapping[str, Any]) -> str | None:
    """One of `KINDS`, by the record's fields; None for a record of none.

    A prompt with its response, or messages, are open text, whatever else is called `responses` or `chosen`; but
    messages beside both `chosen` and `rejected` are a preference, as some data sets have them.
    """
    kind = next((kind for field, kind in _KIND_OF.items() if field in record), None)
    pair = "chosen" in record and "rejected" in record
    written = {"prompt", "response"} <= record.keys() or ("messages" in record and not pair)
    return "generation" if kind == "preference" and written else kind


def other_kinds(record: Mapping[str, Any], kind: str | None) -> list[str]:
    """Kinds of which the record has all fields too."""
    return [other for other, ways in _WHOLE.items() if other != kind and any(way <= record.keys() for way in ways)]


def of_kind(record: Mapping[str, Any], kind: str) -> Record:
    """The record without the fields by which other kinds are known."""
    fields = _KIND_OF | {"response": "generation"}
    others = {name for name, other in fields.items() if other != kind}
    return {name: value for name, value in record.items() if name not in others or name in _SHARED.get(kind, ())}


def kind_of(records: Iterable[Mapping[str, Any]]) -> str:
    """The records' kind: one of `KINDS`.

    Raises:
        DataError: several kinds, or none.
    """
    kinds = {record_kind(record) or "" for record in records}
    if not kinds:
        raise DataError(["there are no records"])
    if "" in kinds:
        raise DataError([f"a record must have {_FORMS}"])
    if len(kinds) > 1:
        some = ", ".join(f"some have {first_field(kind)}" for kind in sorted(kinds))
        raise DataError([f"records of several kinds: {some}; keep them in separate files"])
    return kinds.pop()


def first_field(kind: str) -> str:
    """The field by which a kind is known."""
    return KINDS[kind].partition(" and ")[0]


def record_problems(record: Mapping[str, Any], kind: str | None, *, require_answer: bool = False) -> list[str]:
    """What is wrong with a record of a kind, by field and value; whether its answer may be missing is said by
    ``require_answer``.
    """
    if (found := record.get("id")) is not None and _half_a_pair(found):
        return [f"field 'id': {quoted(found)} has half a surrogate pair, which is no text"]
    if kind == "text":
        pair = _text_problems(record["text_pair"], "field 'text_pair'") if "text_pair" in record else []
        checks = {"labels": _labels_problems, "value": _value_problems}
        answer = next((name for name in checks if name in record and "label" not in record), None)
        wrong = checks[answer](record, require_answer) if answer else _answer_problems(record, "label", require_answer)
        return [*_text_problems(record.get("text"), "field 'text'"), *pair, *wrong]
    if kind == "choice":
        choices = _choice_problems(record.get("choices")) or _answer_problems(record, "answer", require_answer)
        choices = _empty_answer(record) or choices
        return _text_problems(record.get("question"), "field 'question'") + choices
    if kind == "preference":
        return _preference_problems(record, require_answer)
    if kind == "tokens":
        return _token_problems(record, require_answer)
    if kind == "generation" and "messages" in record:
        return _message_problems(record["messages"], require_answer)
    if kind == "generation":
        prompt = _text_problems(record.get("prompt"), "field 'prompt'")
        return prompt + _answer_problems(record, "response", require_answer)
    return [f"it has {', '.join(map(str, record)) or 'nothing'}; it must have {_FORMS}"]


def unanswered(record: Mapping[str, Any]) -> Record:
    """The record without its label, value, answer or response, or the assistant's last message."""
    rest = {name: value for name, value in record.items() if name not in ANSWERS}
    if (messages := rest.get("messages")) and messages[-1]["role"] == "assistant":
        rest["messages"] = messages[:-1]
    return rest


def first_copies(rows: Iterable[Any]) -> list[int]:
    """Of each row the position of the first one that is equal in JSON."""
    first: dict[int, int] = {}  # hashes, which are less than the rows
    return [
        first.setdefault(hash(json.dumps(row, sort_keys=True, default=str)), position)
        for position, row in enumerate(rows)
    ]


def grouped(positions: Iterable[int], same: Sequence[int]) -> list[list[int]]:
    """Positions whose rows are equal together, by `first_copies`; in their order."""
    units: dict[int, list[int]] = {}
    for position in positions:
        units.setdefault(same[position], []).append(position)
    return [*units.values()]


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _text_problems(value: Any, where: str) -> list[str]:
    if value is None:
        return [f"{where}: missing; it must be a text that isn't empty"]
    if not isinstance(value, str) or _is_blank(value):
        return [f"{where}: {quoted(value)} must be a text that isn't empty"]
    return [f"{where}: {quoted(value)} has half a surrogate pair, which is no text"] if _half_a_pair(value) else []


def _half_a_pair(value: Any) -> bool:
    """Whether a text, or one in a value as JSON has it, can't be written to a file."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _choice_problems(choices: Any) -> list[str]:
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        found = "missing; it" if choices is None else repr(choices)
        return [f"field 'choices': {found} must be a list of at least 2 texts"]
    return [p for i, choice in enumerate(choices) for p in _text_problems(choice, f"field 'choices', item {i}")]


def _empty_answer(record: Mapping[str, Any]) -> list[str]:
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list | tuple) or isinstance(answer, bool) or not isinstance(answer, int):
        return []
    empty = 0 <= answer < len(choices) and choices[answer] == ""
    return [f"field 'answer': {answer} must be the index of a choice that isn't empty"] if empty else []


def _answer_problems(record: Mapping[str, Any], name: str, required: bool) -> list[str]:
    answer = record.get(name)
    if answer is None:
        which = "training" if name == "response" else "training or evaluation"
        return [_MISSING.format(name, which)] if required else []
    if name != "answer":
        return _text_problems(answer, f"field '{name}'")
    count = len(record["choices"])
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < count:
        text = ", nor the letter or the text of exactly one" if isinstance(answer, str) else ""
        return [f"field 'answer': {quoted(answer)} is not an index into {count} choices (0..{count - 1}){text}"]
    return []


def _labels_problems(record: Mapping[str, Any], required: bool) -> list[str]:
    labels = record["labels"]
    if labels is None:
        return [_MISSING.format("labels", "training or evaluation")] if required else []
    if not isinstance(labels, list | tuple):
        return [f"field 'labels': {quoted(labels)} must be a list of texts, which may be empty"]
    if len({*map(str, labels)}) < len(labels):
        return [f"field 'labels': {quoted(labels)} must be a list of texts that are all different"]
    return [p for i, label in enumerate(labels) for p in _text_problems(label, f"field 'labels', item {i}")]


def _token_problems(record: Mapping[str, Any], required: bool) -> list[str]:
    tokens, tags = record["tokens"], record.get("tags")
    if not isinstance(tokens, list | tuple) or not tokens:
        return [f"field 'tokens': {quoted(tokens)} must be a list of at least one text"]
    if tags is None:
        missing = [_MISSING.format("tags", "training or evaluation")] if required else []
    elif not isinstance(tags, list | tuple) or len(tags) != len(tokens):
        missing = [f"field 'tags': {quoted(tags)} must be a list of texts, one for each of the {len(tokens)} tokens"]
    else:
        missing = [p for i, tag in enumerate(tags) for p in _text_problems(tag, f"field 'tags', item {i}")]
    return [p for i, one in enumerate(tokens) for p in _text_problems(one, f"field 'tokens', item {i}")] + missing


def _value_problems(record: Mapping[str, Any], required: bool) -> list[str]:
    value = record["value"]
    if value is None:
        return [_MISSING.format("value", "training or evaluation")] if required else []
    return [] if _is_number(value) else [f"field 'value': {quoted(value)} must be a finite number, such as 3.5"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _preference_problems(record: Mapping[str, Any], required: bool) -> list[str]:
    """Of texts, or of lists of messages."""

    def problems(value: Any, where: str, last: str | None = "assistant") -> list[str]:
        if not isinstance(value, list | tuple):
            return _text_problems(value, where)
        found = _message_problems(value, False, where)
        if not found and last and value[-1]["role"] != last:
            return [f"{where}: the last message's role is {quoted(value[-1]['role'])}; it must be {last!r}"]
        return found

    prompt = problems(record["prompt"], "field 'prompt'", None) if record.get("prompt") is not None else []
    if "chosen" in record:
        wrong = [p for name in ("chosen", "rejected") for p in problems(record.get(name), f"field {name!r}")]
        if not wrong and record["chosen"] == record["rejected"]:
            wrong = [f"field 'rejected': the same as 'chosen'; {_LEAVE_OUT}"]
        margin = record.get("margin")
        if margin is not None and not (_is_number(margin) and margin >= 0):
            wrong += [f"field 'margin': {quoted(margin)} must be a finite number of at least 0"]
        return prompt + wrong + (_tie_problems(record) if required else [])
    if required:
        return [*prompt, _MISSING.format("chosen", "training or evaluation")]
    if not isinstance(responses := record["responses"], list | tuple) or not responses:
        return [*prompt, f"field 'responses': {quoted(responses)} must be a list of at least one text"]
    return prompt + [p for i, one in enumerate(responses) for p in problems(one, f"field 'responses', item {i}")]


def _tie_problems(record: Mapping[str, Any]) -> list[str]:
    """Of a pair of which a column, or the scores, say that the chosen one isn't better."""
    if str(record.get("tie")).casefold() in ("true", "1"):
        return [f"field 'tie': {quoted(record['tie'])} must be false: in a tie none is preferred; {_LEAVE_OUT}"]
    scores = [record.get(f"score_{name}") for name in ("chosen", "rejected")]
    try:
        better, than = map(float, scores)  # type: ignore[arg-type]  # what is no number is no score
    except (TypeError, ValueError):
        return []
    if not better <= than:
        return []
    found = "in a tie none is preferred" if better == than else "by these scores the other one is preferred"
    return [f"field 'score_chosen': {quoted(scores[0])} must be above 'score_rejected': {found}; {_LEAVE_OUT}"]


def _message_problems(messages: Any, required: bool, where: str = "field 'messages'") -> list[str]:
    if not isinstance(messages, list | tuple) or not messages:
        return [f"{where}: {quoted(messages)} must be a list of at least one message"]
    for number, message in enumerate(messages):
        item = f"{where}, item {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return [f"{item}: {quoted(message)} must have 'role' and 'content'"]
        last = number == len(messages) - 1
        for name in ("role", "content"):
            silent = name == "content" and not last and message["role"] in ("system", "assistant")
            if not (silent and _is_blank(message[name])) and (
                problems := _text_problems(message[name], f"{item}: '{name}'")
            ):
                return problems
    if required and (role := messages[-1]["role"]) != "assistant":
        return [f"field 'messages': the last one's role is {quoted(role)}; in training records it must be 'assistant'"]
    return []


class MappedRows(Sequence[Record]):
    """The rows of a file that `write_rows` wrote: mapped into memory, not read into it.

    A row is JSON in one column, because rows need not have the same fields; not `datasets.Json`, which rounds numbers.

    Args:
        table: the file, Arrow; or a `datasets.Dataset` of one.
        positions: of the rows, in order; default: all. `Dataset.select` reads batches at half the speed.

    Attributes:
        positions: of the rows in the file.
    """

    def __init__(self, table: Path | Dataset, positions: Sequence[int] | None = None) -> None:
        from datasets import Dataset

        self._table: Any = table if isinstance(table, Dataset) else Dataset.from_file(str(table))
        self.positions = range(len(self._table)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> MappedRows: ...
    def __getitem__(self, index: int | slice) -> Record | MappedRows:
        return self.select(range(len(self))[index]) if isinstance(index, slice) else self.__getitems__([index])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Record]:
        """Several rows at once, as torch's DataLoader asks for a batch."""
        return [json.loads(row) for row in self._table[[self.positions[i] for i in positions]]["row"]]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            yield from self.__getitems__(range(len(self))[start : start + _ROWS_AT_A_TIME])

    def select(self, positions: Iterable[int]) -> MappedRows:
        """The rows at these positions, in this order; the file stays as it is."""
        return MappedRows(self._table, [self.positions[i] for i in positions])


def write_rows(file: Path, rows: Iterable[Record]) -> None:
    """Write rows, one at a time, in the form that `MappedRows` maps; what a row holds must be what JSON takes."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"row": Value("string")})
    with ArrowWriter(path=str(file), features=features, writer_batch_size=_ROWS_AT_A_TIME) as writer:
        for row in rows:
            writer.write({"row": json.dumps(row)})
        writer.finalize()
