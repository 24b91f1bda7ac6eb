"""What a run says of texts that it writes or is given, as JSON lines have it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from .. import tasks
from ..decision import Correctness, Decision, confidence_of
from ..generation import Generation, TokenScores, claim_tokens, find_agree
from ..generation.claims import claims_of
from ..generation.options import LEAST_TEMPERATURE, UNCHANGED
from ..generation.text import DRAW_SCORES, SAMPLE_SCORES, DecodingName
from ..generation.tokens import SCORES
from .config import RunError


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """Which tokens a run writes, and what its answers are compared with.

    Raises:
        RunError: one is out of its range; the message lists all.
    """

    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(
        default=0.0,
        metadata={"help": "0 takes the most probable token; above it tokens are sampled: 1 by their probabilities."},
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample only among the most probable tokens that have this probability together."},
    )
    decoding: DecodingName = field(
        default="mean",
        metadata={
            "help": "Whose probabilities an answer's tokens are taken from. `mean`: the posterior mean's, as fast as a "
            "plain LoRA; the weight samples then read the whole answer once. `average`: the average over the weight "
            "samples, each of which reads each token."
        },
    )
    answers: int = field(
        default=0,
        metadata={
            "help": "Also sample so many answers, each by one weight sample in turn (--samples 0: by the posterior "
            "mean), for their semantic entropy (arXiv 2302.09664; Nature 630, 625)."
        },
    )
    answer_temperature: float = field(default=1.0, metadata={"help": "Of --answers, above 0; 1 by the probabilities."})
    agree: str = field(
        default="normalized",
        metadata={
            "help": "When two answers mean the same: `exact`, `normalized` (but for case, punctuation, articles and "
            "white space), `numeric` (the last number), `module:function` or `file.py:function`, or `nli:MODEL`: each "
            "entails the other by a sequence classifier with a label `entailment`, a folder or a name on the hub."
        },
    )
    p_true: bool = field(
        default=False,
        metadata={"help": "Also ask the model whether its answer is true (P(True), arXiv 2207.05221)."},
    )

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise RunError("\n".join(problems))

    def problems(self) -> list[str]:
        """What is out of its range, and what would be right."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            least = f"a finite number of at least {LEAST_TEMPERATURE}"
            problems.append(f"temperature must be 0, or {least}, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], got {self.top_p}")
        elif self.top_p < 1 and self.temperature == 0:
            problems.append(f"top_p: {self.top_p} has no effect without a temperature above 0")
        if self.decoding not in (known := get_args(DecodingName)):
            problems.append(f"decoding must be one of {', '.join(known)}, got {self.decoding!r}")
        if self.answers < 0:
            problems.append(f"answers must be 0 (none) or more, got {self.answers}")
        if not LEAST_TEMPERATURE <= self.answer_temperature < math.inf:
            least = f"a finite number of at least {LEAST_TEMPERATURE}"
            problems.append(f"answer_temperature must be {least}, got {self.answer_temperature}")
        elif self.answer_temperature != 1 and self.answers == 0:
            problems.append(f"answer_temperature: {self.answer_temperature} has no effect without answers")
        return problems

    def writing(self) -> dict[str, Any]:
        """What an answer and its scores depend on, beside the weight samples."""
        return {option.name: getattr(self, option.name) for option in fields(WritingOptions)}

    def of_generation(self) -> dict[str, Any]:
        """As `bloblora.posterior_generate` takes them; a temperature of 0 takes the most probable token.

        Raises:
            ValueError, ModelError: ``agree`` names no relation.
        """
        changed = {"do_sample": self.temperature > 0, "agree": find_agree(self.agree)}
        if not self.temperature:
            return {**self.writing(), **changed, "temperature": None, "top_p": None}
        return {**UNCHANGED, **self.writing(), **changed}


