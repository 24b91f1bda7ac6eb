"""Runs in memory: opened and checked, loaded on shared base weights, and asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..contexts import TOKENIZING
from ..data import KINDS, kind_of, read_records
from ..decision import Decision
from ..files import finite_numbers
from ..messages import quoted
from ..runs import PredictionOptions, Run, RunDescription, RunError, load_run, open_run
from ..runs.decide import open_decision, open_realized
from ..runs.evaluate import read_metrics
from ..runs.lines import by_column, lines_of
from ..runs.text_decisions import TextRules, open_text_rules
from .schema import INPUTS
from .writing import Way

_MAX_EXAMPLES = 6
_DESK = ("where is my parcel, it was due on monday", "i want out", "can you recommend a good pasta recipe")
_TEXTS = ("could you help me with this, please", "thank you, it works now")
_NONSENSE = "the purple idea sleeps at nine kilograms"
_QUESTIONS = (
    ("Which gas do plants take in?", ("oxygen", "carbon dioxide", "helium")),
    ("What melts first in the sun?", ("a stone", "a nail", "an ice cube")),
    ("How heavy is the purple idea?", ("nine kilograms", "a Tuesday", "louder")),
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings(PredictionOptions):
    """Limits and defaults of a server, whose ``samples`` are those of a request that asks for no number.

    Raises:
        RunError: fields are out of their range; the message lists all.
    """

    batch_size: int = _option(16, "Inputs a forward pass; requests share it.")
    max_samples: int = _option(100, "Largest N that a request may ask for.")
    max_wait_ms: float = _option(5.0, "How long an input waits for others to share its forward pass, milliseconds.")
    queue: int = _option(256, "Largest number of waiting inputs; requests beyond it get status 429 and Retry-After.")
    max_inputs: int = _option(64, "Largest number of inputs in a request.")
    max_choices: int = _option(64, "Largest number of choices of a question.")
    max_tokens: int = _option(1024, "Largest number of tokens in an input, the choices of a question included.")
    max_body_bytes: int = _option(1_000_000, "Largest body of a request, bytes.")
    read_seconds: float = _option(
        30.0, "Longest time for a request's header to arrive, and then for its body, seconds."
    )
    new_tokens: int = _option(64, "Most tokens of an answer in text, where a request names no other number.")
    max_new_tokens: int = _option(512, "Largest number of tokens of an answer in text that a request may ask for.")
    max_answers: int = _option(20, "Largest number of sampled answers to a prompt that a request may ask for.")
    title: str | None = _option(None, "Of the page and the schema; without it the page has the run's name.")
    description: str | None = _option(None, "What the model is for; without it the page says what run.json does.")
    examples: str | None = _option(
        None,
        "File of inputs that the page offers, in the forms that `train` takes. Without it they are made from the "
        "labels, as training texts may be private.",
    )

    def problems(self) -> list[str]:
        """What is out of its range, and what would be right."""
        counts = ("queue", "max_inputs", "max_choices", "max_tokens", "max_body_bytes", "new_tokens", "max_answers")
        problems = super().problems()
        problems += [f"{name} must be at least 1, got {value}" for name in counts if (value := getattr(self, name)) < 1]
        if self.max_samples < self.samples:
            problems.append(f"max_samples must be at least samples, {self.samples}, got {self.max_samples}")
        if self.max_new_tokens < self.new_tokens:
            problems.append(f"max_new_tokens must be at least new_tokens, {self.new_tokens}, got {self.max_new_tokens}")
        if not (math.isfinite(self.max_wait_ms) and self.max_wait_ms >= 0):
            problems.append(f"max_wait_ms must be a finite number of at least 0, got {self.max_wait_ms}")
        if not (math.isfinite(self.read_seconds) and self.read_seconds > 0):
            problems.append(f"read_seconds must be a finite number above 0, got {self.read_seconds}")
        if self.queue < self.max_inputs:
            problems.append(f"queue must be at least max_inputs, {self.max_inputs}, got {self.queue}")
        return problems


@dataclass
class Hosted:
    """A run that is served, and what requests call it.

    Attributes:
        decision: its decisions, for the settings' N and seed; None where it was never calibrated.
        detection: share of the out-of-scope records given to `calibrate` that its rule flagged; None without such
            records.
        examples: inputs that the page offers.
        shared_parameters: entries of its weights that an earlier run holds too, and that are in memory once.
        rules: of a run that writes text: what is known of texts that are written in one way or another.
    """

    name: str
    folder: Path
    run: Run
    decision: Decision | None
    detection: float | None
    examples: list[dict[str, Any]]
    shared_parameters: int = 0
    rules: list[TextRules] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What its inputs are: ``text``, ``choice``, ``preference``, ``tokens`` or ``prompt``."""
        return "prompt" if self.run.task.kind == "generation" else self.run.task.kind

    @property
    def diagram(self) -> Path:
        """Where its reliability diagram is, if it has one."""
        return self.folder / "reliability.png"

    @property
    def metrics(self) -> dict[str, float]:
        """The latest finite metrics in its folder's ``metrics.json``, if there are; a RunError where it is damaged."""
        entries = read_metrics(self.folder)
        return finite_numbers(entries[-1]["metrics"]) if entries else {}

    def encode(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as its task encodes it; a TaskError where it can't be the task's."""
        with TOKENIZING:
            return self.run.task.encode(record, self.run.tokenizer)

    def answer(
        self, inputs: Sequence[tuple[dict[str, Any], dict[str, Any]]], num_samples: int, settings: Settings
    ) -> list[dict[str, Any]]:
        """What `bloblora.runs.describe` says of each record, with its encoding, and the spread over draws.

        Decisions are for the settings' N alone.
        """
        run, (records, examples) = self.run, zip(*inputs, strict=True)
        prediction = run.predict_encoded(examples, num_samples, settings.seed, batch_size=settings.batch_size)
        lines = lines_of(run.task, records, prediction, self.decision if num_samples == settings.samples else None)
        rows = zip(lines, prediction.std, prediction.num_draws.tolist(), examples, strict=True)
        answers = []
        for line, std, num_draws, example in rows:
            if "probabilities" in line:
                line["std"] = by_column(line, std)
            answers.append(line | {"num_draws": num_draws, "truncated_tokens": example["truncated"]})
        return answers

    def rules_for(self, how: Way) -> TextRules | None:
        """What is known of texts that are written so."""
        return next((rules for rules in self.rules if rules.how == how.options()), None)


def open_hosted(directories: Sequence[str], settings: Settings) -> dict[str, RunDescription]:
    """Check runs before any model is loaded; what their folders say, by name.

    Args:
        directories: folders of runs, or ``hub:user/name``, each alone or as ``NAME=FOLDER``; the folder's or the
            repository's own name is the default.
        settings: of the server.

    Raises:
        RunError: a folder is no finished run, two have one name, a method can't be approximated so, decisions are for
            another N, seed, approximation or adapter, or no run takes the ``examples``.
        DataError: the ``examples`` can't be read.
        AdapterFileError: an adapter's files are damaged.
    """
    opened: dict[str, RunDescription] = {}
    for directory in directories:
        given, equals, rest = directory.partition("=")
        place = rest if equals else directory
        description = open_run(place)
        name = given if equals else description.name
        if not re.fullmatch(r"[\w.-]+", name):
            raise RunError(
                f"{directory}: the name {quoted(name)} must be letters, digits, '_', '.' and '-'; give NAME=FOLDER"
            )
        if name in opened:
            raise RunError(
                f"{opened[name].folder} and {place} are both called {quoted(name)}; give NAME=FOLDER for one of them"
            )
        settings.check(description.method, description.task)
        if description.task.kind != "generation":
            open_decision(description, settings)
        elif settings.approximate:
            raise RunError(f"approximate: {place} writes text, which can't be approximated; serve it without")
        else:
            open_text_rules(description)
        opened[name] = description
    if not opened:
        raise RunError("directories: give at least one folder of a run")
    if settings.examples:
        kind = kind_of(_read_examples(settings.examples))
        if kind not in {description.task.kind for description in opened.values()}:
            raise RunError(f"examples {quoted(settings.examples)}: records with {KINDS[kind]}; no run takes these")
    return opened


def examples_for(description: RunDescription, file: str | None = None) -> list[dict[str, Any]]:
    """Inputs for people to try a run on.

    Those of ``file`` where they are of the run's kind. Otherwise they are made of what the server says anyway: three
    queries for the embedded support desk, else the names of two labels and a nonsensical text, or three questions. The
    run's own training records are not shown, as they may be private.

    Raises:
        DataError: the file can't be read.
    """
    kind = description.task.kind
    if file and kind_of(given := _read_examples(file)) == kind:
        return given
    if kind == "generation":
        return [{"prompt": question} for question, _ in _QUESTIONS]
    if kind == "preference":
        return [{"prompt": question, "responses": [*choices]} for question, choices in _QUESTIONS]
    if kind == "tokens":
        return [{"tokens": text.split()} for text in _TEXTS]
    if kind == "choice":
        return [{"question": question, "choices": [*choices]} for question, choices in _QUESTIONS]
    if description.config.source("data").partition(":")[0] == "support_desk":
        return [{"text": text} for text in _DESK]
    words = [
        re.sub(r"[_-]+", " ", label) for label in description.task.labels or () if re.search(r"[^\W\d_]{3}", label)
    ]
    return [{"text": text} for text in (*[*words, *_TEXTS][:2], _NONSENSE)]


def _read_examples(file: str) -> list[dict[str, Any]]:
    """The inputs in a file, without labels; a RunError where there are too many, or messages, which the page lacks."""
    records = read_records(file, require_labels=False)
    texts = ("prompt", "chosen", "rejected")
    if any("messages" in record or not all(isinstance(record.get(n, ""), str) for n in texts) for record in records):
        raise RunError(f"examples {quoted(file)}: records with messages; give each a 'prompt' that is a text")
    if len(records) > _MAX_EXAMPLES:
        raise RunError(f"examples {quoted(file)}: {len(records)} records; give at most {_MAX_EXAMPLES}")
    names = {name for form in INPUTS.values() for name in form.model_fields}
    return [
        {name: value for name, value in record.items() if name in names}
        | ({"responses": sorted([record["chosen"], record["rejected"]])} if "chosen" in record else {})
        for record in records
    ]


def load_hosted(opened: dict[str, RunDescription], settings: Settings) -> dict[str, Hosted]:
    """Load runs, with weights that are equal in memory once.

    PEFT could hold several adapters on one model, but its switch is one for all layers, an ensemble takes all adapters
    for its members, and heads of different labels have no place on one model. Here each run keeps its own modules, and
    only tensors are shared, wherever two base models agree: also a classifier's with a language model's.
    """
    hosted: dict[str, Hosted] = {}
    pool: dict[str, list[nn.Parameter]] = {}
    for name, description in opened.items():
        run = load_run(description, settings.approximate, trust_remote_code=settings.trust_remote_code)
        examples = examples_for(description, settings.examples)
        shared = share_weights(run.model, pool)
        if description.task.kind == "generation":
            rules = open_text_rules(description)
            hosted[name] = Hosted(name, description.folder, run, None, None, examples, shared, rules)
            continue
        decision = open_decision(description, settings)
        detection = open_realized(description, settings).get("detection")
        hosted[name] = Hosted(name, description.folder, run, decision, detection, examples, shared)
    return hosted


def share_weights(model: nn.Module, pool: dict[str, list[nn.Parameter]]) -> int:
    """Replace a model's parameters by equal ones of a pool, and put the others into it; how many entries are shared.

    From then on nothing may change the parameters in place. The pool has them by their place in the base model.
    """
    replaced: dict[int, nn.Parameter] = {}  # by the old one: tied weights stay tied
    shared = 0
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                place = re.sub(r"^base_model\.model\.|\.base_layer", "", f"{prefix}.{name}")  # without PEFT's parts
                alike = pool.setdefault(place, [])
                found = next((other for other in alike if _equal(parameter, other)), None)
                if found is None:
                    alike.append(parameter)
                else:
                    shared += parameter.numel()
                replaced[id(parameter)] = parameter if found is None else found
            setattr(module, name, replaced[id(parameter)])
    return shared


def _equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    plain = type(a) is type(b) is nn.Parameter  # quantized ones carry more than their values
    return plain and (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
