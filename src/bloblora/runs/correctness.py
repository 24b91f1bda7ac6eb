"""A run's probability that a text is right: fitted on labelled texts, kept in its folder, used by what writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import unanswered
from ..decision import MAPS, Correctness, CorrectnessError, fit_correctness
from ..decision.correctness import check_counts, check_maps
from ..files import json_sha256
from ..generation import Matcher, find_matcher
from ..messages import quoted, shortened
from .checks import check_generates
from .config import RunError
from .entries import EntriesFile, has, there_and_now
from .folder import RunDescription, check_local, check_writable, read_fields, records_sha256
from .predictions import state_of
from .processes import CHUNK
from .run import Run, load_run
from .seen import unseen
from .texts import response_examples, response_of

CORRECTNESS_FILE = "correctness.json"
_WORDS = {"true": True, "right": True, "1": True, "false": False, "wrong": False, "0": False}


@dataclass(frozen=True)
class _Entry:
    """A map and which texts it is for, as the file has them."""

    of: Literal["generate", "score"]
    options: dict[str, Any]
    adapter_sha256: str
    files_sha256: str
    records_sha256: str
    prompts: list[str]
    matcher: str | None
    correctness: Correctness
    temperature: float | None = None
    width: float | None = None


@dataclass(frozen=True)
class _File:
    format_version: int
    maps: list[_Entry]


_MAPS = EntriesFile(_File, 1, "correctness")


def calibrate_texts(
    description: RunDescription,
    records: Sequence[dict[str, Any]],
    how: Mapping[str, Any],
    *,
    matcher: str = "normalized",
    maps: Sequence[str] = MAPS,
    batch_size: int = 16,
    progress: bool = False,
    trust_remote_code: bool = False,
    **generation: Any,
) -> dict[str, Any]:
    """Fit a map to the probability that a text is right, and save it in the run's folder.

    Records with ``right``, true or false, are texts that are given: their responses are scored, and the map is for
    `Run.score`. Of others the response is a reference: the run answers, a matcher says whether it is right, and the map
    is for `Run.generate`. A map for other options stays there; those for another adapter go.

    Args:
        description: of the run.
        records: labelled, used for nothing else. A few that the run has seen are left out, with a warning.
        how: ``num_samples`` and ``seed``, and what else decides the scores: ``max_new_tokens``, ``temperature``, ….
        matcher: see `bloblora.generation.find_matcher`.
        maps: see `bloblora.decision.fit_correctness`.
        batch_size: texts a forward.
        progress: show a bar.
        trust_remote_code: as of `load_run`.
        generation: options of `Run.generate`.

    Returns:
        What the file says of the map.

    Raises:
        RunError: a run that isn't of text, is on the hub, or whose folder can't be written; records of another kind,
            without what they need, or of which the run has seen at least half.
        CorrectnessError: too few texts are right or wrong; nothing is saved.
        ValueError: there is no such matcher, or a reference that it can't use.
    """
    check_maps(maps)
    texts = LabelledTexts.of(description, records, matcher)
    if texts.given is not None:
        check_counts(sum(texts.given), len(texts.given))
    place, state, file = place_of(texts.kind, how), state_of(description), description.folder / CORRECTNESS_FILE
    check_writable(file)
    _MAPS.read(file)  # what is added to must be readable
    run = load_run(description, trust_remote_code=trust_remote_code)
    scores, right, _ = texts.read(run, how, batch_size=batch_size, progress=progress, **generation)
    fitted = fit_correctness(scores, right, maps=maps)
    entry = {**place, **state, "records_sha256": records_sha256(texts.records), "prompts": texts.prompts}
    entry |= {"matcher": matcher if texts.given is None else None, "correctness": fitted.to_dict()}
    _MAPS.put(file, entry, place, state)
    return entry


def open_maps(description: RunDescription, kind: str) -> list[tuple[dict[str, Any], Correctness]]:
    """The maps in a finished run's folder for texts that are generated or given, with their options.

    Raises:
        RunError: they are for another adapter, or the file is damaged.
    """
    file, state = description.folder / CORRECTNESS_FILE, state_of(description)
    entries = [entry for entry in _MAPS.read(file) if entry["of"] == kind]
    if not all(has(entry, state) for entry in entries):
        raise RunError(f"{file} is for another adapter; run `bloblora correctness` again, or remove the file")
    return [(entry["options"], map_of(file, entry)) for entry in entries]


def open_correctness(description: RunDescription, kind: str, how: Mapping[str, Any]) -> Correctness | None:
    """The map in a finished run's folder for texts that are generated or given, or None where there is none.

    Args:
        description: of the run.
        kind: ``generate`` or ``score``.
        how: as for `calibrate_texts`.

    Raises:
        RunError: the maps of this kind are for other options or another adapter, or the file is damaged.
    """
    entry = find_entry(description, kind, how)
    return None if entry is None else map_of(description.folder / CORRECTNESS_FILE, entry)


def map_of(file: Path, entry: Mapping[str, Any]) -> Correctness:
    """The map of an entry of the file; a RunError where its numbers can't be one's."""
    try:
        return Correctness.from_dict(entry["correctness"])
    except CorrectnessError as error:
        raise RunError(f"{file}: {error}; remove the file, and run `bloblora correctness` again") from error


def find_entry(description: RunDescription, kind: str, how: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same, as the file has it."""
    file, wanted = description.folder / CORRECTNESS_FILE, {**place_of(kind, how), **state_of(description)}
    entries = [entry for entry in _MAPS.read(file) if entry["of"] == kind]
    if not entries:
        return None
    for entry in entries:
        if has(entry, wanted):
            return entry
    raise RunError(
        f"{file} is for other texts ({there_and_now(entries, wanted)}); run `bloblora correctness` again with these "
        "options, or remove the file to do without p_correct"
    )


