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
from ..runs.texts import WritingOptions, decided_texts


@dataclass(frozen=True)
class Way:
    """How texts are written; those that are written in one way share forwards.

    Attributes:
        name: of the run.
        num_samples, seed: of the weight samples.
        writing: as for `bloblora generate`.
        stop: texts before which an answer ends.
        top: how many of the most probable tokens are named at each place.
        draws: whether the answers of the draws are asked for.
    """

    name: str
    num_samples: int
    seed: int
    writing: WritingOptions
    stop: tuple[str, ...] = ()
    top: int = 0
    draws: bool = False

    def options(self) -> dict[str, Any]:
        """What a map to ``p_correct`` and decisions depend on."""
        return {"num_samples": self.num_samples, "seed": self.seed} | self.writing.writing()


@dataclass(frozen=True)
class Token:
    """A token of an answer: log p̄ and mutual information in nats, and ids and log p̄ of the most probable ones."""

    id: int
    log_probability: float
    mutual_information: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Writing:
    """An answer that is asked for: its encoded prompt, who is told its tokens, and whether they have gone."""

    example: dict[str, Any]
    send: Callable[[Token], None]
    gone: Event


class GoneError(RuntimeError):
    """Nobody waits for what is being written."""


def write(run: Run, how: Way, answers: Sequence[Writing], rules: TextRules | None) -> list[dict[str, Any]]:
    """Write answers, and tell each `Writing` its tokens.

    Returns:
        Of each answer ``finish_reason``, ``uncertainty`` (its scores by name), ``num_draws``, ``draws`` (their answers)
        and ``sampled`` where these are asked for, and of ``rules`` ``p_correct``, ``abstain``, ``answer_set`` and
        ``promises``.

    Raises:
        GoneError: nobody waits for any of them.
    """
    examples = [answer.example for answer in answers]
    width = max(len(example["prompt"]) for example in examples)
    found = run.generate_encoded(
        examples,
        how.num_samples,
        how.seed,
        batch_size=len(examples),
        draws=how.draws or (rules is not None and rules.of_draws),
        on_token=partial(_tell, answers, how.top),
        stopping_criteria=StoppingCriteriaList([_Ended(answers, run.tokenizer, width, how.stop)]),
        **how.writing.of_generation(),
    )
    scores = found.scores()
    decided: dict[str, list[Any]] = {}
    if rules and rules.correctness:
        decided["p_correct"] = rules.correctness.probabilities(scores).tolist()
    if rules and rules.decision:
        decided |= decided_texts(rules.decision, found, rules.correctness)
        decided["promises"] = [rules.decision.promises] * len(answers)
    if how.draws:
        decided["draws"] = _all_before(found.draw_texts, how.stop)
    if found.sampled_texts:
        decided["sampled"] = _all_before(found.sampled_texts, how.stop)
    return [
        {"finish_reason": _reason(found.tokens[row, found.mask[row]], run.tokenizer, how)}
        | {name: values[row] for name, values in decided.items()}
        | {"uncertainty": {name: float(values[row]) for name, values in scores.items()}}
        | {"num_draws": len(found.draw_log_probs)}
        for row in range(len(answers))
    ]


def _tell(answers: Sequence[Writing], top: int, rows: Sequence[int], step: Step) -> None:
    """Send each answer that still runs its token."""
    draws = len(step.logits)
    log_probs = step.log_probs.logsumexp(0) - math.log(draws)
    epistemic = mutual_information(step.entropies, step.expected_entropies, draws)
    most: list[list[tuple[int, float]]] = [[] for _ in rows]
    if top:
        values, ids = (step.logits.log_softmax(-1).logsumexp(0) - math.log(draws)).topk(top)
        most = [[*zip(*pair, strict=True)] for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    columns = (step.running.tolist(), step.tokens.tolist(), log_probs.tolist(), epistemic.tolist(), most)
    for row, (running, *token) in zip(rows, zip(*columns, strict=True), strict=True):
        if running:
            answers[row].send(Token(*token))


class _Ended(StoppingCriteria):
    """Ends an answer that has one of the stops in it, and all where nobody waits for any."""

    def __init__(
        self, answers: Sequence[Writing], tokenizer: PreTrainedTokenizerBase, width: int, stop: Sequence[str]
    ) -> None:
        self._answers, self._tokenizer, self._width, self._stop = answers, tokenizer, width, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Which rows have ended, (b,) bool."""
        if all(answer.gone.is_set() for answer in self._answers):
            raise GoneError("whoever asked has gone")
        ended = [_stopped(ids[self._width :], self._tokenizer, self._stop) for ids in input_ids]
        return torch.tensor(ended, device=input_ids.device)


def _stopped(ids: Tensor, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> bool:
    text = str(tokenizer.decode(ids, skip_special_tokens=True)) if stop else ""
    return any(one in text for one in stop)


def _all_before(answers: Sequence[Sequence[str]], stop: Sequence[str]) -> list[list[str]]:
    """The part of each text before its first stop."""

    def before(text: str) -> str:
        return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]

    return [[*map(before, texts)] for texts in answers]


def _reason(ids: Tensor, tokenizer: PreTrainedTokenizerBase, how: Way) -> str:
    """Why an answer ended, in OpenAI's words."""
    whole = len(ids) == how.writing.max_new_tokens and int(ids[-1]) != tokenizer.eos_token_id
    return "length" if whole and not _stopped(ids, tokenizer, how.stop) else "stop"
