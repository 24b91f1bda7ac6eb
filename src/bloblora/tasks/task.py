"""What every task is, and tasks by name: records become token ids, and a model's output one logit a column."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import TOKENIZING
from ..data.records import KINDS, record_kind, record_problems
from ..files import check_fields
from ..registry import Registry
from .likelihood import Categorical, Likelihood

Record = Mapping[str, Any]
Example = dict[str, Any]
Batch = dict[str, Tensor]
Score = TypeVar("Score", float, Tensor)
DEFAULT_MAX_LENGTH = 1024
"""Most tokens of an input where nothing else is asked for: two texts of 7,000 made two steps take minutes."""
_log = logging.getLogger("bloblora")


class TaskError(ValueError):
    """A record, an option or a model that a task can't work with; `problems` lists them all."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way of asking a model for a distribution over labels or choices; fields that have a help are its options.

    A subclass says the class variables, `columns`, `target`, `tokenize`, `collate` and `logits`.

    Args:
        pad_token_id: id that fills a batch, the tokenizer's; a classification head must know the same one.
        max_length: most tokens the model reads for one answer; longer inputs are truncated. None: no limit.
    """

    pad_token_id: int
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens that the model reads for one answer; longer inputs are truncated. "
            "Default: the model's own limit, and no more than 1024."
        },
    )

    name: ClassVar[str]
    kind: ClassVar[str]
    """The records that it reads, one of `bloblora.data.KINDS`."""
    pipeline_tag: ClassVar[str]
    """What the hub calls such a task, for example ``text-classification``."""
    task_type: ClassVar[str] = "CAUSAL_LM"
    """PEFT's name for the model that it needs, ``CAUSAL_LM``, ``SEQ_CLS`` or ``TOKEN_CLS``."""
    scored_by: ClassVar[tuple[str, ...]] = ()
    """How a completion server can score its choices: ``echo``, by the log-probabilities of a prompt that holds them;
    ``top_logprobs``, by those of the most probable next tokens."""
    truncates: ClassVar[str] = "the beginning of the question or prompt"
    """What of a long record is cut off."""
    labels: ClassVar[tuple[str, ...] | None] = None
    """The columns where they are the same for all records: the outputs of the model's head."""
    head_module: ClassVar[str | None] = None
    """Where in a model its head must be, for a task that reads the head itself."""
    needs: ClassVar[str] = ""
    """What a model must be for that, as a sentence."""
    answer: ClassVar[str] = "label"
    """The field of a record that holds its answer; of ``label`` records are held out for each value alike."""
    family: ClassVar[type[Likelihood]] = Categorical
    """What kind of likelihood it has."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise TaskError(f"max_length: {self.max_length} is not a number of tokens; at least 1, or None")

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task for these records; what `options` leaves open comes from the tokenizer.

        Raises:
            TaskError: an option that the task doesn't have, or a tokenizer without a pad token.
        """
        cls._check_options(options)
        if tokenizer.pad_token_id is None:
            raise TaskError("tokenizer: has no pad token; set one, for example pad_token = eos_token")
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
        limit = tokenizer.model_max_length  # huge where it knows none
        if (options.setdefault("max_length", min(limit, DEFAULT_MAX_LENGTH)) or 0) > limit:
            _log.warning("max_length=%d is above the model's own limit, %d tokens", options["max_length"], limit)
        return cls(**options)

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Whether the task is the one to take for these records when none is named."""
        return bool(records) and all(record_kind(record) == cls.kind for record in records)

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError for options, or records to train on, that can't be the task's; needs no tokenizer."""
        cls._check_options(options)
        if not all(record_kind(record) == cls.kind for record in records):
            raise TaskError(f"task {cls.name!r} needs records with {KINDS[cls.kind]}")

    @classmethod
    def _check_options(cls, options: Mapping[str, Any]) -> None:
        known = [option.name for option in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            others = {name: f", which is of {', '.join(of)}" if (of := tasks_with(name)) else "" for name in unknown}
            raise TaskError(
                *(f"{cls.name} has no option {name!r}{others[name]}; it has {', '.join(known)}" for name in unknown)
            )

    @classmethod
    def labels_of(cls, record: Record) -> Sequence[str]:
        """The names in a record's answer that other records' answers have too: its label, its labels, its tags."""
        return ()

    def about(self, records: Sequence[Record]) -> str:
        """What the answers of training records are, for a message that begins with how many there are."""
        return ""

    def assumed(self, records: Sequence[Record]) -> str | None:
        """What "auto" took the answers of training records for, where another task could be meant."""
        return None

    @property
    def head(self) -> tuple[str, ...] | None:
        """Names of the outputs of the head that the model needs, by default the labels; None for a task without one."""
        return self.labels

    @property
    def head_note(self) -> str | None:
        """What users of an exported head must know to read its outputs; None where they are logits of the labels."""
        return None

    @property
    def likelihood(self) -> Likelihood:
        """How probable an answer is, given the logits."""
        return self.family()

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return "Answers a question by one of the choices that come with it."

    def columns(self, record: Record) -> list[str]:
        """Name of each column of this record's logits, in order."""
        raise NotImplementedError

    def width(self, record: Record) -> int:
        """How many logits the record has."""
        return len(self.columns(record) or self.head or ())

    def target(self, record: Record) -> Any:
        """The answer as examples hold it, by default the column that is right; None where the record has none.

        Raises:
            TaskError: it is none of the columns.
        """
        raise NotImplementedError

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The record as plain ints and lists; `label` is there when the record has its answer.

        Raises:
            TaskError: naming the field, its value and what would be right.
        """
        if problems := record_problems(record, self.kind):
            raise TaskError(*problems)
        target = self.target(record)
        return self.tokenize(record, tokenizer) | ({} if target is None else {"label": target})

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """What `encode` gives but for `label`, of a record whose fields are right; `truncated` tokens were cut off."""
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """Tokens that an encoded example takes in a batch."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Encoded examples as one padded batch; `labels` (b,) is there when every example has a label."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (b, C) in float32, C = most choices in this batch, -inf for the ones a question lacks."""
        raise NotImplementedError

    def continuations(self, example: Example) -> tuple[list[int], list[list[int]], list[int]]:
        """For `scored_by`: a prefix, each choice's tokens after it, and how many last ones of them are scored."""
        return example["prefix"], example["branches"], example["scored"]

    def choice_logit(self, log_likelihood: Score, num_tokens: Score) -> Score:
        """A choice's logit, of the log-likelihood, nats, of its scored tokens and their number."""
        return log_likelihood

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON-able values; `task_from_dict` reads it back."""
        values = asdict(self).items()
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values}


class Choice(Task):
    """A question and its choices, each a column."""

    kind: ClassVar[str] = "choice"
    answer: ClassVar[str] = "answer"
    pipeline_tag: ClassVar[str] = "multiple-choice"

    def columns(self, record: Record) -> list[str]:
        """The record's choices."""
        return list(record["choices"])

    def target(self, record: Record) -> int | None:
        """The answer's index."""
        return record.get("answer")


def _problem(name: str, task: Any) -> str | None:
    if not (isinstance(task, type) and issubclass(task, Task)):
        return "it isn't a subclass of bloblora.tasks.Task"
    if getattr(task, "name", None) != name or getattr(task, "kind", None) not in KINDS:
        return f"its class must have name = {name!r}, and kind one of {', '.join(KINDS)}"
    return None if hasattr(task, "pipeline_tag") else "its class has no pipeline_tag"


TASKS: Registry[type[Task]] = Registry(
    "bloblora.tasks",
    {
        "regression": "bloblora.tasks.regression:Regression",
        "multi_label": "bloblora.tasks.multi_label:MultiLabel",
        "classification": "bloblora.tasks.classification:Classification",
        "choice_text": "bloblora.tasks.choice_text:ChoiceText",
        "choice_letter": "bloblora.tasks.choice_letter:ChoiceLetter",
        "blank": "bloblora.tasks.choice_text:Blank",
        "generation": "bloblora.tasks.generation:TextGeneration",
        "reward": "bloblora.tasks.reward:Reward",
        "token_classification": "bloblora.tasks.token_classification:TokenClassification",
    },
    _problem,
)
"""Tasks by name, ours and those of other packages; for "auto" they are asked in this order."""


def tasks_with(option: str) -> list[str]:
    """Names of the tasks that have an option."""
    return [name for name, task in TASKS.items() if option in {known.name for known in fields(task)}]


def build_task(name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
    """The task of this name, or the one that fits the records for "auto".

    "auto" is for records with a `text` `regression` where each has a `value`, or a `label` that is a number and some of
    these have fractions, `multi_label` where each has `labels`, otherwise `classification`; `token_classification` for
    records with `tokens`; `generation` for those with a `prompt` or `messages`; `reward` for those with `chosen` and
    `rejected`; for choices it is `blank` when every question has two choices and a `_`, otherwise `choice_text`.

    Raises:
        TaskError: an unknown name or option, or records that fit no task.
    """
    return TASKS.find(guess_task(records) if name == "auto" else name, "task:", TaskError).build(
        records, tokenizer, **options
    )


def guess_task(records: Sequence[Record]) -> str:
    """Name of the task that fits the records, as for "auto".

    Raises:
        TaskError: records that fit no task.
    """
    for name, task in TASKS.items():
        if task.fits(records):
            return name
    raise TaskError(
        "task: 'auto' needs records that all have 'text', 'tokens', 'prompt', 'messages', 'chosen' and 'rejected', or "
        "'question' and 'choices'"
    )


def task_from_dict(values: Mapping[str, Any]) -> Task:
    """The task that `Task.to_dict` described.

    Raises:
        TaskError: an unknown name or option, or one that is missing, of another type or out of its range.
    """
    options = {key: value for key, value in values.items() if key != "name"}
    task = TASKS.find(values.get("name"), "task:", TaskError)  # type: ignore[arg-type]
    check_fields(options, task, f"task {task.name!r}", TaskError)
    return task(**options)


def encode_all(
    task: Task, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> list[Example]:
    """Every record encoded; a warning says how many had to be truncated, and how long the longest is.

    Raises:
        TaskError: all problems of all records, each with the record's number, counted from 1.
    """
    return [*encode_each(task, records, tokenizer, progress)]


def encode_each(
    task: Task, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> Iterator[Example]:
    """The same one after the other, none of them kept; errors and warnings come at the end.

    In errors records of a selection have the numbers of the file that they are selected from.
    """
    problems: list[str] = []
    positions = getattr(records, "positions", range(len(records)))
    truncated = longest = 0
    shown = track(records, "Tokenizing", disable=not progress, console=Console(stderr=True))
    for position, record in zip(positions, shown, strict=True):
        try:
            with TOKENIZING:
                example = task.encode(record, tokenizer)
        except TaskError as error:
            problems += [f"record {position + 1}: {problem}" for problem in error.problems]
            continue
        truncated += example["truncated"] > 0
        longest = max(longest, task.length(example) + example["truncated"])
        yield example
    if problems:
        raise TaskError(*problems)
    if truncated:
        _log.warning(
            f"{truncated} of {len(records)} records have more than max_length={task.max_length} tokens: "
            f"{task.truncates} was cut off; the longest has {longest}"
        )