@dataclass(frozen=True)
class LabelledTexts:
    """Texts that are known to be right or wrong: given ones, or the run's answers, which have references.

    Attributes:
        records: n of them.
        given: whether the responses are right; None where they are references.
        references: those, else empty.
        agree: whether an answer is its reference.
        matcher: the name of that.
        numbers: of the records in the data, from 1.
    """

    records: Sequence[dict[str, Any]]
    given: list[bool] | None
    references: list[str]
    agree: Matcher
    matcher: str
    numbers: list[int]

    @classmethod
    def of(cls, description: RunDescription, records: Sequence[dict[str, Any]], matcher: str) -> LabelledTexts:
        """Check the records, before a model is loaded; raises what `calibrate_texts` does."""
        check_local(description)
        check_generates(description.task, records)
        given, agree = _given(records), find_matcher(matcher)
        references = [] if given else [response_of(record).strip() for record in records]
        for number, reference in enumerate(references, start=1):
            if not reference:
                raise RunError(f"record {number}: it has no response, the reference, and no 'right'; give one of them")
            try:
                agree(reference, reference)
            except Exception as error:  # a user's function may raise anything
                raise RunError(f"record {number}: field 'response': matcher {matcher}: {error}") from error
        kept = unseen(description, records)
        given, references = given and [given[i] for i in kept], [references[i] for i in kept if references]
        return cls([records[i] for i in kept], given, references, agree, matcher, [i + 1 for i in kept])

    @property
    def kind(self) -> str:
        """Whose texts they are: ``generate``'s or ``score``'s."""
        return "generate" if self.given is None else "score"

    @property
    def prompts(self) -> list[str]:
        """A hash of each prompt, by which it is known again, 16 hexadecimal digits."""
        return [json_sha256(read_fields(unanswered(record)))[:16] for record in self.records]

    def read(
        self, run: Run, how: Mapping[str, Any], *, batch_size: int, progress: bool, **generation: Any
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """What the run says of them.

        Returns:
            Its scores by name, each (n,); whether the texts are right, (n,) bool; and of answers the place of the first
            right one in `Generation.ranked_answers`, (n,), infinite where there is none.
        """
        if self.given is not None:  # all that is wrong, before the first is scored
            for _ in response_examples(run.task, self.records, run.tokenizer):
                pass
        right, ranks, parts = [], [], []
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        for start in range(0, len(self.records), CHUNK):
            chunk: Any = self.records[start : start + CHUNK]
            if self.given is not None:
                parts.append(run.score(chunk, how["num_samples"], how["seed"], **options).scores())
                continue
            written = run.generate(chunk, how["num_samples"], how["seed"], **options, **generation)
            parts.append(written.scores())
            for row, answers in enumerate(written.ranked_answers, start=start):
                places = (i for i, answer in enumerate(answers, start=1) if self._is_right(answer, row))
                ranks.append(float(next(places, torch.inf)))
                right.append(ranks[-1] == 1)
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.given is not None:
            return scores, torch.tensor(self.given), None
        return scores, torch.tensor(right), torch.tensor(ranks)

    def _is_right(self, answer: str, row: int) -> bool:
        try:
            return self.agree(answer, self.references[row])
        except Exception as error:  # a user's function may raise anything
            reason = shortened(f"{type(error).__name__}: {error}")
            texts = f"the answer {quoted(answer)} and the reference {quoted(self.references[row])}"
            raise RunError(
                f"record {self.numbers[row]}: matcher {self.matcher} must give True or False for {texts}; got {reason}"
            ) from error


def place_of(kind: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Which texts something is for: ``of`` says whose, and ``options`` how."""
    names = ("num_samples", "seed") if kind == "score" else how
    return {"of": kind, "options": {name: how[name] for name in names}}


def _given(records: Sequence[Mapping[str, Any]]) -> list[bool] | None:
    """Whether each text that is given is right; None where no record says so."""
    values = [record.get("right") for record in records]
    if all(value in (None, "") for value in values):
        return None
    found = [_WORDS.get(str(value).strip().lower()) for value in values]
    for number, (value, right) in enumerate(zip(values, found, strict=True), start=1):
        if right is None:
            raise RunError(f"record {number}: field 'right': {quoted(value)} must be true or false, of all or none")
    return [bool(right) for right in found]
