"""Answers in text, written together, whose tokens are told while they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..generation.decoding import Step
from ..prediction.kinds import mutual_information
from ..runs import Run
from ..runs.text_decisions import TextRules
from ..runs.texts import WritingOptions, decided_texts, needs_draws


@dataclass(frozen=True)
class Way:
    """How texts are written; those that are written in one way share forwards.

    Attributes:
        name: of the run.
        num_samples, seed: of the weight samples.
        writing: as for `bloblora generate`.
        draws: whether the answers of the draws are asked for.
    """

    name: str
    num_samples: int
    seed: int
    writing: WritingOptions
    draws: bool = False

    def options(self) -> dict[str, Any]:
        """What a map to ``p_correct`` and decisions depend on."""
        return {"num_samples": self.num_samples, "seed": self.seed} | self.writing.writing()


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        id: of the token.
        log_probability: by what it was taken from, nats.
        mutual_information: nats; None where the posterior mean has written it and the draws have yet to read it.
        top: ids and log-probabilities of the most probable ones.
    """

    id: int
    log_probability: float
    mutual_information: float | None
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Writing:
    """An answer that is asked for.

    Attributes:
        example: its encoded prompt.
        send: tells its tokens.
        gone: set when nobody waits for it.
        stop: texts before which it ends.
        top: how many of the most probable tokens are named at each place.
    """

    example: dict[str, Any]
    send: Callable[[Token], None]
    gone: Event
    stop: Sequence[str] = ()
    top: int = 0


class GoneError(RuntimeError):
    """Nobody waits for what is being written."""


def write(run: Run, how: Way, answers: Sequence[Writing], rules: TextRules | None) -> list[dict[str, Any]]:
    """Write answers, and tell each `Writing` its tokens.

    Returns:
        Of each answer ``finish_reason``, ``uncertainty`` (its scores by name), ``read`` (what the draws say of its
        tokens), ``num_draws``, ``draws`` (their answers) and ``sampled`` where these are asked for, and of ``rules``
        ``p_correct``, ``abstain``, ``answer_set`` and ``promises``, but of none that has a stop.

    Raises:
        GoneError: nobody waits for any of them.
    """
    examples = [answer.example for answer in answers]
    longest = sorted(answers, key=lambda answer: -len(answer.example["prompt"]))  # as they are batched
    width = len(longest[0].example["prompt"])
    found = run.generate_encoded(
        examples,
        how.num_samples,
        how.seed,
        batch_size=len(examples),
        draws=how.draws or (rules is not None and needs_draws(rules.correctness, rules.decision)),
        on_token=partial(_tell, answers, how.num_samples > 0 and how.writing.decoding == "mean"),
        stopping_criteria=StoppingCriteriaList([_Ended(longest, run.tokenizer, width)]),
        **how.writing.of_generation(),
    )
    scores = found.scores()
    decided: dict[str, list[Any]] = {}
    if rules and rules.correctness:
        decided["p_correct"] = rules.correctness.probabilities(scores).tolist()
    if rules and rules.decision:
        decided |= decided_texts(rules.decision, found, rules.correctness)
        decided["promises"] = [rules.decision.promises] * len(answers)
    written = {"draws": found.draw_texts} if how.draws else {}
    written |= {"sampled": [*found.sampled_texts]} if found.sampled_texts else {}
    limit = how.writing.max_new_tokens
    of_tokens = [found.token_lists(row) for row in range(len(answers))]
    return [
        {"finish_reason": _reason(found.tokens[row, found.mask[row]], run, answer.stop, limit)}
        | {name: values[row] for name, values in decided.items() if not answer.stop}
        | {name: [text[: first_stop(text, answer.stop)] for text in texts[row]] for name, texts in written.items()}
        | {"uncertainty": {name: float(values[row]) for name, values in scores.items()}}
        | {"read": {name: of_tokens[row][name] for name in ("log_probabilities", "mutual_information")}}
        | {"num_draws": len(found.draw_log_probs)}
        for row, answer in enumerate(answers)
    ]


def _tell(answers: Sequence[Writing], read_later: bool, rows: Sequence[int], step: Step) -> None:
    """Send each answer that still runs its token."""
    draws = len(step.logits)
    log_probs = step.log_probs.logsumexp(0) - math.log(draws)
    epistemic: list[float | None] = [None] * len(rows)
    if not read_later:
        epistemic = mutual_information(step.entropies, step.expected_entropies, draws).tolist()
    most: list[list[tuple[int, float]]] = [[] for _ in rows]
    if top := max(answers[row].top for row in rows):
        values, ids = (step.logits.log_softmax(-1).logsumexp(0) - math.log(draws)).topk(top)
        pairs = zip(rows, ids.tolist(), values.tolist(), strict=True)
        most = [[*zip(*pair, strict=True)][: answers[row].top] for row, *pair in pairs]
    columns = (step.running.tolist(), step.tokens.tolist(), log_probs.tolist(), epistemic, most)
    for row, (running, *token) in zip(rows, zip(*columns, strict=True), strict=True):
        if running:
            answers[row].send(Token(*token))


class _Ended(StoppingCriteria):
    """Ends an answer that has one of its stops in it, and all where nobody waits for any."""

    def __init__(self, answers: Sequence[Writing], tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self._answers, self._tokenizer, self._width = answers, tokenizer, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Which rows have ended, (b,) bool."""
        if all(answer.gone.is_set() for answer in self._answers):
            raise GoneError("whoever asked has gone")
        pairs = zip(input_ids, self._answers, strict=True)
        ended = [_stopped(ids[self._width :], self._tokenizer, answer.stop) for ids, answer in pairs]
        return torch.tensor(ended, device=input_ids.device)


def _stopped(ids: Tensor, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> bool:
    text = str(tokenizer.decode(ids, skip_special_tokens=True)) if stop else ""
    return any(one in text for one in stop)


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first stop in a text starts; where there is none, the text's end."""
    return min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))


def _reason(ids: Tensor, run: Run, stop: Sequence[str], limit: int) -> str:
    """Why an answer ended, in OpenAI's words."""
    whole = len(ids) == limit and int(ids[-1]) not in run.end_token_ids
    return "length" if whole and not _stopped(ids, run.tokenizer, stop) else "stop"
