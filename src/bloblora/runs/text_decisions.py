"""A run's promises about texts: which to withhold, and sets of answers; kept with its decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import unanswered
from ..decision import Decision, check_text_promises, confidence_of, fit_text_decision
from ..decision.correctness import SIGNS, Correctness, check_by
from ..files import json_sha256
from .checks import warn_of_copies
from .config import RunError
from .correctness import CORRECTNESS_FILE, LabelledTexts, find_entry, map_of, open_maps, place_of
from .decide import DECISION_FILE, check_place, open_decisions, save_decision
from .entries import has, there_and_now
from .folder import RunDescription
from .run import load_run
from .texts import score_names


def promise_texts(
    description: RunDescription,
    records: Sequence[dict[str, Any]],
    how: Mapping[str, Any],
    *,
    matcher: str = "normalized",
    by: str = "p_correct",
    risk: float = 0.05,
    level: float = 0.95,
    coverage: float = 0.9,
    batch_size: int = 16,
    progress: bool = False,
    trust_remote_code: bool = False,
    **generation: Any,
) -> dict[str, Any]:
    """Fit a run's decisions about texts on labelled ones, and save them in its folder.

    Args:
        description: of the run.
        records: labelled as for `bloblora.runs.correctness.calibrate_texts`, used for nothing else: not for the map to
            ``p_correct`` either.
        how: as there.
        matcher: as there.
        by: the confidence that an answer needs: ``p_correct``, or the name of a score.
        risk: see `bloblora.decision.fit_text_decision`.
        level: likewise.
        coverage: likewise.
        batch_size: texts a forward.
        progress: show a bar.
        trust_remote_code: as of `load_run`.
        generation: options of `Run.generate`.

    Returns:
        What the file says of the decisions: as `bloblora.runs.decide.calibrate_on`.

    Raises:
        RunError: as for `calibrate_texts`; or there is no map to ``p_correct``, or records that it was fitted on.
        CorrectnessError: ``by`` is no score of these texts.
        PromiseError: none of the promises can be made; nothing is saved.
        ValueError: there is no such matcher, or an argument is out of its range.
    """
    check_place(description)
    texts = LabelledTexts.of(description, records, matcher)
    check_by(by, score_names(texts.kind, how))
    promises = {"risk": risk, "level": level, "coverage": coverage}
    check_text_promises(len(texts.records), sets=texts.given is None, **promises)
    warn_of_copies([unanswered(record) if texts.given is None else record for record in texts.records])
    correctness = _map_of_others(description, texts, how) if by == "p_correct" else None
    run = load_run(description, trust_remote_code=trust_remote_code)
    # Sets have the draws' answers in them.
    options = {**generation, "draws": True} if texts.given is None else {}
    scores, right, ranks = texts.read(run, how, batch_size=batch_size, progress=progress, **options)
    confidence = confidence_of(scores, by, correctness)
    decision = fit_text_decision(confidence, right, ranks, score=by, **promises)
    content: dict[str, Any] = {
        "decision": decision.to_dict(),
        "promises": decision.promises,
        "realized": decision.realized_by_texts(confidence, right, ranks),
    }
    if correctness is not None:
        content["correctness_sha256"] = json_sha256(correctness.to_dict())
    return save_decision(description, _place(texts.kind, how), content)


def open_text_decision(
    description: RunDescription, kind: str, how: Mapping[str, Any], correctness: Correctness | None
) -> Decision | None:
    """The decisions in a finished run's folder about texts that are generated or given, or None where there are none.

    Args:
        description: of the run.
        kind: ``generate`` or ``score``.
        how: as for `calibrate_texts`.
        correctness: the map to ``p_correct`` that is in force.

    Raises:
        RunError: those of this kind are for other options, another adapter or another map, or the file is damaged.
    """
    of_kind = _of_kind(description, kind)
    if not of_kind:
        return None
    file, here = description.folder / DECISION_FILE, _place(kind, how)
    for entry, decision in of_kind:
        if not has(entry, here):
            continue
        wanted = entry.get("correctness_sha256")
        if wanted and (correctness is None or wanted != json_sha256(correctness.to_dict())):
            raise RunError(f"{file} is for another map to p_correct; run `bloblora calibrate` again")
        return decision
    there = there_and_now((entry["text"]["options"] for entry, _ in of_kind), here["text"]["options"])
    raise RunError(
        f"{file} is for other texts ({there}); run `bloblora calibrate` again with these options, or remove the file "
        "to do without decisions"
    )


@dataclass(frozen=True)
class TextRules:
    """What is known of texts that are written in one way.

    Attributes:
        how: as for `calibrate_texts`.
        correctness: the map to ``p_correct``.
        decision: which texts to withhold, and sets of answers.
    """

    how: Mapping[str, Any]
    correctness: Correctness | None
    decision: Decision | None


def open_text_rules(description: RunDescription) -> list[TextRules]:
    """All maps and decisions in a finished run's folder for texts that it writes.

    Raises:
        RunError: decisions are for another adapter or another map, or a file is damaged.
    """
    maps = open_maps(description, "generate")
    decided = [entry["text"]["options"] for entry, _ in _of_kind(description, "generate")]
    rules = []
    ways = [how for how, _ in maps]
    for how in [*ways, *(how for how in decided if how not in ways)]:
        correctness = next((found for options, found in maps if options == how), None)
        decision = open_text_decision(description, "generate", how, correctness) if how in decided else None
        rules.append(TextRules(how, correctness, decision))
    return rules


def _map_of_others(description: RunDescription, texts: LabelledTexts, how: Mapping[str, Any]) -> Correctness:
    """The map to ``p_correct``, which none of these records decided."""
    entry = find_entry(description, texts.kind, how)
    if entry is None:
        raise RunError(
            f"by: there is no map to p_correct for `bloblora {texts.kind}` in {description.folder}; run `bloblora "
            "correctness` on other records first, or give --by log_probability or another score"
        )
    known = set(entry["prompts"])
    if seen := [number for number, prompt in enumerate(texts.prompts, start=1) if prompt in known]:
        raise RunError(
            f"record {seen[0]}: its prompt, and those of {len(seen)} records of {len(texts.records)}, are among those "
            f"that {CORRECTNESS_FILE} was fitted on; a promise needs other records"
        )
    return map_of(description.folder / CORRECTNESS_FILE, entry)


def _of_kind(description: RunDescription, kind: str) -> list[tuple[dict[str, Any], Decision]]:
    found = open_decisions(description)
    of_kind = [(entry, decision) for entry, decision in found if (entry.get("text") or {}).get("of") == kind]
    for rule in (decision.answering for _, decision in of_kind):
        if rule is not None and SIGNS.get(rule.score) and rule.threshold >= 0:  # log c is at most 0
            raise RunError(
                f"{description.folder / DECISION_FILE}: its threshold of {rule.score} is {rule.threshold:.3g}, by an "
                "earlier version of bloblora; it must be below 0, of a log-confidence: run `bloblora calibrate` again"
            )
    return of_kind


def _place(kind: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """What the decisions are for."""
    of = {"num_samples": how["num_samples"], "seed": how["seed"], "approximate": None}
    return {**of, "text": place_of(kind, how)}