def response_examples(
    task: tasks.Task,
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    claims: str | None = None,
    first: int = 1,
) -> Iterator[dict[str, Any]]:
    """Each record's ``prompt`` and ``response`` as token ids; messages number the records from ``first``.

    Raises:
        TaskError: of all records that have no response, are over the task's ``max_length``, or have claims that their
            response hasn't; after the last one.
    """
    problems = []
    for number, record in enumerate(records, start=first):
        try:
            example = task.encode(record, tokenizer)
            if "response" not in example:
                name = "messages" if "messages" in record else "response"
                raise tasks.TaskError(f"field '{name}': has no response to score; give the text that was written")
            if cut := example["truncated"]:
                total = task.length(example) + cut
                raise tasks.TaskError(
                    f"max_length: prompt and response have {total} tokens, the limit is {task.max_length}"
                )
            if spans := claims_of(record, text := response_of(record), claims):
                claim_tokens(tokenizer, example["response"], text, spans)
        except tasks.TaskError as error:
            problems += [f"record {number}: {problem}" for problem in error.problems]
            continue
        yield example
    if problems:
        raise tasks.TaskError(*problems[:20], *([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))


def needs_draws(correctness: Correctness | None, decision: Decision | None) -> bool:
    """Whether a map or a rule needs the answers of the draws themselves."""
    names = set(() if correctness is None else correctness.scores)
    if decision is not None and decision.answering is not None:
        names.add(decision.answering.score)
    sets = decision is not None and decision.answer_sets is not None
    return sets or not names.isdisjoint(DRAW_SCORES)


def score_names(kind: str, how: Mapping[str, Any]) -> tuple[str, ...]:
    """The scores of texts that are given, or that are written beside the draws' own; see `calibrate_texts`."""
    if kind == "score":
        return SCORES
    sampled = SAMPLE_SCORES if how.get("answers") else ()
    return (*SCORES, *DRAW_SCORES, *sampled, *(("p_true",) if how.get("p_true") else ()))


def decided_texts(decision: Decision, found: TokenScores, correctness: Correctness | None) -> dict[str, list[Any]]:
    """``abstain``, whether to withhold each text, and ``answer_set`` of each prompt; of the rules that are there."""
    result: dict[str, list[Any]] = {}
    if (rule := decision.answering) is not None:
        answers = rule.answers(confidence_of(found.scores(), rule.score, correctness))
        result["abstain"] = (~answers).tolist()
    if decision.answer_sets is not None and isinstance(found, Generation):
        result["answer_set"] = [answers[: decision.answer_sets.threshold] for answers in found.ranked_answers]
    return result


def response_of(record: Mapping[str, Any]) -> str:
    """The text of a record's response, as it is given; "" where it has none."""
    last = (record.get("messages") or [{}])[-1]
    return last["content"] if last.get("role") == "assistant" else record.get("response") or ""


def text_lines(
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[Mapping[str, Any]],
    found: TokenScores,
    tokenizer: PreTrainedTokenizerBase,
    correctness: Correctness | None = None,
    claims: str | None = None,
    decision: Decision | None = None,
) -> Iterator[dict[str, Any]]:
    """A line for each record.

    Args:
        records: that were answered, or whose responses were scored.
        texts: what the line has of the text.
        found: its scores.
        tokenizer: of the tokens.
        correctness: adds ``p_correct``.
        claims: ``sentences``, or None for those that a record has; of responses that are given.
        decision: adds ``abstain``, ``answer_set`` and ``promises``, of the rules that it has.
    """
    scores = found.scores()
    decided = {} if decision is None else decided_texts(decision, found, correctness)
    right = None if correctness is None else correctness.probabilities(scores)
    for i, (record, text) in enumerate(zip(records, texts, strict=True)):
        tokens = found.token_lists(i)
        line = {key: record[key] for key in ("id", "prompt", "messages") if key in record} | {**text}
        if right is not None:
            line["p_correct"] = float(right[i])
        line |= {name: values[i] for name, values in decided.items()}
        if decision is not None:
            line["promises"] = decision.promises
        line |= {name: float(values[i]) for name, values in scores.items()}
        line["draw_log_probabilities"] = found.draw_sequence_log_probs[:, i].tolist()
        if "answer" not in text and (spans := claims_of(record, response := response_of(record), claims)):
            masks = claim_tokens(tokenizer, tokens["ids"], response, spans)
            parts = [found.part(i, mask).scores() for mask in masks]
            line["claims"] = [
                {"text": response[start:end], "start": start, "end": end}
                | {name: float(value) for name, value in part.items()}
                for (start, end), part in zip(spans, parts, strict=True)
            ]
        yield line | {"tokens": {"texts": tokenizer.batch_decode([[token] for token in tokens["ids"]]), **tokens}}
