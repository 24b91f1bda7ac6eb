"""A run's probability that a text is right: fitted on labelled texts, kept in its folder, used by what writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..decision import MAPS, Correctness, CorrectnessError, fit_correctness
from ..decision.correctness import check_counts
from ..generation import find_matcher
from ..messages import quoted
from .checks import check_generates
from .config import RunError
from .entries import EntriesFile, has
from .folder import RunDescription, check_writable, records_sha256
from .predictions import state_of
from .processes import CHUNK
from .run import load_run
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
        records: labelled, used for nothing else.
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
        RunError: a run that isn't of text, is on the hub, or whose folder can't be written; records of another kind, or
            without what they need.
        CorrectnessError: too few texts are right or wrong; nothing is saved.
        ValueError: there is no such matcher, or a reference that it can't use.
    """
    if description.remote:
        raise RunError(f"{description.name}: is on the hub; fit a map in a folder, and push that")
    check_generates(description.task, records)
    given, agree = _given(records), find_matcher(matcher)
    if given is not None:
        check_counts(sum(given), len(given))
    if given is None:
        references = [response_of(record) for record in records]
        for number, reference in enumerate(references, start=1):
            if not reference:
                raise RunError(f"record {number}: it has no response, the reference, and no 'right'; give one of them")
            try:
                agree(reference, reference)
            except Exception as error:  # a user's function may raise anything
                raise RunError(f"record {number}: field 'response': matcher {matcher}: {error}") from error
    kind = "generate" if given is None else "score"
    place = _place(kind, how)
    file, state = description.folder / CORRECTNESS_FILE, state_of(description)
    check_writable(file)
    _MAPS.read(file)  # what is added to must be readable
    run = load_run(description, trust_remote_code=trust_remote_code)
    if given is not None:  # all that is wrong, before the first is scored
        for _ in response_examples(run.task, records, run.tokenizer):
            pass
    right, parts = [], []
    for start in range(0, len(records), CHUNK):
        chunk: Any = records[start : start + CHUNK]
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        if given is not None:
            right += given[start : start + CHUNK]
            parts.append(run.score(chunk, how["num_samples"], how["seed"], **options).scores())
            continue
        written = run.generate(chunk, how["num_samples"], how["seed"], **options, **generation)
        right += [agree(*pair) for pair in zip(written.texts, references[start : start + CHUNK], strict=True)]
        parts.append(written.scores())
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    fitted = fit_correctness(scores, torch.tensor(right).bool(), maps=maps)
    entry = {**place, **state, "records_sha256": records_sha256(records)}
    entry |= {"matcher": matcher if given is None else None, "correctness": fitted.to_dict()}
    _MAPS.put(file, entry, place, state)
    return entry


def open_correctness(description: RunDescription, kind: str, how: Mapping[str, Any]) -> Correctness | None:
    """The map in a finished run's folder for texts that are generated or given, or None where there is none.

    Args:
        description: of the run.
        kind: ``generate`` or ``score``.
        how: as for `calibrate_texts`.

    Raises:
        RunError: the maps of this kind are for other options or another adapter, or the file is damaged.
    """
    file, wanted = description.folder / CORRECTNESS_FILE, {**_place(kind, how), **state_of(description)}
    entries = [entry for entry in _MAPS.read(file) if entry["of"] == kind]
    if not entries:
        return None
    for entry in entries:
        if has(entry, wanted):
            try:
                return Correctness.from_dict(entry["correctness"])
            except CorrectnessError as error:
                raise RunError(f"{file}: {error}; remove the file, and run `bloblora correctness` again") from error
    there = "; ".join(", ".join(f"{name} {entry.get(name)}" for name in wanted) for entry in entries)
    now = ", ".join(f"{name} {value}" for name, value in wanted.items())
    raise RunError(
        f"{file} is for other texts ({there} there, {now} now); run `bloblora correctness` again with these options, "
        "or remove the file to do without p_correct"
    )


def _place(kind: str, how: Mapping[str, Any]) -> dict[str, Any]:
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
